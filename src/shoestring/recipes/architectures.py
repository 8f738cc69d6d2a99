"""The networks a recipe may name: their constructors' arguments, but for those that data and phase decide.

`microdit` makes pictures by itself. `wuerstchen_vqgan`, `wuerstchen_decoder` and `wuerstchen_prior` are the
stages A, B and C of a cascade; `unet` is a U-Net of SDXL's make and `unet_student` one that is cut from the
recipe's teacher. Defaults are the published sizes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from shoestring.recipes.fields import (
    Blocks,
    CountOrNone,
    Layers,
    Positive,
    Ratios,
    Section,
    Share,
    Text,
    Whole,
    Width,
)

UNetPreset = Literal[
    "koala-1b",
    "koala-700m",
    "bk-sdxl",
    "bk-sdm-base",
    "bk-sdm-small",
    "bk-sdm-tiny",
    "bk-sdm-v2-base",
    "bk-sdm-v2-small",
    "bk-sdm-v2-tiny",
    "ssd-1b",
    "vega",
]
Heads = Annotated[Whole, Field(ge=-1)]
Depth = Annotated[Layers, Field(ge=1)]


class MicroDiTModel(Section):
    """MicroDiT's constructor arguments, but for those that follow from the data and the phase."""

    kind: Literal["microdit"] = "microdit"
    patch_size: Width = 2
    hidden_size: Width = 1024
    depth: Depth = 28
    head_dim: Width = 64
    multiple_of: Width = 256
    qkv_ratio: Ratios = (0.5, 1.0)
    mlp_ratio: Ratios = (0.5, 4.0)
    use_bias: bool = False
    mixer_depth: Layers = 6
    mixer_size: Width = 768
    mixer_qkv_ratio: Ratios = 1.0
    mixer_mlp_ratio: Ratios = 4.0
    num_experts: Annotated[CountOrNone, Field(le=10_000)] = 8
    expert_capacity: Positive = 2.0
    expert_blocks: Blocks = 2
    mixer_expert_blocks: Blocks = 2
    text_depth: Layers = 1
    positions: Literal["sincos", "sincos+rope"] = "sincos"
    text_positions: Literal["none", "rope"] = "none"
    qk_norm: Literal["hidden", "head"] = "hidden"


class VqganModel(Section):
    """Stage A: the VQGAN's arguments, and the size of the discriminator that it is trained against."""

    kind: Literal["wuerstchen_vqgan"] = "wuerstchen_vqgan"
    levels: Annotated[Depth, Field(le=6)] = 2
    bottleneck_blocks: Depth = 12
    embed_dim: Width = 384
    latent_channels: Width = 4
    num_vq_embeddings: Width = 8192
    discriminator_hidden: Width = 512
    discriminator_depth: Annotated[Depth, Field(le=10)] = 6


class CompressorModel(Section):
    """The semantic compressor that is trained with Stage B."""

    variant: Literal["s", "tiny"] = "s"
    c_latent: Width = 16
    input_ratio: Annotated[Positive, Field(le=1)] = 0.75
    affine: bool = True
    weights: Text | None = None


class DecoderModel(Section):
    """Stage B: the decoder's arguments, the Stage A whose latents it makes, and the compressor."""

    kind: Literal["wuerstchen_decoder"] = "wuerstchen_decoder"
    vqgan: Text
    compressor: CompressorModel = CompressorModel()
    text: bool = True
    c_r: Width = 64
    patch_size: Width = 2
    c_cond: Width = 1024
    c_hidden: Annotated[tuple[Width, ...], Field(min_length=1)] = (320, 640, 1280, 1280)
    nhead: Annotated[tuple[Heads, ...], Field(min_length=1)] = (-1, 10, 20, 20)
    blocks: Annotated[tuple[Depth, ...], Field(min_length=1)] = (4, 4, 14, 4)
    level_config: Annotated[tuple[Literal["C", "CT", "CTA"], ...], Field(min_length=1)] = (
        *("CT", "CTA"),
        *("CTA", "CTA"),
    )
    inject_effnet: Annotated[tuple[bool, ...], Field(min_length=1)] = (False, True, True, True)
    kernel_size: Width = 3
    dropout: Share = 0.1
    previewer: CountOrNone = 512


class PriorModel(Section):
    """Stage C: the text-conditional prior's arguments, and the deviation its text's matrices begin with."""

    kind: Literal["wuerstchen_prior"] = "wuerstchen_prior"
    c: Width = 1536
    c_r: Width = 64
    depth: Depth = 32
    nhead: Width = 24
    dropout: Share = 0.1
    text_depth: Layers = 0
    text_std: Positive = 0.02


class UNetModel(Section):
    """A text-conditional U-Net as SDXL's, with its added conditions (pooled text, size and crop)."""

    kind: Literal["unet"] = "unet"
    block_out_channels: Annotated[tuple[Width, ...], Field(min_length=2, max_length=8)] = (320, 640, 1280)
    layers_per_block: Annotated[Depth, Field(le=8)] = 2
    transformer_depth: Annotated[tuple[Layers, ...], Field(min_length=2, max_length=8)] = (0, 2, 10)
    head_dim: Width = 64
    norm_groups: Width = 32
    time_scales: bool = False


class StudentModel(Section):
    """A U-Net cut from the teacher: a published cut by name, or what each key says; null is the teacher's."""

    kind: Literal["unet_student"] = "unet_student"
    preset: UNetPreset | None = None
    layers_per_block: Annotated[Depth, Field(le=8)] | None = None
    depth: Annotated[tuple[Layers, ...], Field(min_length=1, max_length=8)] | None = None
    mid: Literal["keep", "drop", "resnets"] = "keep"
    depth_map: Literal["bottom", "interleave", "top"] = "bottom"
    lora_rank: CountOrNone = 0


def _kind(value: Any) -> Any:
    """The kind of a `model` section; one that has none is a MicroDiT's."""
    return value.get("kind", "microdit") if isinstance(value, dict) else getattr(value, "kind", "microdit")


Model = Annotated[
    Annotated[MicroDiTModel, Tag("microdit")]
    | Annotated[VqganModel, Tag("wuerstchen_vqgan")]
    | Annotated[DecoderModel, Tag("wuerstchen_decoder")]
    | Annotated[PriorModel, Tag("wuerstchen_prior")]
    | Annotated[UNetModel, Tag("unet")]
    | Annotated[StudentModel, Tag("unet_student")],
    Discriminator(_kind),
]
