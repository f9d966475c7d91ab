"""What is shown while a command works."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """A bar with the time that is left in its stage, on a terminal; elsewhere nothing."""

    def __init__(self, bar: Any):
        self.bar = bar

    def stage(self, name: str) -> None:
        """A new stage begins, whose length is not known yet."""
        self.bar.total, self.bar.bar_format = None, "{desc} [{elapsed}]"
        self.bar.set_description_str(name, refresh=False)
        self.bar.reset()

    def count(self, done: int, total: int) -> None:
        """So much of the stage is done."""
        self.bar.total, self.bar.bar_format = total, None
        self.bar.update(done - self.bar.n)

    def step(self, step) -> None:
        """A step of the denoising is done."""
        self.count(step.index + 1, step.count)


@contextmanager
def progress() -> Iterator[Progress]:
    """A `Progress` for this block, within which no library draws bars of its own."""
    from tqdm import tqdm
    from transformers.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with tqdm(total=None, leave=False, disable=None) as bar:
            yield Progress(bar)
    finally:
        if shown:
            enable_progress_bar()
