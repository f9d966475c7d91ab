"""What the demo is trained to make small: errors of pictures, of noise, and against a teacher."""

import random

import torch
from drawings import random_scene, render
from networks import LATENT_NOISE
from torch.nn import functional

# What is left of the predicted picture's squared error per hundred timesteps, once trained: it is what the
# noise hides, and its share of the loss.
ERROR_LEFT = (0.0018, 0.0054, 0.0104, 0.0167, 0.0279, 0.0364, 0.0416, 0.0486, 0.0532, 0.0664)
# The guidance scale that pictures are sampled with, and the one that it acts as below timestep 600.
GUIDANCE, MILD_GUIDANCE = 4.5, 2.0
# The timestep below which a run's picture has been decided, and the weight of the guided error.
UNDECIDED, GUIDED_SHARE = 550, 0.3
# The latents' variance within a picture, on average.
MEAN_CONTRAST = 0.35


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on colours and on their differences to the neighbours, which keeps edges sharp."""
    loss = functional.l1_loss(output, target) + functional.mse_loss(output, target)
    for dimension in (2, 3):
        loss = loss + functional.l1_loss(output.diff(dim=dimension), target.diff(dim=dimension))
    return loss


def decoding_loss(pictures: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Errors of the colours and of their differences to the neighbours, squared where they are small.

    Nearly all of a picture is flat and nearly right. Were its errors not squared, they would pull every
    weight at each step, and outlines would be learned by none.
    """
    error = 2 * functional.smooth_l1_loss(pictures, wanted, beta=0.2)
    for dimension in (2, 3):
        difference = pictures.diff(dim=dimension), wanted.diff(dim=dimension)
        error = error + functional.smooth_l1_loss(*difference, beta=0.1)
    return error


