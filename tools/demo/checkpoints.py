"""Training in steps that may be stopped and gone on with, and the weights that it leaves."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

SECONDS_BETWEEN_CHECKPOINTS = 90


class Steps:
    """The steps of a stage, from where its checkpoint stands to `total`.

    `parts`, which have a state_dict, are read from the checkpoint, and kept in it every 90 seconds and at the
    end, once the body of the loop over them is done.
    """

    def __init__(self, path: Path, total: int, **parts):
        self.path, self.total, self.parts = path, total, parts
        self.done = resume(path, **parts)
        self.start = time.time()

    def __iter__(self) -> Iterator[int]:
        saved = time.time()
        while self.done < self.total:
            yield self.done
            self.done += 1
            late = time.time() - saved > SECONDS_BETWEEN_CHECKPOINTS
            if rank() == 0 and (late or self.done == self.total):
                save(self.path, self.done, **self.parts)
                saved = time.time()

    def tell(self, text: str):
        """Prints how the step that is being done went."""
        if rank() == 0:
            minutes = (time.time() - self.start) / 60
            log(f"{self.path.stem} {self.done + 1}: {text}, {minutes:.1f} min")


def rank() -> int:
    """This process's number among those that torchrun started."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def save(path: Path, step: int, **parts):
    state = {name: part.state_dict() for name, part in parts.items()}
    beside = path.with_suffix(".part")
    torch.save({"step": step, **state}, beside)
    os.replace(beside, path)


def resume(path: Path, **parts) -> int:
    """The step of a checkpoint, whose state the parts take; 0 where there is none."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    # `restore` leaves out the optimizers of its stages, which then start anew.
    missing = parts.keys() - state.keys() - {"optimizer"}
    if missing:
        raise SystemExit(
            f"{path} has no {', '.join(sorted(missing))}: another version of this tool wrote it. "
            "Move it away to start this stage anew."
        )
    for name in parts.keys() & state.keys():
        parts[name].load_state_dict(state[name])
    return state["step"]


def averaged(network: torch.nn.Module) -> AveragedModel:
    """An average of the network's weights over the steps, the last thousand above all."""

    def ema(average, current, count):
        decay = min(0.999, (1 + count) / (10 + count))
        return average + (1 - decay) * (current - average)

    return AveragedModel(network, avg_fn=ema)


def write_weights(network: torch.nn.Module, folder: Path):
    """The weights in fp16 in a component's folder, in place of those that it holds."""
    weights = {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}
    beside = folder / "diffusion_pytorch_model.part"
    save_file(weights, beside, {"format": "pt"})
    beside.chmod(0o644)
    os.replace(beside, folder / "diffusion_pytorch_model.safetensors")
    log(f"exported to {folder}")


def log(text: str):
    print(text, flush=True)
