"""Blocks that Würstchen's prior and decoder share (arXiv 2306.00637).

Hidden states are (B, H, W, C) throughout: norms, Linear layers and attention work over the last dimension
without a copy, and a convolution sees the same memory as a channels-last picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from shoestring.errors import UserError

KeyValue = tuple[Tensor, Tensor]

NORM_EPS = 1e-6
LONGEST_PERIOD = 10_000


def to_channels_last(picture: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), a view."""
    return picture.permute(0, 2, 3, 1)


def to_channels_first(hidden_states: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), a view."""
    return hidden_states.permute(0, 3, 1, 2)


def normalize(hidden_states: Tensor) -> Tensor:
    """LayerNorm over the last dimension, without parameters."""
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=NORM_EPS)


def time_embedding(r: Tensor, size: int) -> Tensor:
    """Times r (B,) in [0, 1] -> [sin | cos] of 10,000 r at `size // 2` frequencies: (B, size) float32.

    Always float32: 10,000 r in bfloat16 is off by up to 32 radians. An odd `size` ends in a zero.
    """
    half = size // 2
    steps = torch.arange(half, device=r.device, dtype=torch.float32)
    frequencies = torch.exp(steps * (-math.log(LONGEST_PERIOD) / (half - 1)))
    angles = (r.float() * LONGEST_PERIOD)[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, size % 2))


def check_time_size(c_r: int) -> None:
    """Raise `UserError` for a time embedding too narrow to have two frequencies."""
    if c_r < 4:
        raise UserError(f"model.c_r {c_r}: the time embedding needs at least 4 channels; published: 64.")


def attention_mask(text_mask: Tensor | None, tokens: int) -> Tensor | None:
    """Mask of text (B, L), True is a real token -> of all keys (B, 1, 1, tokens + L): image tokens count."""
    if text_mask is None:
        return None
    mask = text_mask.bool()
    return torch.cat([mask.new_ones(mask.shape[0], tokens), mask], dim=1)[:, None, None]


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of (B, C, H, W), without parameters; the result is channels-last."""

    def forward(self, picture: Tensor) -> Tensor:
        return to_channels_first(normalize(to_channels_last(picture)))


class GlobalResponseNorm(nn.Module):
    """GRN of ConvNeXt V2 (arXiv 2301.00808): x (1 + gamma N) + beta, N each channel's norm over H, W.

    N is relative to the mean norm of all channels. Gamma and beta (1, 1, 1, C) start at zero.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        norm = _norm_over_places(hidden_states)  # (B, 1, 1, C)
        relative = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        scale = (1 + self.gamma * relative).to(hidden_states.dtype)
        return torch.addcmul(self.beta.to(hidden_states.dtype), hidden_states, scale)


def _norm_over_places(hidden_states: Tensor) -> Tensor:
    """L2 norm over H and W in float32: (B, H, W, C) -> (B, 1, 1, C)."""
    if hidden_states.device.type != "cpu":
        return torch.linalg.vector_norm(hidden_states, dim=(1, 2), keepdim=True, dtype=torch.float32)
    # On the CPU a sum over outer dimensions is vectorised and a norm is not (10 times slower). The tiny
    # number gives the root a gradient where a channel is zero everywhere.
    return torch.sqrt(hidden_states.float().square().sum(dim=(1, 2), keepdim=True) + 1e-30)


class ResBlock(nn.Module):
    """x + MLP(norm(depthwise convolution of x)); the MLP is four times as wide, with GELU and GRN."""

    def __init__(self, c: int, *, kernel_size: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, kernel_size, padding=kernel_size // 2, groups=c)
        self.channelwise = nn.Sequential(
            nn.Linear(c, c * 4),
            nn.GELU(),
            GlobalResponseNorm(c * 4),
            nn.Dropout(dropout),
            nn.Linear(c * 4, c),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        mixed = to_channels_last(self.depthwise(to_channels_first(hidden_states)))
        return hidden_states + self.channelwise(normalize(mixed))


class TimestepBlock(nn.Module):
    """x (1 + a) + b, where a and b (B, C) are linear in the time embedding (B, c_r)."""

    def __init__(self, c: int, c_timestep: int) -> None:
        super().__init__()
        self.mapper = nn.Linear(c_timestep, c * 2)

    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.mapper(time)[:, None, None].chunk(2, dim=-1)
        return torch.addcmul(shift, hidden_states, 1 + scale)


class JointAttentionProcessor:
    """Runs a `JointAttention` through diffusers' dispatcher, so that its attention backends apply."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: JointAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        key_value: KeyValue | None = None,
    ) -> Tensor:
        context = hidden_states
        if encoder_hidden_states is not None and key_value is None:
            context = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        key, value = attn.project_context(context)
        if key_value is not None:
            key, value = (torch.cat(pair, dim=1) for pair in zip((key, value), key_value, strict=True))
        attended = dispatch_attention_fn(
            attn.heads_of(attn.to_q(hidden_states)),
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](attended.flatten(2)))


