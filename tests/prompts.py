"""Prompts, as the frontend makes them of the example workflows, and what of our nodes they depend on."""

import copy
import json
from pathlib import Path

from comfy_cli.workflow_to_api import convert_ui_to_api
from server import MODELS, PACK, Server, with_the_demo

FEWEST_STEPS = {"PixArtSigmaCalibrateKVCompression": 4}
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))
# As somebody saved it when kv_compression was a text and no model told the bucket its base.
SAVED_WORKFLOW = PACK / "tests" / "host" / "saved_workflow.json"


def to_prompt(workflow: Path, object_info: dict) -> dict:
    return convert_ui_to_api(json.loads(workflow.read_text(encoding="utf-8")), object_info)


def node(prompt: dict, kind: str) -> dict:
    """The inputs of the first node of a kind."""
    return next(entry["inputs"] for entry in prompt.values() if entry["class_type"] == kind)


def number(prompt: dict, kind: str) -> str:
    return next(key for key, entry in prompt.items() if entry["class_type"] == kind)


def quick(prompt: dict, steps: int = 2) -> dict:
    prompt = copy.deepcopy(prompt)
    for entry in prompt.values():
        if "steps" in entry["inputs"]:
            entry["inputs"]["steps"] = max(steps, FEWEST_STEPS.get(entry["class_type"], 1))
    return prompt


def run_with_the_demo(server: Server, workflow: Path, object_info: dict):
    """Fails unless the workflow runs, with the demo for its models, and saves a picture with content."""
    prompt = quick(to_prompt(workflow, object_info))
    with_the_demo(prompt)
    for entry in prompt.values():
        # Of words that it does not know, the demo may make an empty canvas.
        if entry["class_type"] == "PixArtSigmaTextEncode":
            entry["inputs"]["positive"] = "a large green square on a yellow background"
    run = server.run(prompt)
    assert run.status == "success", run.error
    for key, entry in prompt.items():
        if entry["class_type"] == "SaveImage":
            pictures = server.pictures(run, key)
            assert len(pictures) == pictures_of(prompt)
            for picture in pictures:
                # Of each channel: a canvas in one colour has no content.
                assert picture.std((0, 1)).max() > 20


def pictures_of(prompt: dict) -> int:
    """How many a prompt makes: one, or one for each of a list."""
    lists = [entry for entry in prompt.values() if entry["class_type"] == "PixArtSigmaEncodePromptList"]
    return len(lists[0]["inputs"]["prompts"].splitlines()) if lists else 1


def at_defaults(object_info: dict, kind: str, **links) -> dict:
    """A node of a prompt as it comes out of the menu, with these links."""
    given = object_info[kind]["input"]
    declared = given.get("required", {}) | given.get("optional", {})
    defaults = {name: options["default"] for name, (_, options) in declared.items() if "default" in options}
    return {"class_type": kind, "inputs": defaults | links}


def contract(object_info: dict) -> dict:
    """What workflows depend on, of our nodes."""
    ours = {name: info for name, info in sorted(object_info.items()) if name.startswith("PixArtSigma")}
    return json.loads(json.dumps({name: _promise(info) for name, info in ours.items()}))


def promised_contract() -> dict:
    return json.loads((PACK / "tests" / "host" / "object_info.json").read_text(encoding="utf-8"))


def _promise(info: dict) -> dict:
    """Inputs with types, order and defaults; outputs; choices but files."""
    inputs = {}
    for part in ("required", "optional"):
        for name, (declared, options) in info["input"].get(part, {}).items():
            kept = {key: options[key] for key in ("default", "min", "max") if key in options}
            if "options" in options and name not in MODELS and name not in ("sampler_name", "schedule"):
                kept["options"] = options["options"]
            inputs[name] = [part, declared, kept]
    return {"inputs": inputs, "outputs": info["output"], "output_names": info["output_name"]}
