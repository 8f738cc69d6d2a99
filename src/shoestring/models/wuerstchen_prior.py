"""Würstchen's Stage C (arXiv 2306.00637, v2): text to strongly compressed latents.

    x_t (B, c_in, h, w) --1x1 convolution--> (B, h, w, c) --> `depth` times ResBlock, TimestepBlock, AttnBlock
                                                                              |            |
    text (B, L, c_cond) --two Linear layers--> (B, L, c) ---keys and values---|------------+
    r (B,) --sinusoid--> (B, c_r) ------------modulates-----------------------+
                                                                              |
    noise = (x_t - A) / (|1 - B| + 1e-5) <---------1x1 convolution: A, B------+

Arguments and state-dict keys are those of diffusers' class of the same name; its defaults are the paper's
text, and the released checkpoints have c=1536, c_cond=1280, depth=32, nhead=24.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from shoestring.models.layers import TextBlock, rotary_angles
from shoestring.models.wuerstchen_layers import (
    AttnBlock,
    KeyValue,
    LayerNorm2d,
    ResBlock,
    TimestepBlock,
    attention_mask,
    check_time_size,
    initialize,
    time_embedding,
    to_channels_first,
    to_channels_last,
)


@dataclass(frozen=True)
class ProjectedText:
    """Keys and values of the text for each attention, (B, L, heads, C / heads); mask (B, L) bool or None."""

    key_values: tuple[KeyValue, ...]
    mask: Tensor | None = None


class WuerstchenPrior(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """The Stage C network; see the module's diagram.

    Args:
        c_in: latent channels.
        c: width.
        c_cond: width of the text embeddings.
        c_r: width of the time embedding, at least 4.
        depth: layers, each of a ResBlock, a TimestepBlock and an AttnBlock.
        nhead: attention heads; divides `c`.
        dropout: in the ResBlocks' MLPs, and on what attention puts out (as diffusers has it; the authors
            drop attention weights).
        text_depth: transformer blocks over the text alone, with rotary positions. None as published, where a
            trained CLIP has related the words; a text encoder without weights leaves that to them.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResBlock", "TimestepBlock", "AttnBlock"]
    _repeated_blocks = ["ResBlock", "TimestepBlock", "AttnBlock"]
    _skip_layerwise_casting_patterns = ["projection", "cond_mapper", "mapper", "^out"]

    @register_to_config
    def __init__(
        self,
        c_in: int = 16,
        c: int = 1280,
        c_cond: int = 1024,
        c_r: int = 64,
        depth: int = 16,
        nhead: int = 16,
        dropout: float = 0.1,
        text_depth: int = 0,
    ) -> None:
        super().__init__()
        check_time_size(c_r)
        self.projection = nn.Conv2d(c_in, c, kernel_size=1)
        self.cond_mapper = nn.Sequential(nn.Linear(c_cond, c), nn.LeakyReLU(0.2), nn.Linear(c, c))
        self.text_blocks = nn.ModuleList(
            TextBlock(c, c // nhead, multiple_of=8, use_bias=False, qk_norm="head") for _ in range(text_depth)
        )
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.append(ResBlock(c, dropout=dropout))
            self.blocks.append(TimestepBlock(c, c_r))
            self.blocks.append(AttnBlock(c, c, nhead, dropout=dropout))
        self.out = nn.Sequential(LayerNorm2d(), nn.Conv2d(c, c_in * 2, kernel_size=1))
        self.gradient_checkpointing = False
        self.reset_parameters()

    @property
    def boundary(self) -> list[nn.Module]:
        """Where signals enter and leave, and modulations: to an optimiser, no hidden matrices."""
        return [self.projection, self.cond_mapper, self.out, *self.blocks[1::3]]

    def reset_parameters(self, text_std: float = 0.02) -> None:
        """The authors' initialisation: at its start the network gives back its input as the noise.

        Their deviation `text_std` of the text's matrices suits widths of 1280 and 1536: at small ones text
        arrives so weak that attention does not see it for hundreds of steps.
        """
        initialize(self, layers=self.config.depth)
        nn.init.normal_(self.projection.weight, std=0.02)
        cond_mapper: Any = self.cond_mapper
        nn.init.normal_(cond_mapper[0].weight, std=text_std)
        nn.init.normal_(cond_mapper[2].weight, std=text_std)
        out: Any = self.out[1]
        nn.init.zeros_(out.weight)
        text_blocks: Any = self.text_blocks
        for block in text_blocks:
            nn.init.zeros_(block.attn.to_out[0].weight)
            nn.init.zeros_(block.ff.down.weight)

    def project(self, c: Tensor, text_mask: Tensor | None = None) -> ProjectedText:
        """All that depends on the text alone: c (B, L, c_cond), mask (B, L), True is a real token."""
        text = self._tokens(c, text_mask)
        attentions: Any = self.blocks[2::3]
        return ProjectedText(tuple(block.project(text) for block in attentions), text_mask)

    def forward(
        self,
        x: Tensor,
        r: Tensor,
        c: Tensor | None = None,
        text_mask: Tensor | None = None,
        projected: ProjectedText | None = None,
    ) -> Tensor:
        """The noise in latents x (B, c_in, h, w) at times r (B,) in [0, 1]; same shape and type as x.

        Text comes as `c` (B, L, c_cond) with an optional mask (B, L), True is a real token, or as
        `projected`. Give r in float32 whatever the type of the weights: bfloat16 has 3 digits of it.
        """
        dtype = self.projection.weight.dtype
        hidden = to_channels_last(self.projection(x.to(dtype, memory_format=torch.channels_last)))
        time = time_embedding(r.expand(x.shape[0]), self.config.c_r).to(dtype)
        text = None
        key_values: tuple[KeyValue | None, ...] = (None,) * self.config.depth
        if projected is not None:
            key_values, text_mask = projected.key_values, projected.mask
        elif c is not None:
            text = self._tokens(c, text_mask)
        else:
            raise ValueError("WuerstchenPrior needs c or projected.")
        mask = attention_mask(text_mask, tokens=hidden.shape[1] * hidden.shape[2])

        for i, key_value in enumerate(key_values):
            hidden = self._run(self.blocks[3 * i], hidden)
            hidden = self.blocks[3 * i + 1](hidden, time)
            hidden = self._run(self.blocks[3 * i + 2], hidden, text, mask, key_value)

        a, b = self.out(to_channels_first(hidden)).float().chunk(2, dim=1)
        return ((x.float() - a) / ((1 - b).abs() + 1e-5)).to(x.dtype)

    def _tokens(self, c: Tensor, text_mask: Tensor | None) -> Tensor:
        """Text (B, L, c_cond) as the attentions see it, (B, L, c)."""
        tokens: Tensor = self.cond_mapper(c.to(self.projection.weight.dtype))
        if len(self.text_blocks):
            places = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
            rotary = rotary_angles(places[None, :, None], self.config.c // self.config.nhead)
            mask = None if text_mask is None else text_mask.bool()[:, None, None]
            for block in self.text_blocks:
                tokens = block(tokens, mask, rotary)
        return tokens

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)