class JointAttention(nn.Module, AttentionModuleMixin):
    """Image tokens attend to themselves and to the text in one softmax, image tokens first."""

    _default_processor_cls = JointAttentionProcessor
    _available_processors = [JointAttentionProcessor]
    _supports_qkv_fusion = False
    processor: JointAttentionProcessor
    set_processor: Callable[[JointAttentionProcessor], None]

    def __init__(self, c: int, heads: int, dropout: float) -> None:
        super().__init__()
        if heads < 1 or c % heads:
            raise UserError(f"Attention of width {c} cannot have {heads} heads: nhead must divide the width.")
        self.heads = heads
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c), nn.Dropout(dropout)])
        self.set_processor(JointAttentionProcessor())

    def heads_of(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, heads, C / heads)."""
        return tokens.unflatten(-1, (self.heads, -1))

    def project_context(self, context: Tensor) -> KeyValue:
        """Keys and values (B, N, heads, C / heads) of tokens (B, N, C)."""
        return self.heads_of(self.to_k(context)), self.heads_of(self.to_v(context))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        key_value: KeyValue | None = None,
    ) -> Tensor:
        """Tokens (B, N, C); the text as tokens (B, L, C) or as its keys and values; see `attention_mask`."""
        return self.processor(
            self,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            key_value=key_value,
        )


AttentionProcessorRegistry.register(
    JointAttentionProcessor,
    AttentionProcessorMetadata(
        skip_processor_output_fn=lambda self, attn, hidden_states, *args, **kwargs: hidden_states
    ),
)


class AttnBlock(nn.Module):
    """x + attention of the normalised x to itself and to the text; no positions but the convolutions'."""

    def __init__(self, c: int, c_cond: int, nhead: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = JointAttention(c, nhead, dropout)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, c))

    def project(self, text: Tensor) -> KeyValue:
        """Keys and values of the text (B, L, c_cond): all of it that this block needs, at any step."""
        return self.attention.project_context(self.kv_mapper(text))

    def forward(
        self,
        hidden_states: Tensor,
        text: Tensor | None = None,
        attention_mask: Tensor | None = None,
        key_value: KeyValue | None = None,
    ) -> Tensor:
        tokens = normalize(hidden_states).flatten(1, 2)  # (B, N, C)
        mapped = None if text is None or key_value is not None else self.kv_mapper(text)
        attended = self.attention(tokens, mapped, attention_mask, key_value)
        return hidden_states + attended.view_as(hidden_states)


def initialize(network: nn.Module, layers: int) -> None:
    """The authors' initialisation of what prior and decoder share.

    Xavier for convolutions and Linear layers, zero biases; the MLPs' last matrices times sqrt(1 / layers);
    zero for what is modulated by time, so that it starts as the identity. Query, key and value count as one
    (3C, C) matrix, as they are one in the authors' attention.
    """
    for module in network.modules():
        if isinstance(module, nn.ConvTranspose2d):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, JointAttention):
            for linear in (module.to_q, module.to_k, module.to_v):
                nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(0.5))
        elif isinstance(module, TimestepBlock):
            nn.init.zeros_(module.mapper.weight)
        elif isinstance(module, GlobalResponseNorm):
            nn.init.zeros_(module.gamma)
            nn.init.zeros_(module.beta)
        elif isinstance(channelwise := getattr(module, "channelwise", None), nn.Sequential):
            last: Any = channelwise[-1]
            with torch.no_grad():
                last.weight.mul_(math.sqrt(1 / layers))
