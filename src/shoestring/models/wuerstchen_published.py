"""The authors' Würstchen checkpoints: which stage of which version it is, under our names, and its sizes.

Pure functions of state dicts. What differs from ours: queries, keys and values are one matrix (the layout of
`nn.MultiheadAttention`), the codebook has another name. Sizes are read off shapes, so that a network of any
size converts; what no shape tells is taken as published, and said.

    model_v2_stage_b.pt    {"state_dict": Stage B, "effnet_state_dict": compressor}
    model_v2_stage_c*.pt   {"state_dict": Stage C, "ema_state_dict": its average, which is the one published}
    vqgan_f4_v1_500k.pt    {"state_dict": Stage A}; Stable Cascade has it as stage_a.safetensors

Source: github.com/dome272/Wuerstchen (modules.py, vqgan.py) and Stability-AI/StableCascade (modules/).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoestring.errors import CheckpointError
from shoestring.models.checkpoint_files import networks_in
from shoestring.models.semantic_compressor import VARIANTS, is_v1

STAGES = {
    "prior": "Stage C (prior)",
    "decoder": "Stage B (decoder)",
    "vqgan": "Stage A (VQGAN)",
    "compressor": "semantic compressor",
}
"""Folder of a network in a pipeline -> what it is called in messages."""

PUBLISHED_FILES = {
    "prior": "model_v2_stage_c_finetune_interpolation.pt",
    "decoder": "model_v2_stage_b.pt",
    "vqgan": "vqgan_f4_v1_500k.pt",
    "compressor": "model_v2_stage_b.pt",
}
"""Where version 2 of each lies in the hub repository dome272/wuerstchen."""

# A tensor that every network of a stage has, whatever its version.
_ANCHORS = {
    "prior": "cond_mapper.0.weight",
    "decoder": "clf.1.weight",
    "vqgan": "in_block.1.weight",
    "compressor": "backbone.0.0.weight",
}
_AVERAGE = "ema_state_dict"
_RENAMED = ((".attn.out_proj.", ".to_out.0."), ("vquantizer.codebook.", "vquantizer.embedding."))
_UNUSED = ("vquantizer.ema_",)  # sums of a codebook trained by averages
_HEAD_DIM = 64
_PATCH = 2  # pixels of Stage A and latents of Stage B that one cell folds
_SCALE_FACTOR = 0.3764
_V2_STATISTICS = {"latents_mean": -1.0, "latents_std": 42.0}  # Stable Cascade scales its codes by nothing
_PRIOR_V1 = {"width": 1536, "text": 1024, "depth": 32}

_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """One network of a checkpoint: its stage, our class's arguments, its tensors under our names."""

    stage: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    assumed: tuple[str, ...] = ()
    """What no shape tells and is taken as published, in words."""


def stages_in(tree: Any, part: str | None = None) -> dict[str, dict[str, Any]]:
    """The networks in a checkpoint's containers, {stage: {name: value}}; `part` takes those of one place.

    Where weights and their average lie side by side, the average is taken, as the authors publish it. Raises
    `CheckpointError` where a stage is there several times, and where nothing lies at `part`.
    """
    places = {stage: networks_in(tree, anchor) for stage, anchor in _ANCHORS.items()}
    places = {stage: found for stage, found in places.items() if found}
    if part is not None and not any(part in found for found in places.values()):
        known = sorted({place for found in places.values() for place in found})
        raise CheckpointError(f"no network at {part!r}. Choose with --part: {', '.join(map(repr, known))}.")
    chosen = {}
    for stage, found in places.items():
        if part is not None:
            if part in found:
                chosen[stage] = found[part]
        elif averages := [values for place, values in found.items() if place.split(".")[0] == _AVERAGE]:
            chosen[stage] = averages[0]
        elif len(found) == 1:
            (chosen[stage],) = found.values()
        else:
            raise CheckpointError(
                f"holds {len(found)} networks of {STAGES[stage]}. "
                f"Choose with --part: {', '.join(map(repr, found))}."
            )
    return chosen


