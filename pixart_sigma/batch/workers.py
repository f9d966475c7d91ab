"""How many workers the stages of a batch have on Ray, and what each needs.

Nothing here imports torch or Ray, so that a mistake is known at once.
"""

import re
from dataclasses import dataclass

from ..errors import SigmaError

STAGES = ("t5", "transformer", "vae")
MOST = 10_000


@dataclass(frozen=True)
class Pool:
    """The workers of a stage: from `least` to `most`, as the work asks; the GPUs of each, which may be a part
    of one, or None where nobody said."""

    least: int = 1
    most: int = 1
    gpus: float | None = None


def parse_pools(workers: str | None, gpus: str | None) -> dict[str, Pool]:
    """The pools of STAGES from "t5=1,transformer=2-8" and "transformer=1,vae=0.25". Raises SigmaError."""
    counts = _parse(workers, "--workers", r"(\d{1,9})(?:-(\d{1,9}))?", "t5=1,transformer=4,vae=1")
    shares = _parse(gpus, "--gpus", r"(\d{1,4}(?:\.\d{1,4})?)", "t5=1,transformer=1,vae=0.25")
    found = {}
    for stage in STAGES:
        least, most = counts.get(stage, ("1", None))
        pool = Pool(int(least), int(most or least), float(shares[stage][0]) if stage in shares else None)
        if not 1 <= pool.least <= pool.most <= MOST:
            raise SigmaError(f"--workers gives {stage} {least}{f'-{most}' if most else ''}; give 1 or more.")
        found[stage] = pool
    return found


def _parse(text: str | None, option: str, value: str, example: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for part in (text or "").split(",") if text is not None else ():
        match = re.fullmatch(rf"\s*([a-z0-9]+)\s*=\s*{value}\s*", part)
        if not match or match[1] not in STAGES or match[1] in found:
            raise SigmaError(
                f"{option} is {text!r}; give some of {', '.join(STAGES)}, each once, such as {example}."
            )
        found[match[1]] = match.groups()[1:]
    return found
