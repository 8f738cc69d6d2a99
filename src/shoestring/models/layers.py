"""Layers the transformers share: norms, attention, feed-forward, modulation, positions, time embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]


def layer_norm(size: int) -> nn.LayerNorm:
    """LayerNorm with a weight and no bias, as everywhere in the published network."""
    return nn.LayerNorm(size, eps=1e-6, bias=False)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) scaled and shifted by per-image vectors (B, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def round_up(value: float, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return multiple * math.ceil(value / multiple)


# --- positions -------------------------------------------------------------------------------------------


def grid_positions(height: int, width: int, scale: float, device: torch.device) -> Tensor:
    """(row, column) of each token of a grid, divided by `scale`: (1, height * width, 2) float32."""
    rows = torch.arange(height, device=device, dtype=torch.float32) / scale
    columns = torch.arange(width, device=device, dtype=torch.float32) / scale
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).view(1, -1, 2)


def sincos_positions(positions: Tensor, size: int) -> Tensor:
    """Fixed 2-D embedding, (B, N, 2) -> (B, N, size): first half from the column, second from the row.

    Each half is [sin | cos] with frequencies 10000^(-2k / (size / 2)).
    """
    quarter = size // 4
    exponents = torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter
    frequencies = (10000.0**-exponents).float().to(positions.device)
    row, column = (positions[..., axis, None] * frequencies for axis in (0, 1))
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=-1)


def rotary_angles(positions: Tensor, head_dim: int, theta: float = 100.0) -> Tensor:
    """Rotary angles for positions with A axes: (B, N, A) -> (B, N, head_dim / 2).

    The pairs of a head are shared out evenly between the axes; `theta` is the longest period over 2 pi.
    """
    axes = positions.shape[-1]
    pairs = head_dim // 2 // axes
    exponents = torch.arange(pairs, device=positions.device, dtype=torch.float32) / pairs
    angles = positions[..., None] * theta**-exponents  # (B, N, A, pairs)
    return F.pad(angles.flatten(-2), (0, head_dim // 2 - pairs * axes))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair (x_k, x_{k + d/2}) of every head by its angle: (B, N, H, d), (B, N, d / 2)."""
    cos, sin = angles.cos()[:, :, None].to(x.dtype), angles.sin()[:, :, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TimeEmbedding(nn.Module):
    """c_noise (B,) -> (B, D): sinusoid [cos | sin] of `num_channels`, Linear, GELU(tanh), Linear."""

    def __init__(self, size: int, num_channels: int = 512) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.linear_1 = nn.Linear(num_channels, size)
        self.linear_2 = nn.Linear(size, size)

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.num_channels // 2
        exponents = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
        angles = timestep.float()[:, None] * 10000.0**-exponents
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        hidden = self.linear_1(sinusoid.to(self.linear_1.weight.dtype))
        return self.linear_2(F.gelu(hidden, approximate="tanh"))


# --- attention -------------------------------------------------------------------------------------------


class AttentionProcessor:
    """Runs an `Attention` through diffusers' dispatcher, so that its attention backends apply."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary: Tensor | None = None,
        key_value: KeyValue | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        key, value = attn.project_context(context, rotary) if key_value is None else key_value
        attended = dispatch_attention_fn(
            attn.project_query(hidden_states, rotary),
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](attended.flatten(2))


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head attention with normalised queries and keys; heads of `head_dim`, width `inner_size`.

    `qk_norm="hidden"` is the published form: LayerNorm without weights over the whole width, before the
    split into heads. `"head"` is an RMSNorm with weights within each head.
    """

    _default_processor_cls = AttentionProcessor
    _available_processors = [AttentionProcessor]
    processor: AttentionProcessor
    set_processor: Callable[[AttentionProcessor], None]
    norm_q: nn.RMSNorm | nn.LayerNorm
    norm_k: nn.RMSNorm | nn.LayerNorm
    to_qkv: nn.Linear  # these two where diffusers' fuse_projections made them
    to_kv: nn.Linear

    def __init__(
        self,
        size: int,
        inner_size: int,
        head_dim: int,
        *,
        context_size: int | None = None,
        bias: bool = False,
        qk_norm: str = "hidden",
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.heads = inner_size // head_dim
        self.is_cross_attention = context_size is not None
        self.use_bias = bias
        self.per_head_norm = qk_norm == "head"
        self.to_q = nn.Linear(size, inner_size, bias=bias)
        self.to_k = nn.Linear(context_size or size, inner_size, bias=bias)
        self.to_v = nn.Linear(context_size or size, inner_size, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner_size, size, bias=bias)])
        for name in ("norm_q", "norm_k"):
            norm = (
                nn.RMSNorm(head_dim, eps=1e-6)
                if self.per_head_norm
                else nn.LayerNorm(inner_size, eps=1e-6, elementwise_affine=False)
            )
            self.add_module(name, norm)
        self.set_processor(AttentionProcessor())

    def project_query(self, hidden_states: Tensor, rotary: Tensor | None) -> Tensor:
        """(B, N, D) -> (B, N, H, head_dim), normalised and turned."""
        if self.fused_projections and not self.is_cross_attention:
            query = self.to_qkv(hidden_states).chunk(3, dim=-1)[0]
        else:
            query = self.to_q(hidden_states)
        return self._heads(query, self.norm_q, rotary)

    def project_context(self, context: Tensor, rotary: Tensor | None = None) -> KeyValue:
        """Keys and values of what is attended to, each (B, L, H, head_dim)."""
        if self.fused_projections and self.is_cross_attention:
            key, value = self.to_kv(context).chunk(2, dim=-1)
        elif self.fused_projections:
            _, key, value = self.to_qkv(context).chunk(3, dim=-1)
        else:
            key, value = self.to_k(context), self.to_v(context)
        return self._heads(key, self.norm_k, rotary), value.unflatten(-1, (self.heads, self.head_dim))

    def _heads(self, x: Tensor, norm: nn.Module, rotary: Tensor | None) -> Tensor:
        """(B, N, H * head_dim) -> (B, N, H, head_dim), normalised and turned."""
        shape = (self.heads, self.head_dim)
        if self.per_head_norm:
            wide = x.unflatten(-1, shape).to(self.norm_q.weight.dtype)  # under autocast: as its weights
            heads = norm(wide).to(x.dtype)
        else:
            heads = norm(x).unflatten(-1, shape)
        return heads if rotary is None else rotate(heads, rotary)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary: Tensor | None = None,
        key_value: KeyValue | None = None,
    ) -> Tensor:
        return self.processor(
            self,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            rotary=rotary,
            key_value=key_value,
        )