def recognise(stage: str, values: Mapping[str, Any], *, head_dim: int | None = None) -> Published:
    """The network among `values`: arguments from shapes, tensors under our names.

    `head_dim` is the width of an attention head, which no shape tells; 64 in every published network. Raises
    `CheckpointError` for version 1 and 3 (Stable Cascade), and for values that are no usable weights.
    """
    _refuse_other_version(stage, values)
    state = state_from_published(_weights(values))
    config, assumed = config_from_shapes(stage, {name: tuple(t.shape) for name, t in state.items()}, head_dim)
    return Published(stage, config, state, assumed)


def config_from_shapes(
    stage: str, shapes: Mapping[str, tuple[int, ...]], head_dim: int | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Our class's arguments for the tensors of a stage (our names), and what no shape tells, in words.

    Raises `CheckpointError` for shapes that are of no such network, and where `head_dim` has to be given.
    """
    config, assumed = _READERS[stage](shapes, head_dim)
    return config, tuple(assumed)


def state_from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict of any stage under our names; one under ours already comes back unchanged."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(_UNUSED):
            continue
        if fused := re.fullmatch(r"(.*\.attention)\.attn\.in_proj_(weight|bias)", name):
            for part, piece in zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True):
                ours[f"{fused[1]}.{part}.{fused[2]}"] = piece.contiguous()
            continue
        for published, renamed in _RENAMED:
            name = name.replace(published, renamed)
        ours[name] = tensor.contiguous()
    return ours


def _refuse_other_version(stage: str, values: Mapping[str, Any]) -> None:
    names = values.keys()
    if stage == "decoder" and names & {"byt5_mapper.weight", "in_mapper.0.weight", "out_mapper.1.weight"}:
        raise CheckpointError(
            "Stage B of Würstchen v1 (Paella, a U-Net on Stage A's tokens), which decodes the codes of no v2 "
            f"network. Use v2's: {_where('decoder')}."
        )
    if stage == "decoder" and names & {"clip_txt_mapper.weight", "clip_img_mapper.weight"}:
        raise CheckpointError(
            "Stage C of Stable Cascade (Würstchen v3), another architecture. Use diffusers' "
            f"StableCascadePriorPipeline for it, or v2's: {_where('prior')}."
        )
    if stage == "decoder" and names & {"pixels_mapper.0.weight", "effnet_mapper.0.weight"}:
        raise CheckpointError(
            "Stage B of Stable Cascade (Würstchen v3), another architecture. Use diffusers' "
            f"StableCascadeDecoderPipeline for it, or v2's: {_where('decoder')}."
        )
    if stage == "compressor" and is_v1(values):
        raise CheckpointError(
            "the compressor of Würstchen v1 (EfficientNetV2-L); v2's Stage B and C know codes of v2's alone "
            f"(EfficientNetV2-S). Use v2's: {_where('compressor')}."
        )
    if stage == "prior" and _prior_sizes(values) == _PRIOR_V1:
        raise CheckpointError(
            "Stage C of Würstchen v1 (text of CLIP-H, 1024 wide, and codes of v1's compressor); v2's Stage B "
            f"cannot decode what it makes. Use v2's: {_where('prior')}."
        )


def _where(stage: str) -> str:
    repository = "warp-ai/wuerstchen-prior" if stage == "prior" else "warp-ai/wuerstchen"
    file = f"{PUBLISHED_FILES[stage]} of dome272/wuerstchen"
    return file if stage == "compressor" else f"{file}, or {repository}"


def _prior_sizes(values: Mapping[str, Any]) -> dict[str, int]:
    width, text = (*values["cond_mapper.0.weight"].shape, 0, 0)[:2]
    return {"width": width, "text": text, "depth": len(_children(values, "blocks.")) // 3}


def _weights(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among `values`, checked: dense, with data, finite; whole numbers only where steps count."""
    weights: dict[str, Tensor] = {}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            if "." not in name:  # a step counter or an optimiser beside the weights
                continue
            raise CheckpointError(f"{name}: is a {type(value).__name__}, not a tensor.")
        counter = name.endswith("num_batches_tracked")
        if value.is_meta or value.layout != torch.strided or not (value.is_floating_point() or counter):
            kind = "no data" if value.is_meta else str(value.dtype).removeprefix("torch.")
            raise CheckpointError(f"{name}: holds {kind}, not plain floating-point numbers.")
        if not value.isfinite().all():
            raise CheckpointError(f"{name}: holds infinite numbers or NaN: the training behind it failed.")
        weights[name] = value.detach()
    return weights


def _read_prior(shapes: _Shapes, head_dim: int | None) -> tuple[dict[str, Any], list[str]]:
    width, channels = _size(shapes, "projection.weight")[:2]
    heads, assumed = _heads(width, head_dim)
    config = {
        "c_in": channels,
        "c": width,
        "c_cond": _size(shapes, "cond_mapper.0.weight")[1],
        "c_r": _size(shapes, "blocks.1.mapper.weight")[1],
        "depth": len(_children(shapes, "blocks.")) // 3,
        "nhead": heads,
    }
    return config, assumed


def _read_decoder(shapes: _Shapes, head_dim: int | None) -> tuple[dict[str, Any], list[str]]:
    levels = _children(shapes, "down_blocks.")
    widths = [
        _size(shapes, f"down_blocks.{level}.0.1.weight" if level else "embedding.1.weight")[0]
        for level in levels
    ]
    kinds, counts, heads, told = [], [], [], set()
    for level, width in zip(levels, widths, strict=True):
        period, count = _period(_kinds(shapes, f"down_blocks.{level}."))
        kinds.append(period)
        counts.append(count)
        heads.append(-1)
        if "A" in period:
            heads[-1], assumed = _heads(width, head_dim)
            told.update(assumed)
    mappers = [name for name in shapes if re.fullmatch(r"effnet_mappers\.\d+\.weight", name)]
    embedded = _size(shapes, "embedding.1.weight")[1]
    config = {
        "c_in": _folded(embedded, "embedding.1.weight"),
        "c_out": _folded(_size(shapes, "clf.1.weight")[0] // 2, "clf.1.weight"),
        "c_r": _size(shapes, _first(shapes, r"down_blocks\..*\.mapper\.weight"))[1],
        "patch_size": _PATCH,
        "c_cond": _size(shapes, "clip_mapper.weight")[0],
        "c_hidden": widths,
        "nhead": heads,
        "blocks": counts,
        "level_config": kinds,
        "inject_effnet": [f"effnet_mappers.{level}.weight" in shapes for level in levels],
        "effnet_embd": _size(shapes, mappers[0])[1] if mappers else 16,
        "clip_embd": _size(shapes, "clip_mapper.weight")[1],
        "kernel_size": _size(shapes, _first(shapes, r"down_blocks\..*\.depthwise\.weight"))[-1],
    }
    return config, [*sorted(told), f"patch_size {_PATCH}"]


def _read_vqgan(shapes: _Shapes, head_dim: int | None) -> tuple[dict[str, Any], list[str]]:
    width, latents = _size(shapes, "up_blocks.0.0.weight")[:2]
    levels = len(_children(shapes, "down_blocks.")) // 2
    mixers = [name for name in shapes if re.fullmatch(r"up_blocks\.\d+\.gammas", name)]
    config = {
        "in_channels": _folded(_size(shapes, "in_block.1.weight")[1], "in_block.1.weight"),
        "out_channels": _folded(_size(shapes, "out_block.0.weight")[0], "out_block.0.weight"),
        "up_down_scale_factor": _PATCH,
        "levels": levels,
        "bottleneck_blocks": len(mixers) - (levels - 1),
        "embed_dim": width,
        "latent_channels": latents,
        "num_vq_embeddings": _size(shapes, "vquantizer.embedding.weight")[0],
        "scale_factor": _SCALE_FACTOR,
    }
    return config, [f"scale_factor {_SCALE_FACTOR}"]


def _read_compressor(shapes: _Shapes, head_dim: int | None) -> tuple[dict[str, Any], list[str]]:
    codes, features = _size(shapes, "mapper.0.weight")[:2]
    *numbers, _ = _children(shapes, "backbone.")[1:]
    known = {len(stages): [each["stride"] for each in stages] for stages, _ in VARIANTS.values()}
    strides = known.get(len(numbers))
    if strides is None:
        raise CheckpointError(
            f"a compressor of {len(numbers)} stages: no weight tells its strides, and those of networks of "
            f"{', '.join(map(str, sorted(known)))} stages alone are known."
        )
    stages = [_read_stage(shapes, n, stride) for n, stride in zip(numbers, strides, strict=True)]
    named = [name for name, variant in VARIANTS.items() if variant == (stages, features)]
    affine = "mapper.1.weight" in shapes
    config = {
        "c_latent": codes,
        "variant": named[0] if named else stages,
        "last_channel": features,
        "affine": affine,
        **(_V2_STATISTICS if affine else {}),
    }
    assumed = [] if named else [f"strides {' '.join(map(str, strides))}"]
    return config, assumed + (["scaled codes (z + 1) / 42"] if affine else [])


def _read_stage(shapes: _Shapes, number: int, stride: int) -> dict[str, Any]:
    """One stage of an EfficientNetV2, from its first block's convolutions."""
    block = f"backbone.{number}.0.block."
    first = _size(shapes, f"{block}0.0.weight")  # (hidden, in, kernel, kernel), pointwise in "mbconv"
    mobile = f"{block}2.fc1.weight" in shapes
    last = f"{block}3.0.weight" if mobile else f"{block}1.0.weight"
    return {
        "block": "mbconv" if mobile else "fused",
        "expand": round(first[0] / first[1]) if last in shapes else 1,
        "kernel": _size(shapes, f"{block}1.0.weight")[-1] if mobile else first[-1],
        "stride": stride,
        "in": first[1],
        "out": _size(shapes, last)[0] if last in shapes else first[0],
        "layers": len(_children(shapes, f"backbone.{number}.")),
    }


_READERS = {
    "prior": _read_prior,
    "decoder": _read_decoder,
    "vqgan": _read_vqgan,
    "compressor": _read_compressor,
}


def _heads(width: int, head_dim: int | None) -> tuple[int, list[str]]:
    """(number of heads, what was assumed) in attention of a width."""
    each = head_dim or _HEAD_DIM
    if width % each:
        raise CheckpointError(
            f"attention of width {width} cannot have heads of {each}. Give --head-dim, a divisor of it."
        )
    return width // each, [] if head_dim else [f"head_dim {_HEAD_DIM}"]


def _folded(channels: int, name: str) -> int:
    """Channels before 2 x 2 cells were folded into them."""
    if channels % _PATCH**2:
        raise CheckpointError(f"{name}: {channels} channels are no multiple of {_PATCH**2}.")
    return channels // _PATCH**2


def _kinds(shapes: _Shapes, prefix: str) -> str:
    """The blocks of a level as letters: C convolution, T timestep, A attention. Samplers are left out."""
    letters = {"depthwise.weight": "C", "mapper.weight": "T", "kv_mapper.1.weight": "A"}
    found = {
        number: letter
        for number in _children(shapes, prefix)
        for name, letter in letters.items()
        if f"{prefix}{number}.{name}" in shapes
    }
    return "".join(found[number] for number in sorted(found))


def _period(letters: str) -> tuple[str, int]:
    """The shortest piece that `letters` repeats, and how often: "CTACTA" -> ("CTA", 2)."""
    for size in range(1, len(letters) + 1):
        if letters[:size] * (len(letters) // size) == letters:
            return letters[:size], len(letters) // size
    return letters, 0


def _children(names: Iterable[str], prefix: str) -> list[int]:
    """The numbers that follow `prefix` in names, in order."""
    rest = (name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix))
    return sorted({int(number) for number in rest if number.isdigit()})


def _first(shapes: _Shapes, pattern: str) -> str:
    for name in shapes:
        if re.fullmatch(pattern, name):
            return name
    raise CheckpointError(f"no tensor called {pattern!r}: not a whole state dict.")


def _size(shapes: _Shapes, name: str) -> tuple[int, ...]:
    """The shape of a matrix or kernel (two or more dimensions, none of them 0)."""
    shape = shapes.get(name)
    if shape is None:
        raise CheckpointError(f"{name}: is missing: not a whole state dict.")
    if len(shape) < 2 or not math.prod(shape):
        raise CheckpointError(f"{name}: of shape {tuple(shape)}, where a matrix or kernel is expected.")
    return shape
