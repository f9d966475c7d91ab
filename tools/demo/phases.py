"""A run in few phases, to be learned from: where the teacher's many guided steps lead from the student's own
states.

The student learns to go through a phase in one step without guidance, as phased distillation has it (arXiv
2405.18407), and its states are its own half of the time, so that it meets its mistakes (arXiv 1011.0686).
"""

import dataclasses

import torch
from batches import hard_scene
from drawings import caption
from losses import balanced_error, guide
from own_pictures import RUNS_TOGETHER, Rollouts

# Where phases begin, as the recipe phased-4 has it, and how many steps the teacher takes through one.
PHASES, STEPS_IN_PHASE = (999, 749, 500, 250), 5


@dataclasses.dataclass
class Phase:
    """From `state` (4, height, width) at `timestep` the student should predict `noise`, to land where the
    teacher does."""

    text: str
    state: torch.Tensor
    timestep: int
    noise: torch.Tensor


class Phases(Rollouts):
    """What the student is to do at the beginning of each phase of its own runs, and of the teacher's."""

    def __init__(self, student, teacher, scheduler, vae, rng, encode):
        super().__init__(teacher, scheduler, vae, rng, encode)
        self.student = student

    def next(self, sizes):
        """(size, (states, timesteps, noise), texts); each row is of another run."""
        size = self.rng.choice(sizes)
        chosen = self.rng.sample(self.waiting(size), RUNS_TOGETHER)
        states, noise = (torch.stack([getattr(one, name) for one in chosen]) for name in ("state", "noise"))
        timesteps = torch.tensor([one.timestep for one in chosen])
        return size, (states, timesteps, noise), [one.text for one in chosen]

    @torch.no_grad()
    def run(self, size: tuple[int, int]) -> list[Phase]:
        texts = [caption(hard_scene(self.rng), self.rng) for _ in range(RUNS_TOGETHER)]
        hidden, mask = self.encode(texts + [""] * len(texts))
        latents, phases = torch.randn(len(texts), 4, size[1] // 8, size[0] // 8), []
        for begin, end in zip(PHASES, (*PHASES[1:], None), strict=True):
            goal = self.teach(latents, begin, end, hidden, mask)
            noise = self.noise_to(goal, latents, begin, end)
            phases += [Phase(*row[:2], begin, row[2]) for row in zip(texts, latents, noise, strict=True)]
            captioned = hidden[: len(texts)], mask[: len(texts)]
            predicted = self.student(latents, torch.full((len(texts),), begin), *captioned).float()
            own = torch.rand(len(texts), 1, 1, 1) < 0.5
            latents = torch.where(own, self.land(predicted, latents, begin, end), goal)
        return phases

    def teach(self, latents, begin: int, end: int | None, hidden, mask) -> torch.Tensor:
        """Latents at the end of a phase, by the teacher's guided steps."""
        steps = torch.linspace(begin, end or 0, STEPS_IN_PHASE + 1).round().int().tolist()
        self.scheduler.set_timesteps(timesteps=steps if end else steps[:-1])
        for timestep in self.scheduler.timesteps[:STEPS_IN_PHASE]:
            both = torch.cat([latents, latents])
            predicted = self.transformer(both, timestep.expand(len(both)), hidden, mask).float()
            latents = self.scheduler.step(guide(*predicted.chunk(2)), timestep, latents, return_dict=False)[0]
        return latents

    def land(self, noise, latents, begin: int, end: int | None) -> torch.Tensor:
        """The deterministic step through a phase (DDIM, arXiv 2010.02502, eq. 12)."""
        signal, further = self.levels(begin, end)
        clean = (latents - (1 - signal).sqrt() * noise) / signal.sqrt()
        return further.sqrt() * clean + (1 - further).sqrt() * noise

    def noise_to(self, goal, latents, begin: int, end: int | None) -> torch.Tensor:
        """The noise with which `land` ends at the goal."""
        signal, further = self.levels(begin, end)
        kept = (further / signal).sqrt()
        return (goal - kept * latents) / ((1 - further).sqrt() - kept * (1 - signal).sqrt())

    def levels(self, begin: int, end: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        products = self.scheduler.alphas_cumprod
        return products[begin], products[end] if end is not None else torch.tensor(1.0)


def phase_loss(student):
    """The squared error of the picture that the student predicts at the beginning of a phase."""

    def loss(schedule, batch, texts, encode):
        states, timesteps, noise = batch
        predicted = student(states, timesteps, *encode(texts)).float()
        return balanced_error(schedule, timesteps, predicted, noise)

    return loss
