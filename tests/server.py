"""A real ComfyUI server with this pack alone in it, and a client that speaks to it as the frontend does."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import websocket
from PIL import Image

PACK = Path(__file__).parents[1]
FOLDER = "pixart-sigma"
# What a user copies into custom_nodes.
COPIED = ("__init__.py", "nodes", "pixart_sigma", "web", "locales", "example_workflows", "requirements.txt")
PROGRESS_TEXT = 3  # the host's BinaryEventTypes.TEXT

DEMO = "demo (built in)"
MODELS = {"transformer", "text_encoder", "vae", "prompt_embeddings"}
DEMO_FOR_FOUR_STEPS = "demo for four steps (built in)"
DEMO_SETTINGS = {"variant": "auto", "base": "256", "recipe": "phased-4"}


class DidNotStart(Exception):
    """ComfyUI ended before it answered; `said` is what it printed."""

    def __init__(self, said: str):
        super().__init__(f"ComfyUI did not start:\n{said[-3000:]}")
        self.said = said


class Rejected(Exception):
    """The host refused a prompt; `node_errors` is what the frontend would show."""

    def __init__(self, answer: dict):
        super().__init__(json.dumps(answer))
        self.node_errors = answer.get("node_errors", {})


@dataclass(frozen=True)
class Run:
    """What became of a prompt."""

    status: str
    outputs: dict
    messages: list

    @property
    def error(self) -> str:
        """The message on the failed node, or ""."""
        return self._of_error("exception_message")

    @property
    def failed(self) -> str:
        """The failed node, or ""."""
        return self._of_error("node_id")

    def _of_error(self, name: str) -> str:
        return next((content[name] for kind, content in self.messages if kind == "execution_error"), "")

    @property
    def cached(self) -> set[str]:
        return {
            node for kind, content in self.messages if kind == "execution_cached" for node in content["nodes"]
        }


def with_the_demo(prompt: dict):
    """Puts the demo in place of the files that a prompt would need, at the demo's size; of few-step weights
    the demo for four steps."""
    few_steps = any(node["class_type"] == "PixArtSigmaFewStepRecipe" for node in prompt.values())
    demos = {"transformer": DEMO_FOR_FOUR_STEPS} if few_steps else {}
    for node in prompt.values():
        inputs = node["inputs"]
        inputs.update(
            {
                name: demos.get(name, DEMO)
                for name in MODELS & set(inputs)
                if isinstance(inputs[name], str) and not inputs[name].endswith("(built in)")
            }
        )
        # What is auto follows the demo.
        chosen = {name for name in DEMO_SETTINGS if inputs.get(name, "auto") != "auto"}
        inputs.update({name: DEMO_SETTINGS[name] for name in chosen})


def write_inputs(base: Path):
    """What the example workflows name beside the models that the demo stands for: a picture, and a ControlNet
    and a LoRA for the demo, as a training begins with them, when they add nothing."""
    from safetensors.numpy import save_file

    from pixart_sigma import DEMO as folder
    from pixart_sigma.transformer.checkpoint import inspect
    from pixart_sigma.transformer.controlnet_file import build_controlnet

    config = replace(inspect(folder).config, num_layers=1, kv_compression=None)
    shapes = {name: weight.shape for name, weight in build_controlnet(config).state_dict().items()}
    made = base / "models" / "controlnet" / "pixart-sigma-controlnet"
    made.mkdir(parents=True)
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()},
        made / "diffusion_pytorch_model.safetensors",
    )
    (made / "config.json").write_text(json.dumps({"num_attention_heads": config.num_attention_heads}))
    _write_lora(base / "models" / "loras" / "pixart-sigma-lora", config.cross_attention_dim)
    (base / "input").mkdir(exist_ok=True)
    Image.radial_gradient("L").convert("RGB").save(base / "input" / "example.png")


def _write_lora(folder: Path, width: int):
    """As PEFT writes it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    layer = "base_model.model.transformer_blocks.0.attn1.to_q"
    zeros = {"A": np.zeros((4, width), np.float32), "B": np.zeros((width, 4), np.float32)}
    tensors = {f"{layer}.lora_{part}.weight": tensor for part, tensor in zeros.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')


class Server:
    """ComfyUI in a base folder of its own, run by `python`, on the CPU or as its `flags` say; `address` once
    it answers."""

    def __init__(self, host: Path, base: Path, python: str = sys.executable, flags=("--cpu",)):
        self.base, self.log, self.python, self.flags = base, base / "server.log", python, flags
        pack = base / "custom_nodes" / FOLDER
        pack.mkdir(parents=True)
        for name in COPIED:
            source = PACK / name
            if source.is_dir():
                shutil.copytree(source, pack / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copyfile(source, pack / name)
        write_inputs(base)
        self.start(host)

    def start(self, host: Path):
        """Also after `stop`, on the same folders."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [self.python, "main.py", *self.flags, "--port", str(port), "--disable-auto-launch"]
                + ["--disable-api-nodes", "--disable-all-custom-nodes", "--whitelist-custom-nodes", FOLDER]
                + ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"],
                cwd=host,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": ""},
            )
        deadline = time.monotonic() + 600
        while True:
            try:
                self.get("/system_stats")
                return
            except OSError as error:
                if self.process.poll() is not None:
                    raise DidNotStart(self.log.read_text(encoding="utf-8", errors="replace")) from error
                if time.monotonic() > deadline:
                    self.stop()
                    raise TimeoutError(f"ComfyUI does not answer:\n{self.log.read_text()[-3000:]}") from error
                time.sleep(0.3)

    def stop(self):
        self.process.kill()
        self.process.wait()

    def get(self, path: str):
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, content: dict | None = None):
        request = urllib.request.Request(
            self.address + path,
            data=json.dumps(content or {}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def submit(self, prompt: dict, client: str | None = None) -> str:
        """The prompt's id; Rejected if the host does not take it."""
        try:
            content = {"prompt": prompt, "client_id": client or uuid.uuid4().hex}
            return self.post("/prompt", content)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise Rejected(json.load(error)) from None

    def wait(self, prompt_id: str, seconds: float = 240) -> Run:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                status = history[prompt_id]["status"]
                return Run(status["status_str"], history[prompt_id]["outputs"], status["messages"])
            time.sleep(0.1)
        raise TimeoutError(f"prompt {prompt_id} took more than {seconds} s:\n{self.log.read_text()[-2000:]}")

    def run(self, prompt: dict) -> Run:
        return self.wait(self.submit(prompt))

    def texts(self, prompt: dict) -> list[tuple[str, str]]:
        """Runs a prompt; the texts that its client was told to show, each with its node."""
        client, texts = uuid.uuid4().hex, []
        address = self.address.replace("http", "ws", 1) + f"/ws?clientId={client}"
        connection = websocket.create_connection(address, timeout=240)
        prompt_id = self.submit(prompt, client)
        while True:
            message = connection.recv()
            if isinstance(message, bytes):
                (kind, length), content = struct.unpack(">II", message[:8]), message[8:]
                if kind == PROGRESS_TEXT:
                    texts.append((content[:length].decode(), content[length:].decode()))
            elif json.loads(message)["data"] == {"node": None, "prompt_id": prompt_id}:
                connection.close()
                return texts

    def pictures(self, run: Run, node: str) -> list[np.ndarray]:
        """The pictures (H, W, 3) that a node saved or showed."""
        return [
            np.asarray(Image.open(BytesIO(self._view(entry))).convert("RGB"))
            for entry in run.outputs[node]["images"]
        ]

    def _view(self, entry: dict) -> bytes:
        query = urllib.parse.urlencode(entry)
        with urllib.request.urlopen(f"{self.address}/view?{query}", timeout=60) as answer:
            return answer.read()
