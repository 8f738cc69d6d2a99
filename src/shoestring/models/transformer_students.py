"""Students of a transformer: fewer of its blocks, everything else copied (KOALA, arXiv 2312.04005v2, A.4).

For MicroDiT and for the transformers of diffusers that keep `num_layers` blocks in `transformer_blocks`
(PixArt, DiT and others). The paper's cut keeps the first 14 of 28: `StudentSpec(depth=(14,))`.

DiT itself takes the conditioning of its output from its first block, so that "top" changes more there than
the blocks that go.

MicroDiT's blocks differ in width and in whether they have experts: the student's configuration says each kept
block's own, so that every tensor fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor

from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.microdit import MicroDiT, expert_positions, spaced
from shoestring.models.quiet import cast
from shoestring.models.unet_presets import StudentSpec
from shoestring.models.unet_students import copy_renamed, kept_block

_BLOCKS = "transformer_blocks"
_WHOLE = StudentSpec()


def transformer_student_config(
    teacher_config: Mapping[str, Any], spec: StudentSpec, *, name: str = "teacher"
) -> dict[str, Any]:
    """The student's configuration, with the teacher's class in it; `name` is what messages call the teacher.

    Raises `RecipeError` for a spec that is not one depth, or a depth the teacher does not have.
    """
    # diffusers notes there which arguments were left at their defaults, and would put those back
    config = {key: value for key, value in teacher_config.items() if key != "_use_default_values"}
    argument, of = _blocks_of(config, name)
    depth = _depth(spec, of)
    config[argument] = depth
    if argument == "depth":
        kept = [kept_block(place, depth, of, spec.depth_map) for place in range(depth)]
        experts = expert_positions(config["expert_blocks"], of, last=False)
        config["expert_blocks"] = [place for place, source in enumerate(kept) if source in experts]
        for ratio in ("qkv_ratio", "mlp_ratio"):
            each = spaced(config[ratio], of)
            config[ratio] = each[0] if len({*each}) == 1 else [each[source] for source in kept]
    return config


def transformer_teacher_key(student_key: str, spec: StudentSpec, teacher_config: Mapping[str, Any]) -> str:
    """The teacher's name of a student's tensor or module.

    Raises `RecipeError` as `transformer_student_config` does, `ValueError` for a block the student has not.
    """
    _, of = _blocks_of(teacher_config)
    depth = _depth(spec, of)
    parts = student_key.split(".")
    if len(parts) < 2 or parts[0] != _BLOCKS:
        return student_key
    if not int(parts[1]) < depth:
        raise ValueError(f"{student_key}: no such part in this student.")
    return ".".join([parts[0], str(kept_block(int(parts[1]), depth, of, spec.depth_map)), *parts[2:]])


def cut_transformer(
    tensors: Mapping[str, Tensor],
    spec: StudentSpec,
    teacher_config: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    name: str = "teacher",
) -> ModelMixin:
    """The student with its teacher's weights, in `dtype` on the CPU.

    It is built in float32, since positions are computed then, and cast; memory beside that: one tensor.
    `teacher_config` names its class (`_class_name`), which is MicroDiT's or one of diffusers; `name` is what
    messages call the teacher. Raises `CheckpointError` where the weights do not belong to it, and
    `RecipeError` where its blocks are not alike (some families build the last one otherwise) or lie
    elsewhere.
    """
    kind = _class_of(teacher_config, name)
    config = transformer_student_config(teacher_config, spec, name=name)
    with torch.device("meta"):
        teacher = kind.from_config(teacher_config)
        cut = kind.from_config(config).state_dict()
    whole = teacher.state_dict()
    odd = _misfit(cut, whole, spec, teacher_config)
    if odd or len(getattr(teacher, _BLOCKS, ())) != _blocks_of(teacher_config, name)[1]:
        top = replace(spec, depth_map="top")
        raise RecipeError(
            f"{name}: the blocks of its {kind.__name__} are not a row of equals"
            + (f" (its {odd} does not fit the student's block). " if odd else ". ")
            + (
                "Its last block is built otherwise: keep that, with the depth map top."
                if odd and not _misfit(cut, whole, top, teacher_config)
                else "It cannot be cut by depth."
            )
        )
    student = cast(kind.from_config(config), dtype)  # not to_empty: positions are computed when it is built
    names = {each: transformer_teacher_key(each, spec, teacher_config) for each in cut}
    copy_renamed(student.state_dict(), tensors, names, whole, name=name)
    return student.eval()


def _misfit(
    cut: Mapping[str, Tensor], whole: Mapping[str, Tensor], spec: StudentSpec, config: Mapping[str, Any]
) -> str | None:
    """The teacher's name of a tensor that the student would take and cannot."""
    for name, tensor in cut.items():
        source = transformer_teacher_key(name, spec, config)
        if source not in whole or whole[source].shape != tensor.shape:
            return source
    return None


def _blocks_of(config: Mapping[str, Any], name: str = "teacher") -> tuple[str, int]:
    """The argument that says how many blocks there are, and its value."""
    for argument in ("num_layers", "depth"):
        if isinstance(config.get(argument), int):
            return argument, int(config[argument])
    raise RecipeError(
        f"{name}: its network, {config.get('_class_name', 'of no class')}, is neither a U-Net of the Stable "
        "Diffusion kind nor a transformer whose configuration has num_layers or depth. Give one of those."
    )


def _depth(spec: StudentSpec, of: int) -> int:
    for name in ("layers_per_block", "up_depth", "mid", "inner_stage"):
        if getattr(spec, name) != getattr(_WHOLE, name):
            raise RecipeError(
                f"student {name}: is for a U-Net; a transformer is cut by depth alone. Leave it out."
            )
    if spec.depth is None:
        return of
    if len(spec.depth) != 1 or not isinstance(spec.depth[0], int) or not 1 <= spec.depth[0] <= of:
        raise RecipeError(
            f"student depth {spec.depth}: the teacher has {of} blocks. Give one number, 1 to {of}."
        )
    return spec.depth[0]


def _class_of(config: Mapping[str, Any], teacher: str) -> type[ModelMixin]:
    name = str(config.get("_class_name"))
    kind = MicroDiT if name == MicroDiT.__name__ else getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise CheckpointError(
            f"{teacher}: its network is of the class {name}, neither MicroDiT nor a network of diffusers. "
            "Give one of those."
        )
    return kind