AttentionProcessorRegistry.register(
    AttentionProcessor,
    AttentionProcessorMetadata(
        skip_processor_output_fn=lambda self, attn, hidden_states, *args, **kwargs: hidden_states
    ),
)


# --- feed-forward ----------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x)), hidden width `2/3 ratio` of the width, rounded up."""

    def __init__(self, size: int, mlp_ratio: float, multiple_of: int, *, bias: bool = False) -> None:
        super().__init__()
        hidden = round_up(int(2 / 3 * int(size * mlp_ratio)), multiple_of)
        self.gate = nn.Linear(size, hidden, bias=bias)
        self.up = nn.Linear(size, hidden, bias=bias)
        self.down = nn.Linear(hidden, size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden_states)) * self.up(hidden_states))


class ProjectionMlp(nn.Module):
    """Linear, GELU(tanh), LayerNorm, Linear: the published text projection."""

    def __init__(self, in_size: int, size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_size, size)
        self.norm = layer_norm(size)
        self.linear_2 = nn.Linear(size, size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear_2(self.norm(F.gelu(self.linear_1(hidden_states), approximate="tanh")))


class Resize(nn.Module):
    """LayerNorm and Linear from one width to another."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.norm = layer_norm(in_size)
        self.linear = nn.Linear(in_size, out_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear(self.norm(hidden_states))


class Modulation(nn.Module):
    """The conditioning vector (B, D_c) -> `num_vectors` vectors (B, D) each: GELU(tanh), Linear."""

    def __init__(self, conditioning_size: int, size: int, num_vectors: int) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = nn.Linear(conditioning_size, num_vectors * size)

    def forward(self, conditioning: Tensor) -> Sequence[Tensor]:
        return self.linear(F.gelu(conditioning, approximate="tanh")).chunk(self.num_vectors, dim=-1)


class TextBlock(nn.Module):
    """Pre-norm self-attention and SwiGLU over the text tokens."""

    def __init__(self, size: int, head_dim: int, *, multiple_of: int, use_bias: bool, qk_norm: str) -> None:
        super().__init__()
        self.norm1 = layer_norm(size)
        self.attn = Attention(size, size, head_dim, bias=use_bias, qk_norm=qk_norm)
        self.norm2 = layer_norm(size)
        self.ff = SwiGLU(size, 4.0, multiple_of, bias=use_bias)

    def forward(self, hidden_states: Tensor, text_mask: Tensor | None, rotary: Tensor | None) -> Tensor:
        attended = self.attn(self.norm1(hidden_states), attention_mask=text_mask, rotary=rotary)
        hidden_states = hidden_states + attended
        return hidden_states + self.ff(self.norm2(hidden_states))
