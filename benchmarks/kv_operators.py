"""Ways to compress keys and values without trained weights, side by side.

    python benchmarks/kv_operators.py [--ratio 2] [--size 256] [--prompts 3] [--every 3]
        [--only uniform mean "by detail"] [--tables operators rules]

The demo model, all layers compressed: the relative L2 error of the noise that it predicts for the prompt and
of the guided noise, at every third step of an uncompressed run of 20 steps from the same noise, and of the
latents after a whole compressed run; averaged over prompts, each with a seed of its own.

Real width (heads of 72 over 1152 channels, four of the sixteen, which are alike): the error of one
self-attention's result. Tokens are random fields whose amplitude falls as 1/f, as in photographs, with white
noise for what is fine, and normalised as in the network; in the last column the white noise comes and goes
over the picture, as detail does: its logarithm is such a field, of deviation 1. Weights are random. Queries
are scaled until attention is as spread as the demo's is on average: mean entropy of its rows over
log(tokens). In unrelated columns queries and keys have weights of their own, so that no token prefers its
neighbours; in the related one half of the keys' weights is the queries', so that a token prefers those that
resemble it, itself above all. Trained networks lie between the two.

`keys` is how many keys and values a query attends to here, over those of `mean`; `cost` is the multiply-adds
of a self-attention of 128x128 tokens (2048x2048 pixels) of the real width, projections included, over those
of `mean`. `under uniform` is how much lower the error of the guided noise is than in the first row, which
is the authors' way without trained weights: `uniform`.

The second table spends one and the same saving on other layers and steps, with the engine's own `mean`.
"""

import argparse
import math

import torch
import torch.nn.functional as F

from pixart_sigma import DEMO
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.sampling.denoise import denoise
from pixart_sigma.sampling.noise import get_noise
from pixart_sigma.transformer.cost import multiply_adds
from pixart_sigma.transformer.hooks import Hooks
from pixart_sigma.transformer.kv_rules import parse, spell
from pixart_sigma.transformer.loading import load_transformer

PROMPTS = (
    "a large yellow star on a blue background",
    "a small red circle in the top left on a green background",
    "a pink square above a cyan triangle on white",
    "a medium black circle on an orange background",
)
STEPS = 20
GUIDANCE = 4.5
CHANNELS, HEADS, HEAD_DIM = 1152, 4, 72
WHITE_NOISE = 0.3  # deviation, where that of the fields is 1
LARGE = (128, 128)
OUTLIERS = 0.05

attention = F.scaled_dot_product_attention


# Every operator is called as operator(layer, query, key, value), where `layer` is a Layer and the others are
# (B, heads, N, head_dim), and returns attention's result. What averages or picks tokens gives the same
# before and after the projections; here it comes after.


class Layer:
    """What an operator knows of where it is: `tokens` (B, N, C) before the projections."""

    def __init__(self, tokens, grid, ratio, index=0, step=0):
        self.tokens, self.grid, self.ratio, self.index, self.step = tokens, grid, ratio, index, step


def windows(tokens, grid, ratio):
    """(..., N, C) -> (..., N / ratio**2, ratio**2, C)."""
    rows, columns = grid[0] // ratio, grid[1] // ratio
    split = tokens.reshape(-1, rows, ratio, columns, ratio, tokens.shape[-1]).transpose(2, 3)
    return split.reshape(*tokens.shape[:-2], rows * columns, ratio**2, tokens.shape[-1])


def averages(tokens, grid, ratio):
    return windows(tokens, grid, ratio).mean(-2)


def from_windows(split, grid, ratio):
    """The inverse of `windows`."""
    rows, columns = grid[0] // ratio, grid[1] // ratio
    picture = split.reshape(-1, rows, columns, ratio, ratio, split.shape[-1]).transpose(2, 3)
    return picture.reshape(*split.shape[:-3], grid[0] * grid[1], split.shape[-1])


def gather(tokens, chosen):
    """Of tokens (B, heads, N, C) those `chosen` (B, M)."""
    chosen = chosen[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[-1])
    return tokens.gather(2, chosen)