def diffusion_loss(transformer, schedule, latents, hidden, mask, error=None):
    """Noise prediction plus the variational bound for the learned variance (arXiv 2102.09672, eq. 15-16).

    error: how the noise prediction is judged; `weighted_error` by default.
    """
    noise, timestep = torch.randn_like(latents), spread_timesteps(len(latents))
    noisy = schedule.add_noise(latents, noise, timestep)
    output = transformer(
        noisy,
        encoder_hidden_states=hidden,
        encoder_attention_mask=mask,
        timestep=timestep,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    predicted, variance = output.float().chunk(2, dim=1)
    products = schedule.alphas_cumprod
    current = products[timestep][:, None, None, None]
    simple = (error or weighted_error)(schedule, timestep, predicted, noise)
    previous = torch.where(timestep > 0, products[timestep - 1], 1.0)[:, None, None, None]
    beta = 1 - current / previous
    posterior = (beta * (1 - previous) / (1 - current)).clamp(min=1e-20)
    low, high = posterior.clamp(min=1e-6).log(), beta.log()
    fraction = (variance + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low
    scale = beta / ((1 - current) * (current / previous)).sqrt()
    difference = scale * (noise - predicted.detach())
    divergence = 0.5 * (
        log_variance - low + (low - log_variance).exp() - 1 + difference**2 * (-log_variance).exp()
    )
    return simple + 0.001 * divergence.mean()


def weighted_error(schedule, timestep, predicted, noise):
    """The squared error over the signal-to-noise ratio, within bounds: that of the predicted picture.

    What the words say is decided where there is nothing but noise, and the plain error is tiny there: without
    the weight, colours are drawn but not on what they were said of.
    """
    current = schedule.alphas_cumprod[timestep][:, None, None, None]
    weight = ((1 - current) / current).clamp(0.2, 300)
    return (weight * (predicted - noise).square()).mean()


def balanced_error(schedule, timestep, predicted, wanted):
    """The squared error of the predicted picture over what is left of it at the same timestep, once trained.

    Without it the loss is nearly that of the noisiest timesteps, where no training helps any more; outlines
    are drawn at the others.
    """
    current = schedule.alphas_cumprod[timestep][:, None, None, None]
    left = torch.tensor(ERROR_LEFT)[timestep // 100][:, None, None, None]
    weight = ((1 - current) / current).clamp(0.2, 300) * (0.03 / left).clamp(max=4)
    return (weight * (predicted.float() - wanted).square()).mean()


def spread_timesteps(count: int) -> torch.Tensor:
    """One at random in each of `count` equal parts of the schedule: a batch sees all of it."""
    return ((torch.arange(count) + torch.rand(count)) * (1000 / count)).long()


# -- Export ---------------------------------------------------------------------------------------


def guide(captioned: torch.Tensor, empty: torch.Tensor, scale=GUIDANCE) -> torch.Tensor:
    """Classifier-free guidance (arXiv 2207.12598) of the predictions with a caption and without."""
    return empty + scale * (captioned - empty)


def mild_guidance(timestep: torch.Tensor) -> torch.Tensor:
    """The guidance scale that `GUIDANCE` is to act as; as it is where the picture is still all noise."""
    noise = ((timestep - 600) / 200).clamp(0, 1)
    return MILD_GUIDANCE + (GUIDANCE - MILD_GUIDANCE) * noise


def imitation_loss(student, teacher, acts_as):
    """The student's errors against the teacher, with the caption, without it, and guided.

    Guidance multiplies what the two predictions differ by, their errors too: in so small a model that breaks
    outlines. So the student learns a captioned prediction that lies nearer to the empty one: guided by
    `GUIDANCE` it gives what the teacher gives at acts_as(timestep). A teacher's answer has no noise in it, so
    a few hundred steps do.
    """
    teacher.requires_grad_(False).eval()

    def loss(schedule, latents, texts, encode):
        spoken = [row for row, text in enumerate(texts) if text][: 1 + len(texts) // 2]
        latents, texts = latents[spoken], [texts[row] for row in spoken]
        hidden, mask = encode(texts + [""] * len(texts))
        timestep = spread_timesteps(len(texts))
        noisy = schedule.add_noise(latents, torch.randn_like(latents), timestep)
        inputs = torch.cat([noisy, noisy]), torch.cat([timestep, timestep]), hidden, mask
        with torch.no_grad():
            captioned, empty = teacher(*inputs).float().chunk(2)
            scale = acts_as(timestep)[:, None, None, None]
            guided = guide(captioned, empty, scale)
            captioned = guide(captioned, empty, scale / GUIDANCE)
        own_captioned, own_empty = student(*inputs).float().chunk(2)
        own_guided = guide(own_captioned, own_empty)
        return (
            balanced_error(schedule, timestep, own_captioned, captioned)
            + 0.5 * balanced_error(schedule, timestep, own_empty, empty)
            + 0.5 / (GUIDANCE - 1) ** 2 * balanced_error(schedule, timestep, own_guided, guided)
        )

    return loss


# -- Correction -----------------------------------------------------------------------------------


@torch.no_grad()
def visibility(vae) -> torch.Tensor:
    """(4, 4) over the latents' channels: `visibility(vae) @ error` is as long as the error looks in pixels.

    In one direction of the channels an error is seen in the pixels a hundred times less, in squares, than in
    another, and took as much of the training. A tenth counts in every direction, as each informs the others.
    """
    rng, noise = random.Random(0), torch.Generator().manual_seed(0)
    latents = vae.encode(render([random_scene(rng) for _ in range(4)], 128, 128, rng)).latent_dist.mean
    error = LATENT_NOISE * torch.randn(latents[:, 0].shape, generator=noise)
    drawn, changes = vae.decode(latents).sample, []
    for channel in range(4):
        moved = latents.clone()
        moved[:, channel] += error
        changes.append((vae.decode(moved).sample - drawn).flatten())
    changes = torch.stack(changes)
    squared = changes @ changes.T
    return torch.linalg.cholesky(squared / squared.trace() * 4 + 0.1 * torch.eye(4)).T


def correction_loss(student, teacher, visible):
    """The squared error of the student's picture as `visible` has it: captioned, empty, and guided.

    All should be the redrawn one, or the teacher's while the noise still hides outlines and the redrawn one
    is but one of many pictures. Learned one by one, the two predictions err each in its own way at the edges,
    and guidance multiplies what they differ by. An error counts relative to the contrast of its picture, as
    an outline is as crooked on gray as on black.
    """
    teacher.requires_grad_(False).eval()

    def loss(schedule, batch, texts, encode):
        states, timestep, wanted = batch
        hidden, mask = encode([*texts, *[""] * len(texts)])
        signal = schedule.alphas_cumprod[timestep][:, None, None, None]
        decided = ((UNDECIDED - timestep) / 150).clamp(0, 1)[:, None, None, None]
        noise = ((states - signal.sqrt() * wanted) / (1 - signal).sqrt()).repeat(2, 1, 1, 1)
        inputs = states.repeat(2, 1, 1, 1), timestep.repeat(2), hidden, mask
        early = (timestep > UNDECIDED - 150).repeat(2)
        with torch.no_grad():
            taught = teacher(*(part[early] for part in inputs)).float()
        noise[early] = torch.lerp(taught, noise[early], decided.repeat(2, 1, 1, 1)[early])
        error = torch.einsum("ij,bjhw->bihw", visible, student(*inputs).float() - noise)
        captioned, empty = error.chunk(2)
        guided = guide(captioned, empty)
        error = captioned.square() + 0.5 * empty.square() + GUIDED_SHARE * guided.square()
        left = torch.tensor(ERROR_LEFT)[timestep // 100][:, None, None, None]
        weight = ((1 - signal) / signal).clamp(max=300) * (0.03 / left).clamp(max=4)
        contrast = wanted.var((2, 3), correction=0, keepdim=True).mean(1, keepdim=True)
        return (weight * (MEAN_CONTRAST / contrast).clamp(0.5, 3) * error).mean()

    return loss


# -- Decoder --------------------------------------------------------------------------------------
