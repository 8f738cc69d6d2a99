"""Which parts of a teacher's U-Net a student keeps, and the cuts that were published.

Sources, by mark: [KOALA] arXiv 2312.04005v2 and its model cards; [BK] BK-SDM, arXiv 2305.15798, its cards and
its training script; [Segmind] the configurations of segmind/SSD-1B and segmind/Segmind-Vega; [SDXL], [SD] the
configurations of the teachers' repositories. A field without a mark is our choice, with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shoestring.errors import RecipeError

Mid = Literal["keep", "drop", "resnets"]
DepthMap = Literal["bottom", "interleave", "top"]
Depths = tuple[int | tuple[int, ...], ...]

MIDS: tuple[Mid, ...] = ("keep", "drop", "resnets")
DEPTH_MAPS: tuple[DepthMap, ...] = ("bottom", "interleave", "top")


def _tuples(given: object) -> object:
    return tuple(map(_tuples, given)) if isinstance(given, (list, tuple)) else given


def _numbers(given: object) -> list[int]:
    if isinstance(given, int):
        return [given]
    return [number for each in given for number in _numbers(each)] if isinstance(given, tuple) else []


@dataclass(frozen=True)
class StudentSpec:
    """What a student keeps of its teacher; None, and every default, is what the teacher has.

    layers_per_block  pairs of ResNet and attention in each down block (an up block has one more): one number,
                      or one for each stage from the outermost inwards
    depth             transformer blocks in each attention: one entry a stage, outermost first, a number or
                      one number a layer. As in diffusers, the entry of a stage without attention is not read,
                      and the mid block has the last entry's (first) number. For a transformer: one number.
    up_depth          the same for the up blocks, innermost first; None mirrors `depth`
    mid               the mid block: kept, dropped, or its first ResNet alone
    depth_map         which d of the teacher's D blocks stay, in order: "bottom" 0 to d-1; "top" D-d to D-1;
                      "interleave" ceil(j (D-1)/(d-1)), from the first to the last evenly
    inner_stage       False leaves out the innermost down and up block, with the mid block

    Lists are taken for tuples. Raises `RecipeError` for numbers below 1 (below 0 for a depth) and for unknown
    words.
    """

    layers_per_block: int | tuple[int, ...] | None = None
    depth: Depths | None = None
    mid: Mid = "keep"
    depth_map: DepthMap = "bottom"
    inner_stage: bool = True
    up_depth: Depths | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (("mid", self.mid, MIDS), ("depth_map", self.depth_map, DEPTH_MAPS)):
            if value not in allowed:
                raise RecipeError(f"student {name} {value!r}: unknown. Use {', '.join(allowed)}.")
        for name, least in (("layers_per_block", 1), ("depth", 0), ("up_depth", 0)):
            given = _tuples(getattr(self, name))
            object.__setattr__(self, name, given)
            if any(number < least for number in _numbers(given)):
                raise RecipeError(f"student {name} {given}: numbers must be {least} or more.")


SDXL: dict[str, Any] = {  # [SDXL] stabilityai/stable-diffusion-xl-base-1.0, Turbo's and Lightning's too
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}

SD14: dict[str, Any] = {  # [SD] CompVis/stable-diffusion-v1-4, and 1.5's
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}

SD21: dict[str, Any] = (
    SD14
    | {  # [SD] stabilityai/stable-diffusion-2-1-base; the 768 px model says sample_size 96
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    }
)

_BK_BASE = StudentSpec(layers_per_block=1)  # [BK] one pair a down block, two an up block: 0 and 2 of three
_BK_SMALL = StudentSpec(layers_per_block=1, mid="drop")  # [BK]
_BK_TINY = StudentSpec(layers_per_block=1, mid="drop", inner_stage=False)  # [BK]

PRESETS: dict[str, tuple[dict[str, Any], StudentSpec]] = {
    # layers, depths 2 and 6 (Tx blocks of the card), mid [KOALA]; depth of stage 0 is not read. depth_map:
    # our reading of "at the same block location" [KOALA], which also pairs features at the bottom.
    "koala-1b": (SDXL, StudentSpec(layers_per_block=1, depth=(1, 2, 6))),
    "koala-700m": (SDXL, StudentSpec(layers_per_block=1, depth=(1, 2, 5), mid="drop")),  # likewise [KOALA]
    "bk-sdxl": (SDXL, _BK_BASE),  # BK's cut applied to SDXL, as [KOALA] compares with it
    "bk-sdm-base": (SD14, _BK_BASE),
    "bk-sdm-small": (SD14, _BK_SMALL),
    "bk-sdm-tiny": (SD14, _BK_TINY),
    "bk-sdm-v2-base": (SD21, _BK_BASE),
    "bk-sdm-v2-small": (SD21, _BK_SMALL),
    "bk-sdm-v2-tiny": (SD21, _BK_TINY),
    # depths and mid [Segmind]; which blocks stay is our reading: their script loads equal names, so bottom.
    "ssd-1b": (
        SDXL,
        StudentSpec(depth=(0, (2, 2), (4, 4)), up_depth=((4, 4, 10), (2, 1, 1), 0), mid="resnets"),
    ),
    "vega": (SDXL, StudentSpec(depth=(0, 1, 2), mid="resnets")),  # [Segmind], which writes a number a layer
}
"""Name -> configuration of the teacher it is published for, and the cut."""


def preset_spec(name: str) -> StudentSpec:
    """The published cut called `name`; raises `RecipeError` for an unknown one."""
    return _preset(name)[1]


def preset_teacher(name: str) -> dict[str, Any]:
    """Configuration of the teacher that the cut called `name` was published for."""
    return dict(_preset(name)[0])


def _preset(name: str) -> tuple[dict[str, Any], StudentSpec]:
    if name not in PRESETS:
        raise RecipeError(f"student preset {name!r}: unknown. Use {', '.join(PRESETS)}.")
    return PRESETS[name]
