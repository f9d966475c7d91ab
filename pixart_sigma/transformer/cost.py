"""What a forward pass costs, predicted from the transformer's shape: multiply-adds, and bytes at its peak."""

from .config import TransformerConfig
from .kv_rules import KVCompression, acting

# The MLP's hidden state is four times the tokens: 1.2 GB of bf16 for two pictures of 4096x4096.
MLP_BYTES = 2**27


def activation_bytes(
    config: TransformerConfig,
    batch: int,
    height: int,
    width: int,
    prompt_tokens: int,
    itemsize: int,
    controlnets: int = 0,
) -> int:
    """Bytes that a forward pass needs at its peak for what it computes, the weights apart.

    Of latents (batch, 4, height, width) and embeddings (batch, prompt_tokens, C), all in a dtype of itemsize
    bytes. The peak is a block's MLP: what came into the block, the block's sum so far, the MLP's input, and
    its fourfold hidden state before and after the GELU. Of a large picture the MLP takes a part at a time;
    then its output is another one, and the self-attention may be the peak: what came in, its input, queries,
    keys, values, and its result. Beside them the prompt, as it came and projected; and with ControlNets the
    tokens of each of them, and the transformer's as they were and with what was added.
    """
    patch, channels = config.patch_size, config.cross_attention_dim
    tokens = batch * -(-height // patch) * -(-width // patch) * channels
    hidden = MLP_BYTES // itemsize
    numbers = 11 * tokens if 4 * tokens <= hidden else max(4 * tokens + 2 * hidden, 6 * tokens)
    numbers += (controlnets + 2) * tokens if controlnets else 0
    return (numbers + batch * prompt_tokens * (config.caption_channels + channels)) * itemsize


def multiply_adds(
    config: TransformerConfig,
    height: int,
    width: int,
    prompt_tokens: int,
    rules: tuple[KVCompression, ...] = (),
    timestep: float = 0,
) -> int:
    """Multiply-adds of one forward pass of one picture of height x width pixels, attention included.

    Matrix products and convolutions only; norms, activations and sums of tensors are left out, and so is the
    prompt's projection, which is made once for all passes of a run.
    """
    patch, channels = config.patch_size, config.cross_attention_dim
    rows, columns = -(-height // (8 * patch)), -(-width // (8 * patch))
    tokens = rows * columns
    square = channels**2
    total = tokens * channels * patch**2 * (config.in_channels + config.out_channels)
    total += 7 * square + 256 * channels
    for layer in range(config.num_layers):
        rule = acting(rules, layer, timestep)
        kept = tokens if rule is None else count_tokens(rule, (rows, columns))
        projected = tokens if rule is None or rule.operator == "conv" else kept
        total += 12 * tokens * square + 2 * projected * square + 2 * prompt_tokens * square
        total += 2 * tokens * (kept + prompt_tokens) * channels
        if rule is not None and kept < tokens == projected:
            total += 2 * kept * rule.ratio**2 * channels
    return total


def count_tokens(rule: KVCompression, grid: tuple[int, int]) -> int:
    """How many of a grid's tokens are left of keys and values."""
    rows, columns = grid
    if rule.operator == "uniform_every":
        return -(-rows * columns // rule.ratio)
    if rule.operator not in ("conv", "ave"):
        return -(-rows // rule.ratio) * -(-columns // rule.ratio)
    return (rows // rule.ratio) * (columns // rule.ratio) if min(grid) >= rule.ratio else rows * columns
