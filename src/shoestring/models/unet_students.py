"""Students of a U-Net: a smaller network cut out of a larger one of the same kind, with its weights.

    teacher's config + StudentSpec --student_config--> student's config
    name in the student            --teacher_key-----> name of the same part in the teacher

Which layers stay (N of the teacher's, n of the student's in a stage):

    down blocks   k <- k, the first n: the first takes the width of the stage above
    up blocks     0 <- 0, which takes the stage below; k <- k + N - n after it: those meet the same skip
                  connections in both networks, and the last is the only one whose input width fits
    attention     d of D transformer blocks by `depth_map`; norm and projections around them are copied

For one of two layers that is BK-SDM's map (0 and 2 of an up block's three) and KOALA's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.quiet import cast
from shoestring.models.unet_presets import (
    PRESETS,
    SD14,
    SD21,
    SDXL,
    DepthMap,
    StudentSpec,
    preset_spec,
    preset_teacher,
)

__all__ = [
    "PRESETS",
    "SD14",
    "SD21",
    "SDXL",
    "Layout",
    "StudentSpec",
    "arguments",
    "copy_weights",
    "cut_student",
    "kept_block",
    "layout",
    "preset_config",
    "preset_spec",
    "student_config",
    "teacher_key",
    "teacher_module",
]

_WITH_DEPTH = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
_BLOCKS = (
    *_WITH_DEPTH,
    *("DownBlock2D", "UpBlock2D", "AttnDownBlock2D", "AttnUpBlock2D"),
    *("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"),
    *("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
)
"""Blocks that are a row of layers, one skip connection each; the K and Skip blocks are built otherwise."""

_REVERSE = "reverse_transformer_layers_per_block"
_GUIDANCE = "time_embedding.cond_proj.weight"
_PER_STAGE = (
    *("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "attention_head_dim"),
    *("num_attention_heads", "cross_attention_dim", "only_cross_attention", "transformer_layers_per_block"),
    _REVERSE,
)
_INNERMOST_FIRST = ("up_block_types", _REVERSE)
_ARGUMENTS = {
    name: parameter.default
    for name, parameter in inspect.signature(UNet2DConditionModel.__init__).parameters.items()
    if name != "self"
}


@dataclass(frozen=True)
class Layout:
    """Transformer blocks in every layer of a U-Net, 0 where a layer has none.

    `down[stage][layer]` from the outermost stage inwards, `up[stage][layer]` from the innermost outwards;
    `mid` is None where there is no mid block.
    """

    down: tuple[tuple[int, ...], ...]
    mid: int | None
    up: tuple[tuple[int, ...], ...]


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a `config.json` the constructor takes: no class name, no version, nothing unknown."""
    return {name: config[name] for name in _ARGUMENTS if name in config}


def layout(config: Mapping[str, Any]) -> Layout:
    """How many layers and transformer blocks the U-Net of `config` has, and where.

    Raises `RecipeError` for a U-Net built of other blocks than rows of layers.
    """
    full = _ARGUMENTS | arguments(config)
    _check_kind(full)
    stages = len(full["down_block_types"])
    layers = _each(full["layers_per_block"], stages)
    down = _each(full["transformer_layers_per_block"], stages)
    up = full[_REVERSE] or down[::-1]
    mid = full["mid_block_type"]
    return Layout(
        down=tuple(map(_depths, full["down_block_types"], layers, down)),
        mid=_first(down[-1]) if mid == "UNetMidBlock2DCrossAttn" else None if mid is None else 0,
        up=tuple(map(_depths, full["up_block_types"], [count + 1 for count in layers[::-1]], up)),
    )


def preset_config(name: str) -> dict[str, Any]:
    """Configuration of the student called `name`, cut from the teacher it was published for."""
    return student_config(preset_teacher(name), preset_spec(name))


def student_config(teacher_config: Mapping[str, Any], spec: StudentSpec) -> dict[str, Any]:
    """Arguments of the student's `UNet2DConditionModel`.

    Raises `RecipeError` where `spec` asks for more than the teacher has, or for what no such network can be.
    """
    config = arguments(teacher_config)
    whole = layout(config)
    if not spec.inner_stage:
        config = _without_inner_stage(config, spec)
        whole = Layout(whole.down[:-1], whole.mid, whole.up[1:])
    if spec.mid == "drop":
        config["mid_block_type"] = None
    elif spec.mid == "resnets":
        config["mid_block_type"] = _mid_of_resnets(config)
    if spec.layers_per_block is not None:
        config["layers_per_block"] = _fewer_layers(config, whole, spec)
    if (spec.layers_per_block, spec.depth, spec.up_depth) != (None, None, None):
        config |= _shallower(config, whole, spec)
    return config