def deviations(tokens, grid, ratio):
    """Squared distances of tokens (B, N, C) from their window's mean: (B, windows, ratio**2)."""
    split = windows(tokens, grid, ratio)
    return (split - split.mean(-2, keepdim=True)).square().sum(-1)


def uniform(layer, query, key, value):
    key, value = (windows(x, layer.grid, layer.ratio)[..., 0, :] for x in (key, value))
    return attention(query, key, value)


def alternating_uniform(layer, query, key, value):
    """Another token of the window in each layer and step."""
    offset = (layer.index + layer.step) % layer.ratio**2
    key, value = (windows(x, layer.grid, layer.ratio)[..., offset, :] for x in (key, value))
    return attention(query, key, value)


def interleaved(layer, query, key, value):
    """Queries see the tokens that have their own place in the window, and so themselves."""
    parts = [windows(x, layer.grid, layer.ratio).transpose(-2, -3) for x in (query, key, value)]
    attended = attention(*(part.flatten(0, 1) for part in parts)).reshape(parts[0].shape)
    return from_windows(attended.transpose(-2, -3), layer.grid, layer.ratio)


def mean(layer, query, key, value):
    return attention(query, *(averages(x, layer.grid, layer.ratio) for x in (key, value)))


def shifted_mean(layer, query, key, value):
    """The windows move by one token in every second layer and step; edges average what they have."""
    if (layer.index + layer.step) % 2 == 0:
        return mean(layer, query, key, value)
    batch, heads, _, width = key.shape

    def merge(tokens):
        picture = tokens.flatten(0, 1).unflatten(1, layer.grid).permute(0, 3, 1, 2)
        ahead = layer.ratio - 1
        bottom, right = ((1 - side) % layer.ratio for side in layer.grid)
        pad = (ahead, right, ahead, bottom)
        count = F.avg_pool2d(F.pad(torch.ones_like(picture[:1, :1]), pad), layer.ratio)
        merged = F.avg_pool2d(F.pad(picture, pad), layer.ratio) / count
        return merged.flatten(2).transpose(1, 2).unflatten(0, (batch, heads))

    return attention(query, merge(key), merge(value))


