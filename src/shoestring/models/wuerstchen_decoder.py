"""Würstchen's Stage B (arXiv 2306.00637, v2): compressed codes to Stage A's latents, a U-Net of blocks.

    x_t (B, c_in, H, W) --unshuffle, 1x1 convolution, norm--> level 0 --/2--> level 1 --/2--> ... down
                                                                 |skip           |skip         |
    noise = (x_t - A) / B <--1x1 convolution, shuffle-- level 0 <--x2-- level 1 <--x2-- ... <--+ up

    codes (B, effnet_embd, h, w) --resized to each level--> every ResBlock of the levels that ask for them
    text (B, L, clip_embd) --Linear, norm--> every AttnBlock       r (B,) --sinusoid--> every TimestepBlock

Arguments and state-dict keys are those of diffusers' class of the same name; the defaults are the published
network.

The published network maps the resized codes, 16 channels, to `c_cond` = 1024 and gives these, beside its own
channels, to the first Linear layer of each ResBlock. No non-linearity lies between, so the product of the two
matrices, (4c, 16), is applied to the 16 channels instead: the same sum with 1024 fewer columns at each place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from shoestring.errors import UserError
from shoestring.models.sizes import nearest_sizes
from shoestring.models.wuerstchen_layers import (
    AttnBlock,
    GlobalResponseNorm,
    KeyValue,
    LayerNorm2d,
    TimestepBlock,
    attention_mask,
    check_time_size,
    initialize,
    normalize,
    time_embedding,
    to_channels_first,
    to_channels_last,
)
from shoestring.runtime import full_precision


@dataclass(frozen=True)
class ProjectedConditions:
    """What the network needs of codes and text, computed once and used at every step.

    size        (H, W) of the latents they are for
    codes       for each level (B, h, w, effnet_embd + 1), the codes at its size and a channel of ones; None
                at levels that take no codes
    mappers     for each slot (levels down, then up) the matrix `CodeMapper` gives, or None
    folded      for each ResBlock in order its mapper's matrix times its code columns, (effnet_embd + 1, 4c),
                or None: computed in the block
    text        (B, L, c_cond) after its Linear and norm, or None without text or once projected
    text_mask   (B, L) bool, True is a real token, or None when every token counts
    key_values  for each AttnBlock in order the text's keys and values, or None: computed in the block
    """

    size: tuple[int, int]
    codes: tuple[Tensor | None, ...]
    mappers: tuple[Tensor | None, ...]
    folded: tuple[Tensor | None, ...]
    text: Tensor | None
    text_mask: Tensor | None
    key_values: tuple[KeyValue | None, ...]


def resize_matrix(size: int, new_size: int, device: torch.device) -> Tensor:
    """Bicubic interpolation with antialiasing and aligned corners along one axis: (new_size, size) float32.

    As a matrix its gradient is the same at every run, which torch's own is not on a GPU.
    """
    identity = torch.eye(size, device=device, dtype=torch.float32)[None, None]
    return F.interpolate(identity, size=(new_size, size), mode="bicubic", antialias=True, align_corners=True)[
        0, 0
    ]


def resize_codes(codes: Tensor, height: int, width: int) -> Tensor:
    """Codes (B, E, h, w) resized in float32: (B, height, width, E + 1), where the last channel is 1.

    With it an affine map of the codes is one matrix.
    """
    if width == 1 and codes.device.type == "cpu":
        # Torch's CPU kernel makes rows of one cell all alike (2.13), and so does the published network there.
        resized = F.interpolate(
            codes.float(), size=(height, 1), mode="bicubic", antialias=True, align_corners=True
        )
    else:
        rows = resize_matrix(codes.shape[2], height, codes.device)
        columns = resize_matrix(codes.shape[3], width, codes.device)
        with full_precision(codes.device):
            resized = rows @ codes.float() @ columns.T
    return F.pad(to_channels_last(resized), (0, 1), value=1.0).contiguous()


class CodeMapper(nn.Module):
    """The 1x1 convolution from code channels to `c_cond`, used as a matrix and never applied by itself."""

    def __init__(self, effnet_embd: int, c_cond: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c_cond, effnet_embd, 1, 1))
        self.bias = nn.Parameter(torch.empty(c_cond))

    def forward(self) -> Tensor:
        """(effnet_embd + 1, c_cond): what each code channel and, last, the channel of ones turns into."""
        return torch.cat([self.weight.flatten(1).T, self.bias[None]])


class CodeLinear(nn.Linear):
    """A Linear layer over [x, mapped codes] that never maps the codes."""

    def forward(
        self,
        x: Tensor,
        code: Tensor | None = None,
        mapper: Tensor | None = None,
        folded: Tensor | None = None,
    ) -> Tensor:
        """x (B, h, w, in) -> (B, h, w, out); codes (B, h, w, E + 1) with their mapper, or it `folded`."""
        if code is None:
            return super().forward(x)
        own, mapped = self.weight.split([x.shape[-1], self.in_features - x.shape[-1]], dim=1)
        if folded is None:
            assert mapper is not None, "codes come with their mapper"
            folded = F.linear(mapper, mapped)
        hidden = F.linear(x.flatten(0, -2), own, self.bias)
        hidden += code.flatten(0, -2) @ folded  # in place: these are the widest tensors of the block
        return hidden.view(*x.shape[:-1], -1)

    def fold(self, mapper: Tensor) -> Tensor:
        """A mapper's matrix (E + 1, c_cond) times this layer's last `c_cond` columns: (E + 1, out)."""
        return F.linear(mapper, self.weight[:, self.in_features - mapper.shape[1] :])


class CodeResBlock(nn.Module):
    """x + MLP([norm(depthwise convolution of x), skip, mapped codes]), with GELU and GRN."""

    def __init__(self, c: int, c_skip: int, *, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, kernel_size, padding=kernel_size // 2, groups=c)
        self.channelwise = nn.Sequential(
            CodeLinear(c + c_skip, c * 4),
            nn.GELU(),
            GlobalResponseNorm(c * 4),
            nn.Dropout(dropout),
            nn.Linear(c * 4, c),
        )

    def forward(
        self,
        hidden_states: Tensor,
        skip: Tensor | None = None,
        code: Tensor | None = None,
        mapper: Tensor | None = None,
        folded: Tensor | None = None,
    ) -> Tensor:
        """Hidden states and skip (B, h, w, C); codes as `CodeLinear` takes them."""
        mixed = normalize(to_channels_last(self.depthwise(to_channels_first(hidden_states))))
        if skip is not None:
            mixed = torch.cat([mixed, skip], dim=-1)
        first, *rest = self.channelwise
        if code is None or isinstance(first, CodeLinear):
            mixed = first(mixed, code, mapper, folded) if code is not None else first(mixed)
        else:  # an adapter's or a quantised layer in its place: all columns as they are
            assert mapper is not None, "codes come with their mapper"
            mixed = first(torch.cat([mixed, code @ mapper], dim=-1))
        for layer in rest:
            mixed = layer(mixed)
        return hidden_states + mixed

    def fold(self, mapper: Tensor | None) -> Tensor | None:
        """The folded mapper, or None: without one, and for weights that wait elsewhere or in another type."""
        first = self.channelwise[0]
        if mapper is None or not isinstance(first, CodeLinear):
            return None
        here = (first.weight.device, first.weight.dtype) == (mapper.device, mapper.dtype)
        return first.fold(mapper) if here else None


class WuerstchenDiffNeXt(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """The Stage B network; see the module's diagram. Lists have one entry a level, the finest first.

    Args:
        c_in, c_out: latent channels, in and out.
        c_r: width of the time embedding, at least 4.
        patch_size: side of the squares of latents that go into channels first.
        c_cond: width of the conditions within.
        c_hidden: widths.
        nhead: attention heads of each level that has attention, any number elsewhere (-1).
        blocks: layers, both down and up.
        level_config: the blocks of a layer: C (ResBlock), T (TimestepBlock), A (AttnBlock).
        inject_effnet: whether the ResBlocks take the codes.
        effnet_embd, clip_embd: channels of the codes, width of the text embeddings.
        kernel_size: of the depthwise convolutions.
        dropout: as in `WuerstchenPrior`; one number, or one a level.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["CodeResBlock", "TimestepBlock", "AttnBlock"]
    _repeated_blocks = ["CodeResBlock", "TimestepBlock", "AttnBlock"]
    _skip_layerwise_casting_patterns = ["embedding", "mapper", "clf"]

    @register_to_config
    def __init__(
        self,
        c_in: int = 4,
        c_out: int = 4,
        c_r: int = 64,
        patch_size: int = 2,
        c_cond: int = 1024,
        c_hidden: Sequence[int] = (320, 640, 1280, 1280),
        nhead: Sequence[int] = (-1, 10, 20, 20),
        blocks: Sequence[int] = (4, 4, 14, 4),
        level_config: Sequence[str] = ("CT", "CTA", "CTA", "CTA"),
        inject_effnet: Sequence[bool] = (False, True, True, True),
        effnet_embd: int = 16,
        clip_embd: int = 1024,
        kernel_size: int = 3,
        dropout: float | Sequence[float] = 0.1,
    ) -> None:
        super().__init__()
        _check_levels(c_hidden, nhead, blocks, level_config, inject_effnet, dropout)
        check_time_size(c_r)
        levels = range(len(c_hidden))

        self.clip_mapper = nn.Linear(clip_embd, c_cond)
        slots = enumerate([*inject_effnet, *reversed(inject_effnet)])
        # A dictionary, since a list cannot leave slots out; the keys in the state dict are the same.
        self.effnet_mappers = nn.ModuleDict(
            {str(i): CodeMapper(effnet_embd, c_cond) for i, on in slots if on}
        )
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(patch_size),
            nn.Conv2d(c_in * patch_size**2, c_hidden[0], kernel_size=1),
            LayerNorm2d(),
        )

        # Dictionaries of lists: what shards a network by its blocks takes those of its outermost lists.
        self.down_blocks = nn.ModuleDict()
        for i in levels:
            level = nn.ModuleList(self._layers(i, first_skip=0))
            if i > 0:
                halve = nn.Conv2d(c_hidden[i - 1], c_hidden[i], kernel_size=2, stride=2)
                level.insert(0, nn.Sequential(LayerNorm2d(), halve))
            self.down_blocks[str(i)] = level
        self.up_blocks = nn.ModuleDict()
        for slot, i in enumerate(reversed(levels)):
            level = nn.ModuleList(self._layers(i, first_skip=c_hidden[i] if i < levels[-1] else 0))
            if i > 0:
                double = nn.ConvTranspose2d(c_hidden[i], c_hidden[i - 1], kernel_size=2, stride=2)
                level.append(nn.Sequential(LayerNorm2d(), double))
            self.up_blocks[str(slot)] = level

        self.clf = nn.Sequential(
            LayerNorm2d(),
            nn.Conv2d(c_hidden[0], 2 * c_out * patch_size**2, kernel_size=1),
            nn.PixelShuffle(patch_size),
        )
        self.gradient_checkpointing = False
        self.reset_parameters()

    def _layers(self, level: int, first_skip: int) -> Iterator[nn.Module]:
        """All blocks of a level, the very first of them with so many channels of skip."""
        config: Any = self.config
        c = config.c_hidden[level]
        dropout = config.dropout if isinstance(config.dropout, (int, float)) else config.dropout[level]
        for place, kind in enumerate(config.level_config[level] * config.blocks[level]):
            if kind == "C":
                c_skip = (first_skip if place == 0 else 0) + config.c_cond * config.inject_effnet[level]
                yield CodeResBlock(c, c_skip, kernel_size=config.kernel_size, dropout=dropout)
            elif kind == "T":
                yield TimestepBlock(c, config.c_r)
            else:
                yield AttnBlock(c, config.c_cond, config.nhead[level], dropout=dropout)

    @property
    def boundary(self) -> list[nn.Module]:
        """Where signals enter, leave and change resolution, and modulations: no hidden matrices."""
        ends = [self.embedding, self.clip_mapper, self.effnet_mappers, self.clf]
        return [*ends, *self._blocks(nn.Sequential, TimestepBlock)]

    def reset_parameters(self) -> None:
        """The authors' initialisation: at its start the network says twice its input is the noise."""
        initialize(self, layers=sum(self.config.blocks))
        mappers: list[Any] = list(self.effnet_mappers.values())
        for mapper in mappers:
            nn.init.normal_(mapper.weight, std=0.02)
            nn.init.zeros_(mapper.bias)
        nn.init.normal_(self.clip_mapper.weight, std=0.02)
        first: Any = self.embedding[1]
        nn.init.xavier_uniform_(first.weight, gain=0.02)
        last: Any = self.clf[1]
        nn.init.zeros_(last.weight)

    def project(
        self,
        effnet: Tensor | None,
        clip: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        size: tuple[int, int],
    ) -> ProjectedConditions:
        """All that codes and text contribute at every step, for latents of `size` (H, W).

        Codes (B, effnet_embd, h, w), text (B, L, clip_embd), mask (B, L), True is a real token. The text's
        keys and values, the resized codes and the products of mappers and ResBlocks are made here.
        """
        given = self._conditions(effnet, clip, text_mask, size)
        folded = tuple(
            block.fold(mapper)
            for blocks, mapper in zip(self._levels(), given.mappers, strict=True)
            for block in blocks
            if isinstance(block, CodeResBlock)
        )
        if (text := given.text) is not None:
            key_values = tuple(block.project(text) for block in self._blocks(AttnBlock))
            given = replace(given, text=None, key_values=key_values)
        return replace(given, folded=folded)

    def forward(
        self,
        x: Tensor,
        r: Tensor,
        effnet: Tensor | None = None,
        clip: Tensor | None = None,
        x_cat: Tensor | None = None,
        eps: float = 1e-3,
        return_noise: bool = True,
        text_mask: Tensor | None = None,
        projected: ProjectedConditions | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The noise in latents x (B, c_in, H, W) at times r (B,) in [0, 1]; same shape and type as x.

        Codes and text come as for `project`, or `projected`; without text, attention is to the picture
        alone. `x_cat` is put behind the channels of x. Without `return_noise`: A and B, where the noise is
        (x - A) / B and B lies in [eps, 1 - eps]. Give r in float32 whatever the type of the weights.
        Raises `UserError` where H or W does not divide into the coarsest level's cells.
        """
        if x_cat is not None:
            x = torch.cat([x, x_cat], dim=1)
        size = (x.shape[2], x.shape[3])
        given = projected or self._conditions(effnet, clip, text_mask, size)
        if given.size != size:
            raise ValueError(
                f"Conditions were projected for {given.size[0]} x {given.size[1]}, "
                f"latents are {size[0]} x {size[1]}."
            )
        dtype = self.clip_mapper.weight.dtype
        hidden = to_channels_last(self.embedding(x.to(dtype)))
        time = time_embedding(r.expand(x.shape[0]), self.config.c_r).to(dtype)

        hidden = self._through_levels(hidden, time, given, size)
        a, b = self.clf(to_channels_first(hidden)).float().chunk(2, dim=1)
        b = b.sigmoid() * (1 - eps * 2) + eps
        if return_noise:
            return ((x[:, : a.shape[1]].float() - a) / b).to(x.dtype)
        return a.to(x.dtype), b.to(x.dtype)

    def _through_levels(
        self, hidden: Tensor, time: Tensor, given: ProjectedConditions, size: tuple[int, int]
    ) -> Tensor:
        """Hidden states (B, h, w, c_hidden[0]) down and up again."""
        folded, key_values = iter(given.folded), iter(given.key_values)
        outputs: list[Tensor] = []
        num_levels = len(self.down_blocks)
        for slot, (blocks, mapper) in enumerate(zip(self._levels(), given.mappers, strict=True)):
            level = min(slot, 2 * num_levels - 1 - slot)
            skip = outputs[level] if slot > num_levels else None
            mask = attention_mask(given.text_mask, tokens=math.prod(self._grid(size, level)))
            for place, block in enumerate(blocks):
                if isinstance(block, CodeResBlock):
                    code = given.codes[level]
                    hidden = self._run(block, hidden, None if place else skip, code, mapper, next(folded))
                elif isinstance(block, TimestepBlock):
                    hidden = block(hidden, time)
                elif isinstance(block, AttnBlock):
                    hidden = self._run(block, hidden, given.text, mask, next(key_values))
                else:
                    hidden = to_channels_last(block(to_channels_first(hidden)))
            outputs.append(hidden)
        return hidden

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _levels(self) -> list[Any]:
        """The lists of blocks in the order they run: levels down, then up. Their places are slots."""
        return [*self.down_blocks.values(), *self.up_blocks.values()]

    def _blocks(self, *kinds: type[nn.Module]) -> list[Any]:
        """All blocks of these kinds, in the order in which they run."""
        return [block for level in self._levels() for block in level if isinstance(block, kinds)]

    def _grid(self, size: tuple[int, int], level: int) -> tuple[int, int]:
        """Cells of a level, down and across, for latents of `size`."""
        side = self.config.patch_size * 2**level
        return size[0] // side, size[1] // side

    def _conditions(
        self, effnet: Tensor | None, clip: Tensor | None, text_mask: Tensor | None, size: tuple[int, int]
    ) -> ProjectedConditions:
        """Codes at each level's size, mappers and text, with nothing multiplied into the blocks."""
        self._check_size(size)
        dtype = self.clip_mapper.weight.dtype
        inject = self.config.inject_effnet
        if effnet is None and any(inject):
            raise ValueError("WuerstchenDiffNeXt needs effnet or projected.")
        codes = tuple(
            resize_codes(effnet, *self._grid(size, i)).to(dtype) if effnet is not None and on else None
            for i, on in enumerate(inject)
        )
        slots = range(2 * len(inject))
        mappers = tuple(
            self.effnet_mappers[str(i)]() if str(i) in self.effnet_mappers else None for i in slots
        )
        text = None if clip is None else normalize(self.clip_mapper(clip.to(dtype)))
        return ProjectedConditions(
            size=size,
            codes=codes,
            mappers=mappers,
            folded=(None,) * len(self._blocks(CodeResBlock)),
            text=text,
            text_mask=None if text is None else text_mask,
            key_values=(None,) * len(self._blocks(AttnBlock)),
        )

    def _check_size(self, size: tuple[int, int]) -> None:
        cell = self.config.patch_size * 2 ** (len(self.config.c_hidden) - 1)
        near = nearest_sizes(*size, cell)
        if size not in near:
            allowed = " or ".join(f"{height} x {width}" for height, width in near)
            raise UserError(
                f"Latents of {size[0]} x {size[1]}: both sides must be multiples of {cell} (patch_size, "
                f"doubled for each level after the first). Nearest: {allowed}."
            )


def _check_levels(
    c_hidden: Sequence[int],
    nhead: Sequence[int],
    blocks: Sequence[int],
    level_config: Sequence[str],
    inject_effnet: Sequence[bool],
    dropout: float | Sequence[float],
) -> None:
    """Raise `UserError` where the lists do not describe the same levels, or a level is of unknown blocks."""
    lists: dict[str, Sequence[Any]] = {
        "nhead": nhead,
        "blocks": blocks,
        "level_config": level_config,
        "inject_effnet": inject_effnet,
        "dropout": [dropout] * len(c_hidden) if isinstance(dropout, (int, float)) else dropout,
    }
    for name, entries in lists.items():
        if len(entries) != len(c_hidden):
            raise UserError(
                f"model.{name} has {len(entries)} entries and c_hidden {len(c_hidden)}: give one a level."
            )
    for kinds in level_config:
        if unknown := set(kinds) - set("CTA"):
            raise UserError(
                f"model.level_config {kinds!r}: unknown block {min(unknown)!r}. "
                "Use C (convolution), T (time) and A (attention)."
            )