def teacher_key(student_key: str, spec: StudentSpec, teacher_config: Mapping[str, Any]) -> str:
    """The teacher's tensor that a student's tensor starts from; both by their names in the state dict.

    Names outside of the blocks are the same in both, known or not. Raises `RecipeError` as `student_config`
    does, `ValueError` for a block, a layer or a transformer block that the student does not have.
    """
    return _Places(spec, teacher_config).in_teacher(student_key)


def teacher_module(student_module: str, spec: StudentSpec, teacher_config: Mapping[str, Any]) -> str:
    """As `teacher_key`, for modules: `up_blocks.0.attentions.1` -> `up_blocks.0.attentions.2`."""
    return _Places(spec, teacher_config).in_teacher(student_module)


def kept_block(place: int, kept: int, of: int, depth_map: DepthMap) -> int:
    """Which of the teacher's `of` blocks becomes block `place` of the student's `kept`; counted from 0.

    "interleave" is the paper's 1, 3, 5, 7, 9, 10 for 6 of 10 (counted from 1), continued to any number:
    evenly from the first to the last, rounded up.
    """
    if depth_map == "bottom" or kept == of:
        return place
    if depth_map == "top":
        return of - kept + place
    return -(-place * (of - 1) // max(kept - 1, 1))


def copy_weights(
    student: nn.Module,
    tensors: Mapping[str, Tensor],
    spec: StudentSpec,
    teacher_config: Mapping[str, Any],
    *,
    name: str = "teacher",
) -> None:
    """Copy the teacher's `tensors` into `student`, cast to its number type, one tensor at a time.

    With a mapping that reads when asked, no more of the teacher than one tensor is ever in memory. What was
    added to the student - an adapter (LoRA), an embedding of the guidance scale - stays as it is. `name` is
    what messages call the teacher. Raises `CheckpointError` where its names or a tensor's shape do not belong
    to `teacher_config`, a tensor holds NaN or infinity, or the student is not of `student_config`.
    """
    places = _Places(spec, teacher_config)
    with torch.device("meta"):
        whole = UNet2DConditionModel(**arguments(teacher_config)).state_dict()
        cut = UNet2DConditionModel(**student_config(teacher_config, spec)).state_dict()
    own = _without_additions(student.state_dict(), cut)
    _check_names(own, cut, "the student")
    copy_renamed(own, tensors, {each: places.in_teacher(each) for each in own}, whole, name=name)


def cut_student(
    tensors: Mapping[str, Tensor],
    spec: StudentSpec,
    teacher_config: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    name: str = "teacher",
) -> UNet2DConditionModel:
    """The student with its teacher's weights, in `dtype` on the CPU; memory beside it: one tensor.

    `name` is what messages call the teacher; raises as `student_config` and `copy_weights` do.
    """
    with torch.device("meta"):
        student = UNet2DConditionModel(**student_config(teacher_config, spec))
    student = cast(student, dtype).to_empty(device="cpu")
    copy_weights(student, tensors, spec, teacher_config, name=name)
    return student


def copy_renamed(
    targets: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    teacher: Mapping[str, Any],
    *,
    name: str = "teacher",
) -> None:
    """Copy `tensors[names[...]]` into each of `targets`, one at a time.

    Raises `CheckpointError`, which calls the teacher `name`, where `tensors` has other names than `teacher`,
    or one is of another shape or not finite.
    """
    _check_names(tensors, teacher, name)
    for each, target in targets.items():  # a call for each, whose end lets go of the tensor
        _copy(target, tensors[names[each]], f"{name}: its {names[each]}")


class _Places:
    """Where each part of a student lies in its teacher."""

    def __init__(self, spec: StudentSpec, teacher_config: Mapping[str, Any]) -> None:
        self.spec = spec
        self.teacher = layout(teacher_config)
        self.student = layout(student_config(teacher_config, spec))

    def in_teacher(self, name: str) -> str:
        """The teacher's name of a student's module or tensor."""
        parts = name.split(".")
        try:
            if parts[0] == "mid_block":
                return ".".join(parts[:1] + self._block(parts[1:], self.student.mid, self.teacher.mid))
            if parts[0] in {"down_blocks", "up_blocks"} and len(parts) > 1:
                return ".".join(self._stage(parts[0], int(parts[1]), parts[2:]))
        except (LookupError, TypeError):
            raise ValueError(f"{name}: no such part in this student.") from None
        return name

    def _stage(self, side: str, stage: int, rest: list[str]) -> list[str]:
        down = side == "down_blocks"
        above = stage if down or self.spec.inner_stage else stage + 1
        own, theirs = (getattr(each, side.removesuffix("_blocks")) for each in (self.student, self.teacher))
        own, theirs = own[stage], theirs[above]
        if len(rest) > 1 and rest[0] in {"resnets", "attentions"}:
            layer = int(rest[1])
            source = _kept_layer(layer, len(own), len(theirs), down=down)
            rest = [rest[0], str(source), *self._block(rest[:2] + rest[2:], own[layer], theirs[source])[2:]]
        return [side, str(above), *rest]

    def _block(self, rest: list[str], kept: int | None, of: int | None) -> list[str]:
        """`attentions.k.transformer_blocks.j...` with the teacher's j."""
        if kept is None or of is None:
            raise LookupError
        if len(rest) > 3 and rest[2] == "transformer_blocks":
            place = range(kept)[int(rest[3])]
            return [*rest[:3], str(kept_block(place, kept, of, self.spec.depth_map)), *rest[4:]]
        return rest


def _kept_layer(place: int, kept: int, of: int, *, down: bool) -> int:
    """Which of a teacher's stage of `of` layers becomes the student's layer `place`."""
    return place if down or place == 0 else place + of - kept


def _check_kind(config: Mapping[str, Any]) -> None:
    """Raise `RecipeError` for a U-Net whose layers do not lie in rows."""
    advice = "Such a U-Net cannot be cut; give one of the Stable Diffusion kind."
    for block in (*config["down_block_types"], *config["up_block_types"]):
        if block.removeprefix("UNetRes") not in _BLOCKS:
            raise RecipeError(f"teacher: a U-Net with blocks of the class {block}. {advice}")
    if config["dual_cross_attention"]:
        raise RecipeError(f"teacher: a U-Net with dual_cross_attention. {advice}")


def _without_inner_stage(config: dict[str, Any], spec: StudentSpec) -> dict[str, Any]:
    """The configuration without its innermost down and up block."""
    widths = list(config.get("block_out_channels", _ARGUMENTS["block_out_channels"]))
    if spec.mid != "drop":
        raise RecipeError(
            "student inner_stage: the mid block works on what the innermost stage makes and goes with it. "
            "Set mid to drop."
        )
    if len(widths) < 3 or widths[-1] != widths[-2]:
        raise RecipeError(
            f"student inner_stage: the teacher's stages are {widths} wide, and what remains fits only where "
            "the two innermost of three or more are equally wide, as in SD 1.x and 2.x. Keep the inner stage."
        )
    explicit = {name: _ARGUMENTS[name] for name in ("down_block_types", "up_block_types")} | {
        "block_out_channels": widths
    }
    sliced = explicit | config
    for name in _PER_STAGE:
        if isinstance(value := sliced.get(name), (list, tuple)):
            sliced[name] = list(value[1:] if name in _INNERMOST_FIRST else value[:-1])
    return sliced


def _mid_of_resnets(config: Mapping[str, Any]) -> str:
    mid = config.get("mid_block_type", _ARGUMENTS["mid_block_type"])
    if mid not in {"UNetMidBlock2DCrossAttn", "UNetMidBlock2D"}:
        raise RecipeError(
            f"student mid 'resnets': the teacher's mid block is {mid}, with no ResNet of this kind to keep. "
            "Use keep or drop."
        )
    return "UNetMidBlock2D"


def _fewer_layers(config: Mapping[str, Any], teacher: Layout, spec: StudentSpec) -> int | list[int]:
    """The student's `layers_per_block`."""
    given = spec.layers_per_block
    assert given is not None
    theirs = [len(layers) for layers in teacher.down]
    wanted = _each(given, len(theirs), "layers_per_block")
    for stage, (count, most) in enumerate(zip(wanted, theirs, strict=True)):
        if count > most:
            raise RecipeError(
                f"student layers_per_block {given}: the teacher's stage {stage} has {most}. "
                f"Use 1 to {most} there."
            )
    return given if isinstance(given, int) else list(given)


def _shallower(config: Mapping[str, Any], teacher: Layout, spec: StudentSpec) -> dict[str, Any]:
    """The student's transformer depths: flat where a number a stage says all, else a number a layer."""
    full = _ARGUMENTS | dict(config)
    if spec.depth is spec.up_depth is full[_REVERSE] is None:
        return {}  # a number a stage, which fewer layers share
    stages = len(teacher.down)
    layers = _each(full["layers_per_block"], stages)
    written = _each(full["transformer_layers_per_block"], stages)  # of stages without attention and the mid
    asked = written if spec.depth is None else _each(spec.depth, stages, "depth")
    asked_up = _up_depths(spec, stages)
    down = [
        _stage_depths(
            asked[i] if spec.depth is not None else None, layers[i], teacher.down[i], f"down_blocks.{i}"
        )
        for i in range(stages)
    ]
    up = [
        _stage_depths(asked_up[k], layers[::-1][k] + 1, teacher.up[k], f"up_blocks.{k}", up=True)
        for k in range(stages)
    ]
    _check_mid(full, asked, down, teacher, spec)
    if all({*inner, *outer} == {inner[0]} for inner, outer in zip(down, up[::-1], strict=True)):
        numbers = [each[0] or _first(asked[i]) for i, each in enumerate(down)]
        return {"transformer_layers_per_block": numbers} | dict.fromkeys({_REVERSE} & config.keys())
    nested = [list(each) if any(each) else _first(asked[i]) for i, each in enumerate(down)]
    outward = [list(each) if any(each) else _first(asked[-1 - k]) for k, each in enumerate(up)]
    return {"transformer_layers_per_block": nested, _REVERSE: outward}


def _up_depths(spec: StudentSpec, stages: int) -> Sequence[Any]:
    """What the spec says of each up block's depth, None where nothing."""
    if spec.up_depth is not None:
        return _each(spec.up_depth, stages, "up_depth")
    if spec.depth is None:
        return [None] * stages
    if any(isinstance(entry, tuple) for entry in spec.depth):
        raise RecipeError(
            f"student depth {spec.depth}: with a number a layer, say up_depth too: an up block has one more."
        )
    return spec.depth[::-1]


def _stage_depths(
    asked: int | tuple[int, ...] | None,
    layers: int,
    teacher: tuple[int, ...],
    place: str,
    *,
    up: bool = False,
) -> tuple[int, ...]:
    """Transformer blocks in each layer of one of the student's blocks; checked against the teacher's."""
    sources = [_kept_layer(k, layers, len(teacher), down=not up) for k in range(layers)]
    theirs = tuple(teacher[source] for source in sources)
    if asked is None or not any(theirs):
        return theirs
    wanted = tuple(_each(asked, layers, f"depth of {place}"))
    for number, most, source in zip(wanted, theirs, sources, strict=True):
        if not 1 <= number <= most:
            raise RecipeError(
                f"student depth {number} in {place}: the teacher's {place}.attentions.{source} has {most} "
                f"transformer blocks. Use 1 to {most}."
            )
    return wanted


def _check_mid(
    config: Mapping[str, Any],
    asked: Sequence[Any],
    down: Sequence[tuple[int, ...]],
    teacher: Layout,
    spec: StudentSpec,
) -> None:
    """Raise `RecipeError` unless the mid block's depth, the innermost stage's first, fits the teacher's."""
    if config["mid_block_type"] != "UNetMidBlock2DCrossAttn":
        return
    depth, most = down[-1][0] or _first(asked[-1]), teacher.mid or 0
    if not 1 <= depth <= most:
        raise RecipeError(
            f"student depth {spec.depth}: its last number is the mid block's too, and the teacher's has "
            f"{most} transformer blocks. Use 1 to {most}, or drop the mid block."
        )


def _depths(kind: str, layers: int, depth: Any) -> tuple[int, ...]:
    """Transformer blocks in each layer of a block, as diffusers reads a stage's entry."""
    if kind.removeprefix("UNetRes") not in _WITH_DEPTH:
        return (0,) * layers
    return (depth,) * layers if isinstance(depth, int) else tuple(depth[:layers])


def _each(value: Any, count: int, name: str = "") -> list[Any]:
    """One entry for each of `count`: a number is shared, a list is taken as it is."""
    if isinstance(value, int):
        return [value] * count
    if len(value) != count:
        raise RecipeError(f"student {name} {value}: {len(value)} numbers, and {count} are needed.")
    return list(value)


def _first(depth: int | Sequence[int]) -> int:
    return depth if isinstance(depth, int) else depth[0]


def _copy(target: Tensor, source: Tensor, name: str) -> None:
    if source.shape != target.shape:
        raise CheckpointError(
            f"{name} is {tuple(source.shape)}, not {tuple(target.shape)} as its configuration says. "
            "Give weights and the config.json that belongs to them."
        )
    with torch.no_grad():
        target.copy_(source)
    if not all(end.isfinite() for end in target.aminmax()):  # which NaN passes through
        raise CheckpointError(
            f"{name} holds NaN or infinity in {str(target.dtype).removeprefix('torch.')}. "
            "Give whole weights, or another number type where these are too large for it."
        )


def _without_additions(state: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that a U-Net was built with, by the names they had then: peft puts a layer in between."""
    own = {name.replace(".base_layer.", "."): each for name, each in state.items() if ".lora_" not in name}
    return {name: each for name, each in own.items() if name != _GUIDANCE or name in plain}


def _check_names(given: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Raise `CheckpointError` unless both have the same names."""
    for problem, names in (
        ("lacks", wanted.keys() - given.keys()),
        ("has besides", given.keys() - wanted.keys()),
    ):
        if names:
            raise CheckpointError(
                f"{what}: {problem} {len(names)} tensors, such as {min(names)}: not the network of this "
                "configuration. Give weights and the configuration that belongs to them."
            )
