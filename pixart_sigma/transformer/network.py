"""The PixArt-Sigma transformer: diffusers' PixArtTransformer2DModel with its own forward pass.

Modules and state-dict keys are diffusers', so are the results (and the original network's, for original
keys); on top of that it takes any latent size, embeddings of any length with an optional mask, and KV
compression per call.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock

from ..errors import SigmaError
from .attention import SigmaAttnProcessor, torch_attention
from .attention_guidance import NormalizedAttentionGuidance
from .config import TransformerConfig
from .cost import MLP_BYTES
from .hooks import NO_HOOKS, BlockCall, Hooks
from .kv_rules import KVCompression, acting, resolve

LAYER_CLASSES = (
    "Linear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose2d",
    "LayerNorm",
    "GroupNorm",
    "Embedding",
)
CACHED_SIZES = 8
_swap_lock = threading.RLock()


class SigmaBlock(BasicTransformerBlock):
    """One transformer block: self-attention, cross-attention and MLP, modulated by the timestep."""

    def forward(self, hidden_states: torch.Tensor, prompt_embeds: torch.Tensor, call: BlockCall):
        """hidden_states (B, N, C), prompt_embeds (B, L, C) -> hidden_states (B, N, C)."""
        modulation = call.modulation.unflatten(-1, (6, -1))
        modulation = self.scale_shift_table.to(modulation)[None] + modulation
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        tokens = modulate(self.norm1(hidden_states), shift_msa, scale_msa)
        tokens = self.attn1(tokens, call=call)
        hidden_states = torch.addcmul(hidden_states, gate_msa, tokens)
        del tokens  # the MLP's hidden state is the peak: one tensor of tokens is a twelfth of it
        # PixArt reads the prompt from the tokens as they are, without a norm.
        hidden_states = hidden_states + self.attn2(
            hidden_states, encoder_hidden_states=prompt_embeds, attention_mask=call.prompt_bias, call=call
        )
        fed = feed_forward(self.ff, modulate(self.norm2(hidden_states), shift_mlp, scale_mlp))
        return torch.addcmul(hidden_states, gate_mlp, fed)


class SigmaTransformer(PixArtTransformer2DModel):
    """The denoiser, made by `load_transformer` or `build_transformer`; `sigma_config` says of what shape."""

    _supports_gradient_checkpointing = False
    _no_split_modules = ["SigmaBlock", "PatchEmbed"]

    def __init__(self, config: TransformerConfig, attention=torch_attention):
        super().__init__(**config.to_diffusers())
        self.sigma_config = config
        self._positions: OrderedDict[tuple, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        # diffusers' table is for one size and lost on the meta device: `embed_positions` replaces it.
        self.pos_embed.pos_embed = None
        trained = config.kv_compression
        for index, block in enumerate(self.transformer_blocks):
            block.__class__ = SigmaBlock
            attn, width = block.attn1, self.inner_dim
            if config.qk_norm:
                attn.norm_q, attn.norm_k = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
            if trained is not None and index in trained.layers:
                attn.sr = torch.nn.Conv2d(width, width, trained.ratio, stride=trained.ratio, groups=width)
                attn.norm = torch.nn.LayerNorm(width)
        self.set_attn_processor(SigmaAttnProcessor(attention))

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor | float,
        prompt_embeds: torch.Tensor,
        prompt_mask: torch.Tensor | None = None,
        kv_compression: str | tuple[KVCompression, ...] | None = None,
        hooks: Hooks = NO_HOOKS,
        *,
        prompt_projected: bool = False,
        nag_scale: float | None = None,
    ) -> torch.Tensor:
        """Predict the noise in `latents`.

        latents (B, 4, h, w) of any h and w from 1; sizes off the patch grid are continued at the right and
        bottom by their last column and row, and cropped back. timestep 0 to 999, one or (B,). prompt_embeds
        (B, L, channels) of any L from 1. prompt_mask (B, L), True or 1 for real tokens; None when all are,
        which is the fast path. kv_compression: rules or their spelling, none of them for no compression; None
        is as the checkpoint was trained (not at all, for all public ones). hooks: what to change on the way.
        prompt_projected: prompt_embeds are what `project_prompt` made of them. nag_scale: prompt_embeds and
        prompt_mask have 2 B rows, negative prompts first, and attention to the prompt is guided, see
        `NormalizedAttentionGuidance`. Settings hold for this call alone. Returns the predicted noise
        (B, 4, h, w); the learned-variance channels are dropped.
        Raises SigmaError if shapes or the compression do not fit this transformer.
        """
        timestep = torch.as_tensor(timestep, device=latents.device).reshape(-1)
        prompts = len(latents)
        if nag_scale is not None:
            prompts, hooks = 2 * prompts, NormalizedAttentionGuidance(hooks, nag_scale)
        self._check_latents(latents, timestep)
        if not prompt_projected:
            prompt_embeds = self.project_prompt(prompt_embeds)
        self._check_prompt(prompts, prompt_embeds, prompt_mask)
        rules = resolve(kv_compression, self.sigma_config, 8 * latents.shape[-2], 8 * latents.shape[-1])
        # Reading the timestep waits for the device.
        now = float(timestep[0]) if any(rule.windowed for rule in rules) else 0.0

        patch, (height, width) = self.config.patch_size, latents.shape[-2:]
        grid = (-(-height // patch), -(-width // patch))
        hooks.start(self, latents)
        hidden_states = self.embed(latents)
        modulation, embedded_timestep = self.adaln_single(timestep, hidden_dtype=hidden_states.dtype)
        prompt_bias = None
        if prompt_mask is not None:
            prompt_bias = ((1 - prompt_mask.to(hidden_states)) * -10000.0)[:, None, None]
        for index, block in enumerate(self.visit_blocks()):
            call = BlockCall(index, grid, modulation, prompt_bias, acting(rules, index, now), hooks)
            hidden_states, prompt_embeds = hooks.run_block(block, hidden_states, prompt_embeds, call)
        return self._predict_noise(hidden_states, embedded_timestep, grid)[..., :height, :width]

    def project_prompt(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """prompt_embeds (B, L, channels) -> the tokens (B, L, C) that every block reads.

        They depend on the prompt alone: whoever calls for many steps makes them once, and says so by
        `prompt_projected`. Raises SigmaError for embeddings of another width.
        """
        channels = self.config.caption_channels or self.config.cross_attention_dim
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[-1] != channels or 0 in prompt_embeds.shape:
            raise SigmaError(
                f"Prompt embeddings must be (B, tokens, {channels}) for this transformer, not "
                f"{tuple(prompt_embeds.shape)}. Encode the prompt with the text encoder that belongs to it."
            )
        return prompt_embeds if self.caption_projection is None else self.caption_projection(prompt_embeds)

    def embed(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, 4, h, w) -> tokens with their positions (B, N, C), of N = rows * columns patches."""
        patch, (height, width) = self.config.patch_size, latents.shape[-2:]
        if height % patch or width % patch:
            latents = F.pad(latents, (0, -width % patch, 0, -height % patch), mode="replicate")
        grid = (latents.shape[-2] // patch, latents.shape[-1] // patch)
        return self.embed_positions(self.pos_embed(latents), grid)

    def _predict_noise(self, hidden_states, embedded_timestep, grid: tuple[int, int]) -> torch.Tensor:
        """Tokens (B, N, C) after the last block -> the noise in the padded latents (B, 4, h, w)."""
        shift, scale = (
            self.scale_shift_table.to(embedded_timestep)[None] + embedded_timestep[:, None]
        ).chunk(2, 1)
        hidden_states = self.proj_out(modulate(self.norm_out(hidden_states), shift, scale))
        patch, channels = self.config.patch_size, self.config.in_channels
        patches = hidden_states.unflatten(-1, (patch, patch, self.out_channels)).unflatten(1, grid)
        if self.out_channels // 2 == channels:
            patches = patches[..., :channels]
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def visit_blocks(self) -> Iterable[SigmaBlock]:
        """The blocks in turn, each with its weights on the device for as long as it is the current one."""
        return self.transformer_blocks

    def embed_positions(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Add the 2-D sine-cosine positions to tokens (B, N, C), N = rows * columns of the grid.

        One half of the channels depends on the column alone and the other on the row alone, so only the two
        factors are kept, once per size, and the (N, C) table (300 MB at 4096x4096) is never made. They stay
        in float32, and the sum is rounded to the tokens' dtype.
        """
        key = (*grid, tokens.device)
        if key not in self._positions:
            patches = self.pos_embed
            rows, columns = get_positions(
                *grid, tokens.shape[-1], patches.base_size, patches.interpolation_scale
            )
            self._positions[key] = rows.to(tokens.device), columns.to(tokens.device)
            if len(self._positions) > CACHED_SIZES:
                self._positions.popitem(last=False)
        rows, columns = self._positions[key]
        by_column, by_row = tokens.unflatten(1, grid).chunk(2, dim=-1)
        placed = [(by_column + columns).to(tokens.dtype), (by_row + rows[:, None]).to(tokens.dtype)]
        return torch.cat(placed, dim=-1).flatten(1, 2)

    def _check_latents(self, latents, timestep):
        if latents.ndim != 4 or latents.shape[1] != self.config.in_channels or 0 in latents.shape:
            raise SigmaError(
                f"Latents must be (B, {self.config.in_channels}, height, width), not {tuple(latents.shape)}."
            )
        if len(timestep) not in (1, len(latents)):
            raise SigmaError(f"There are {len(latents)} latents but {len(timestep)} timesteps.")

    def _check_prompt(self, count, tokens, prompt_mask):
        if tokens.ndim != 3 or tokens.shape[-1] != self.inner_dim:
            raise SigmaError(
                f"A projected prompt must be (B, tokens, {self.inner_dim}) for this transformer, as "
                f"project_prompt makes it, not {tuple(tokens.shape)}."
            )
        if len(tokens) != count:
            raise SigmaError(f"These latents need {count} prompt embeddings, and there are {len(tokens)}.")
        if prompt_mask is not None and prompt_mask.shape != tokens.shape[:2]:
            raise SigmaError(
                f"The prompt mask must be {tuple(tokens.shape[:2])} as the embeddings are, "
                f"not {tuple(prompt_mask.shape)}."
            )


def feed_forward(mlp, tokens: torch.Tensor) -> torch.Tensor:
    """mlp(tokens), both (B, N, C); in runs of tokens whose fourfold hidden state is at most MLP_BYTES."""
    batch, count, channels = tokens.shape
    run = max(1, MLP_BYTES // (batch * 4 * channels * tokens.element_size()))
    if count <= run:
        return mlp(tokens)
    fed = torch.empty_like(tokens)
    for start in range(0, count, run):
        fed[:, start : start + run] = mlp(tokens[:, start : start + run])
    return fed


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (B, N, C) * (1 + scale) + shift, both (B or 1, 1, C), as in DiT (arXiv 2212.09748)."""
    return torch.addcmul(shift, x, 1 + scale)


def get_positions(
    height: int, width: int, dim: int, base_size: int, interpolation_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sine-cosine positions of a patch grid, float32: per row (height, dim / 2), per column (width, dim / 2).

    Positions span 0 to base_size / interpolation_scale at every size; sines and cosines are taken in
    float64. Equal to diffusers' `get_2d_sincos_pos_embed`, whose first half of the channels is the
    column's.
    """
    omega = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim / 4))

    def embed(count):
        # The coordinates are float32 in the network's training code, and so part of its definition.
        steps = torch.arange(count, dtype=torch.float32, device="cpu") / (count / base_size)
        angles = torch.outer((steps / interpolation_scale).double(), omega)
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    return embed(height), embed(width)


@contextmanager
def layer_classes(operations):
    """Within this block torch.nn's layer classes are those of `operations`, as far as it has them."""
    with _swap_lock:
        originals = {name: getattr(torch.nn, name) for name in LAYER_CLASSES if hasattr(operations, name)}
        try:
            for name in originals:
                setattr(torch.nn, name, getattr(operations, name))
            yield
        finally:
            for name, original in originals.items():
                setattr(torch.nn, name, original)


def build_transformer(
    config: TransformerConfig, operations=torch.nn, attention=torch_attention
) -> SigmaTransformer:
    """The transformer without weights (on the meta device), of the layer classes of `operations`.

    `attention(q, k, v, attn_mask=None)` works on (B, heads, tokens, head_dim). Give it
    weights with `load_state_dict(..., assign=True)`: nothing can be copied into a tensor on the meta device.
    """
    with layer_classes(operations), torch.device("meta"):
        return SigmaTransformer(config, attention)