def overlapping_mean(layer, query, key, value):
    """Weights that fall linearly over twice the window, as resizing with antialiasing has."""

    def merge(tokens):
        picture = tokens.flatten(0, 1).unflatten(1, layer.grid).permute(0, 3, 1, 2)
        size = [side // layer.ratio for side in layer.grid]
        merged = F.interpolate(picture, size, mode="bilinear", antialias=True)
        return merged.flatten(2).transpose(1, 2).unflatten(0, tokens.shape[:2])

    return attention(query, merge(key), merge(value))


def long_keys(layer, query, key, value):
    """Averaging shortens keys; these are as long as their members are on average."""
    merged = averages(key, layer.grid, layer.ratio)
    length = windows(key, layer.grid, layer.ratio).norm(dim=-1).mean(-1, keepdim=True)
    merged = merged * length / merged.norm(dim=-1, keepdim=True)
    return attention(query, merged, averages(value, layer.grid, layer.ratio))


def long_tokens(layer, query, key, value):
    """The same before the projections, and so for values too (but for the projections' biases)."""
    length = windows(layer.tokens, layer.grid, layer.ratio).norm(dim=-1).mean(-1)
    longer = (length / averages(layer.tokens, layer.grid, layer.ratio).norm(dim=-1))[:, None, :, None]
    key, value = (averages(x, layer.grid, layer.ratio) * longer for x in (key, value))
    return attention(query, key, value)


def variance_bias(layer, query, key, value):
    """The mean of exp(q k) is exp(q mean(k) + |q|**2 var(k) / 2) to second order, for isotropic variance."""
    split = windows(key, layer.grid, layer.ratio)
    variance = split.var(-2, unbiased=False).mean(-1, keepdim=True)
    scale = query.shape[-1] ** -0.5
    queries = torch.cat([query, query.square().sum(-1, keepdim=True) * scale / 2], dim=-1)
    keys = torch.cat([split.mean(-2), variance], dim=-1)
    return attention(queries, keys, averages(value, layer.grid, layer.ratio), scale=scale)


def variance_per_channel(layer, query, key, value):
    """The same for a variance of each channel, which doubles the queries' and keys' width."""
    split = windows(key, layer.grid, layer.ratio)
    scale = query.shape[-1] ** -0.5
    queries = torch.cat([query, query.square() * scale / 2], dim=-1)
    keys = torch.cat([split.mean(-2), split.var(-2, unbiased=False)], dim=-1)
    return attention(queries, keys, averages(value, layer.grid, layer.ratio), scale=scale)


def picking(choose, for_keys=True, for_values=True):
    """One token of each window, chosen before the projections; keys or values may be the mean instead."""

    def operator(layer, query, key, value):
        chosen = choose(layer)

        def pick(tokens):
            split = windows(tokens, layer.grid, layer.ratio)
            place = chosen[:, None, :, None, None].expand(-1, split.shape[1], -1, 1, split.shape[-1])
            return split.gather(3, place)[:, :, :, 0]

        def merge(tokens, picked):
            return pick(tokens) if picked else averages(tokens, layer.grid, layer.ratio)

        return attention(query, merge(key, for_keys), merge(value, for_values))

    return operator


def largest(layer):
    return windows(layer.tokens, layer.grid, layer.ratio).norm(dim=-1).argmax(-1)


def most_central(layer):
    return deviations(layer.tokens, layer.grid, layer.ratio).argmin(-1)


def mean_and_outliers(layer, query, key, value):
    """The tokens that are furthest from their window's mean, and the means of the others."""
    distances = deviations(layer.tokens, layer.grid, layer.ratio)
    count = max(1, int(OUTLIERS * distances.shape[1]))
    chosen = distances.flatten(1).topk(count, dim=1).indices
    others = torch.ones_like(distances).flatten(1).scatter(1, chosen, 0).reshape(distances.shape)
    left = others.sum(-1)

    def merge(tokens):
        split = windows(tokens, layer.grid, layer.ratio)
        means = (split * others[:, None, :, :, None]).sum(-2) / left.clamp(min=1)[:, None, :, None]
        return torch.cat([gather(split.flatten(2, 3), chosen), means], dim=2)

    # A key counts as often as it has tokens.
    bias = torch.cat([torch.zeros_like(chosen), left.log()], dim=1)[:, None, None]
    return attention(query, merge(key), merge(value), attn_mask=bias)


def by_detail(layer, query, key, value):
    """Finer where detail is, coarser where not: as many keys as `mean`, chosen before the projections.

    The smoothest half of the blocks of 2 x 2 windows are paired, in order, with the windows of the other half
    that have most detail. Where the window's detail is more than what merging the block would lose, the
    block becomes one key and the window four. Either way a pair has five keys, so that shapes never change.
    """
    grid, ratio, half = layer.grid, layer.ratio, layer.ratio // 2
    cells = grid[0] // ratio, grid[1] // ratio
    quarters = 2 * cells[0], 2 * cells[1]
    lost = deviations(averages(layer.tokens, grid, ratio), cells, 2).sum(-1) * ratio**2
    detail = deviations(averages(layer.tokens, grid, half), quarters, 2).sum(-1) * half**2
    order = lost.argsort(dim=1)
    count = order.shape[1] // 2
    # The numbers of each block's windows.
    members = windows(torch.arange(cells[0] * cells[1])[:, None], cells, 2)[..., 0]
    blocks, members, others = order[:, :count], members[order[:, :count]], members[order[:, count:]]
    others = others.flatten(1)
    others = others.gather(1, detail.gather(1, others).argsort(dim=1, descending=True))
    rich, kept = others[:, :count], others[:, count:]
    swapped = detail.gather(1, rich) > lost.gather(1, blocks)

    def merge(tokens):
        means = averages(tokens, grid, ratio)
        split = windows(averages(tokens, grid, half), quarters, 2).flatten(3)
        choice = swapped[:, None, :, None]
        one = torch.where(choice, gather(averages(tokens, grid, 2 * ratio), blocks), gather(means, rich))
        four = gather(means, members.flatten(1)).reshape(*one.shape[:3], -1)
        four = torch.where(choice, gather(split, rich), four).unflatten(-1, (4, -1)).flatten(2, 3)
        return torch.cat([one, four, gather(means, kept)], dim=2)

    # A key counts as often as it has tokens, against the windows that are as they were.
    more = swapped * math.log(4)
    bias = torch.cat([more, -more.repeat_interleave(4, dim=1), torch.zeros_like(kept)], dim=1)
    return attention(query, merge(key), merge(value), attn_mask=bias[:, None, None])


def nested(block, near, middle=None):
    """Each block x block queries see exactly what lies up to `near` tokens around them, and means beyond; and
    means of twice the ratio further than `middle` tokens. One softmax over all of them."""

    def regions(grid, ratio):
        """For each block its queries' numbers, its keys' numbers and their bias, of tokens, means, means."""
        rows, columns = grid

        def inside(top, left, margin, cell):
            """The cells that touch the block and its margin, as a mask of tokens."""
            mask = torch.zeros(grid, dtype=torch.bool)
            spans = [
                slice(max(0, (start - margin) // cell * cell), -(-(start + block + margin) // cell) * cell)
                for start in (top, left)
            ]
            mask[spans[0], spans[1]] = True
            return mask

        for top in range(0, rows, block):
            for left in range(0, columns, block):
                queries = inside(top, left, 0, 1).flatten().nonzero()[:, 0]
                exact = inside(top, left, near, ratio)
                around = torch.ones_like(exact)
                if middle is not None:
                    around = inside(top, left, middle, 2 * ratio) | exact
                masks = exact, (around & ~exact)[::ratio, ::ratio], ~around[:: 2 * ratio, :: 2 * ratio]
                sizes = 1, ratio**2, 4 * ratio**2
                counts = [int(mask.sum()) for mask in masks]
                bias = [
                    torch.full((count,), math.log(size)) for count, size in zip(counts, sizes, strict=True)
                ]
                keys = torch.cat([mask.flatten() for mask in masks]).nonzero()[:, 0]
                yield queries, keys, torch.cat(bias)[None, None, None]

    def operator(layer, query, key, value):
        def levels(tokens):
            coarse = (averages(tokens, layer.grid, layer.ratio * times) for times in (1, 2))
            return torch.cat([tokens, *coarse], dim=2)

        keys, values = levels(key), levels(value)
        attended = torch.empty_like(query)
        for queries, chosen, bias in regions(layer.grid, layer.ratio):
            attended[:, :, queries] = attention(
                query[:, :, queries], keys[:, :, chosen], values[:, :, chosen], attn_mask=bias
            )
        return attended

    def count_keys(grid, ratio):
        counts = [len(keys) * len(queries) for queries, keys, _ in regions(grid, ratio)]
        return sum(counts) / (grid[0] * grid[1])

    operator.count_keys = count_keys
    return operator


def windows_of(grid, ratio):
    return grid[0] // ratio * (grid[1] // ratio)


OPERATORS = {
    "uniform": uniform,
    "uniform, another token in each layer and step": alternating_uniform,
    "uniform, queries see their own place": interleaved,
    "mean": mean,
    "mean, windows shifted in every second layer and step": shifted_mean,
    "mean, overlapping": overlapping_mean,
    "mean, tokens as long as their members": long_tokens,
    "mean, keys as long as their members": long_keys,
    "mean, keys' variance as a bias": variance_bias,
    "mean, keys' variance of each channel": variance_per_channel,
    "token of largest norm": picking(largest),
    "token nearest to the mean": picking(most_central),
    "keys nearest to the mean, values mean": picking(most_central, for_values=False),
    "keys mean, values nearest to the mean": picking(most_central, for_keys=False),
    "mean and 5 % outliers": mean_and_outliers,
    "by detail": by_detail,
    "own window exact, mean elsewhere": None,
    "own 4x4 tokens exact, mean to 4, coarser beyond": nested(4, 0, 4),
    "own 4x4 and 2 around exact, mean to 4, coarser beyond": nested(4, 2, 4),
}
# Those that need the keys of all tokens projected.
PROJECTS_ALL = (interleaved, long_keys, variance_bias, variance_per_channel)


def choose_operators(ratio, only):
    operators = OPERATORS | {"own window exact, mean elsewhere": nested(ratio, 0)}
    return {name: operators[name] for name in only or operators}


def count_keys(operator, grid, ratio) -> float:
    """How many keys a query attends to, those of twice the width counted as what they cost."""
    if hasattr(operator, "count_keys"):
        return operator.count_keys(grid, ratio)
    if operator is shifted_mean:
        # A moved grid has one row and one column of windows more.
        moved = windows_of([side + ratio for side in grid], ratio)
        return (windows_of(grid, ratio) + moved) / 2
    share = {mean_and_outliers: 1 + OUTLIERS, variance_per_channel: 1.5}.get(operator, 1)
    return windows_of(grid, ratio) * share


def cost(operator, grid, ratio) -> float:
    """Multiply-adds of a self-attention of the real width, over tokens and channels."""
    kept = count_keys(operator, grid, ratio)
    everything = operator in PROJECTS_ALL or hasattr(operator, "count_keys")
    projected = 1 if everything else kept / (grid[0] * grid[1])
    return 2 * CHANNELS * (1 + projected) + 2 * kept


class Compressed(Hooks):
    """Puts an operator in the place of self-attention, in one call of the transformer."""

    def __init__(self, operator, ratio, grid, step):
        self.operator, self.ratio, self.grid, self.step = operator, ratio, grid, step

    def run_block(self, block, hidden_states, prompt_embeds, call):
        self.index = call.index
        return super().run_block(block, hidden_states, prompt_embeds, call)

    def before_attention(self, name, queries, keys, values):
        self.name, self.tokens = name, keys
        return queries, keys, values

    def attend(self, attention, query, key, value, attn_mask):
        if self.name == "attn2":
            return super().attend(attention, query, key, value, attn_mask)
        layer = Layer(self.tokens, self.grid, self.ratio, self.index, self.step)
        return self.operator(layer, query, key, value)


class Spread(Hooks):
    """Measures how evenly the rows of self-attention are spread: 1 is evenly, 0 is over one token."""

    def __init__(self):
        self.seen = []

    def before_attention(self, name, queries, keys, values):
        self.name = name
        return queries, keys, values

    def attend(self, attention, query, key, value, attn_mask):
        if self.name == "attn1":
            self.seen.append(spread_of(query, key))
        return super().attend(attention, query, key, value, attn_mask)


def spread_of(query, key) -> float:
    rows = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).log_softmax(-1)
    return float(-(rows.exp() * rows).sum(-1).mean()) / math.log(key.shape[2])


def guided(noise):
    negative, positive = noise.chunk(2)
    return negative + GUIDANCE * (positive - negative)


def relative(actual, expected) -> float:
    return float((actual - expected).norm() / expected.norm())


class Demo:
    """Uncompressed runs of the demo model, to compare others with."""

    def __init__(self, size, prompts, every):
        self.transformer = load_transformer(DEMO)
        self.size, self.grid, self.every = size, (size // 16, size // 16), every
        pipeline = SigmaPipeline.from_path("demo")
        self.runs, spreads = [], []
        for seed, prompt in enumerate(PROMPTS[:prompts]):
            encoded = pipeline.encode_prompts(prompt)
            embeds, negative = encoded.positive, encoded.negative
            noise = get_noise(1, size, size, seed)
            calls = []
            latents = self.run(noise, embeds, negative, lambda step: {}, calls)
            self.runs.append((noise, embeds, negative, calls, latents))
            for arguments, _ in calls[2::5]:
                hooks = Spread()
                self.transformer(*arguments, hooks=hooks)
                spreads.append(hooks.seen)
        self.spreads = torch.tensor(spreads).mean(0).tolist()

    def run(self, noise, embeds, negative, settings, calls):
        """The latents of a run; each call's arguments and result are added to `calls`."""

        def predict(latents, timestep, embeds, mask, kv_compression):
            arguments = latents, timestep, embeds, mask
            calls.append((arguments, self.transformer(*arguments, **settings(len(calls)))))
            return calls[-1][1]

        return denoise(predict, noise, embeds, negative_embeds=negative, steps=STEPS, guidance_scale=GUIDANCE)

    def measure(self, settings) -> list[float]:
        """Errors of the noise for the prompt, of the guided noise, and of the latents. `settings(step)` are
        the transformer's further arguments."""
        found = []
        for noise, embeds, negative, calls, latents in self.runs:
            single = []
            for step in range(self.every // 2, STEPS, self.every):
                arguments, expected = calls[step]
                predicted = self.transformer(*arguments, **settings(step))
                positive = relative(predicted.chunk(2)[1], expected.chunk(2)[1])
                single.append((positive, relative(guided(predicted), guided(expected))))
            whole = relative(self.run(noise, embeds, negative, settings, []), latents)
            found.append([*torch.tensor(single).mean(0).tolist(), whole])
        return torch.tensor(found).mean(0).tolist()


def smooth_fields(count, grid, random):
    """Fields (count, rows, columns) of unit deviation, whose amplitude falls with the frequency."""
    rows, columns = grid
    frequency = torch.hypot(torch.fft.fftfreq(rows)[:, None], torch.fft.rfftfreq(columns)[None])
    frequency[0, 0] = 1 / max(grid)
    spectrum = torch.fft.rfft2(torch.randn(count, rows, columns, generator=random)) / frequency
    fields = torch.fft.irfft2(spectrum, s=grid)
    return (fields - fields.mean((1, 2), keepdim=True)) / fields.std((1, 2), keepdim=True)


def natural_tokens(grid, uneven, random):
    """Tokens (1, N, C): smooth fields and white noise, which varies over the picture if `uneven`."""
    fields = smooth_fields(CHANNELS, grid, random)
    white = WHITE_NOISE * torch.randn(CHANNELS, *grid, generator=random)
    if uneven:
        white = white * smooth_fields(1, grid, random).exp()
    return F.layer_norm((fields + white).flatten(1).T[None], (CHANNELS,))


def measure_width(operators, ratio, side, related, uneven, spread) -> list[float]:
    """Each operator's error of one self-attention over side x side tokens, averaged over two layers."""
    random = torch.Generator().manual_seed(side)
    tokens = natural_tokens((side, side), uneven, random)
    to_q, to_k, to_v = (
        torch.randn(CHANNELS, HEADS * HEAD_DIM, generator=random) / CHANNELS**0.5 for _ in range(3)
    )
    if related:
        to_k = (to_q + to_k) / 2**0.5
    query, key, value = (
        (tokens @ weight).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for weight in (to_q, to_k, to_v)
    )
    sample = query[:, :, :: side * side // 64]
    low, high = 0.01, 100.0
    while high / low > 1.01:
        scale = (low * high) ** 0.5
        if spread_of(sample * scale, key) > spread:
            low = scale
        else:
            high = scale
    query = query * scale
    expected = attention(query, key, value)
    errors = []
    for operator in operators:
        alternates = operator in (alternating_uniform, shifted_mean)
        layers = [Layer(tokens, (side, side), ratio, index) for index in range(1 + alternates)]
        found = [relative(operator(layer, query, key, value), expected) for layer in layers]
        errors.append(sum(found) / len(found))
    return errors


def print_row(cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def print_header(cells):
    print_row(cells)
    print_row(["---"] * len(cells))


def compare_operators(demo, ratio, operators):
    mean_spread = sum(demo.spreads) / len(demo.spreads)
    wide = [
        measure_width(operators.values(), ratio, *statistics, mean_spread)
        for statistics in ((32, False, False), (32, True, False), (64, False, False), (64, False, True))
    ]
    print_header(
        ["operator", "keys", "cost", "noise", "guided noise", "under uniform", "latents"]
        + ["1024 tokens, unrelated", "related", "4096 tokens, unrelated", "uneven"]
    )
    base = None
    for row, (name, operator) in enumerate(operators.items()):
        noise, both, latents = demo.measure(
            lambda step, operator=operator: {"hooks": Compressed(operator, ratio, demo.grid, step)}
        )
        base = base or both
        keys = count_keys(operator, demo.grid, ratio) / windows_of(demo.grid, ratio)
        cells = [name, f"{keys:.2f}", f"{cost(operator, LARGE, ratio) / cost(mean, LARGE, ratio):.2f}"]
        cells += [f"{noise:.2%}", f"{both:.2%}", f"{1 - both / base:.0%}", f"{latents:.2%}"]
        print_row(cells + [f"{errors[row]:.2%}" for errors in wide])


def compare_rules(demo):
    """Where to spend the saving that ratio 2 makes on the deeper half of the layers in all steps."""
    config = demo.transformer.sigma_config
    depth = config.num_layers
    count = depth - depth // 2
    share = 100 * count / depth
    shares = {2: share, 4: share * (1 - 1 / 4) / (1 - 1 / 16)}
    second = ",".join(map(str, range(0, depth, 2)))
    settings = ["uniform:2:deep", "mean:2:deep", f"mean:2:0-{count - 1}", f"mean:2:{second}"]
    settings += [f"mean:2:all:0-{shares[2]:g}%", f"mean:2:all:{100 - shares[2]:g}-100%"]
    settings += [f"mean:4:all:0-{shares[4]:g}%", f"mean:4:all:{100 - shares[4]:g}-100%"]
    # Ratio 4 saves 15/16 of a layer's attention where ratio 2 saves 3/4, and so takes 4/5 of the steps.
    settings += ["mean:4:deep:0-80%", "mean:4:deep:20-100%"]

    side = LARGE[0] * 16
    timesteps = [float(arguments[1]) for arguments, _ in demo.runs[0][3]]
    print_header(["rule", "multiply-adds at 2048x2048", "noise", "guided noise", "latents"])
    for setting in settings:
        rules = parse(setting, depth)
        counts = [multiply_adds(config, side, side, 20, rules, timestep) for timestep in timesteps]
        share = sum(counts) / len(counts) / multiply_adds(config, side, side, 20)
        errors = demo.measure(lambda step, rules=rules: {"kv_compression": rules})
        print_row([f"`{spell(rules)}`", f"{share:.3f}", *(f"{error:.2%}" for error in errors)])


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ratio", type=int, choices=(2, 4), default=2)
    parser.add_argument("--size", type=int, choices=(256, 512), default=256, help="of the demo's pictures")
    parser.add_argument("--prompts", type=int, choices=range(1, len(PROMPTS) + 1), default=3)
    parser.add_argument("--every", type=int, default=3, help="measure the noise at each so many steps")
    parser.add_argument("--only", nargs="+", choices=OPERATORS, help="these operators, by their names")
    parser.add_argument("--tables", nargs="+", choices=("operators", "rules"), default=("operators", "rules"))
    arguments = parser.parse_args()

    demo = Demo(arguments.size, arguments.prompts, arguments.every)
    spreads = ", ".join(f"{spread:.2f}" for spread in demo.spreads)
    print(f"Ratio {arguments.ratio}, demo at {arguments.size}x{arguments.size}, {arguments.prompts} prompts.")
    print(f"Its attention's spread, layer by layer: {spreads}\n")
    if "operators" in arguments.tables:
        compare_operators(demo, arguments.ratio, choose_operators(arguments.ratio, arguments.only))
        print()
    if "rules" in arguments.tables:
        compare_rules(demo)


if __name__ == "__main__":
    main()
