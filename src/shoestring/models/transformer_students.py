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
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor

from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.microdit import MicroDiT, expert_positions, spaced
from shoestring.models.unet_presets import StudentSpec
from shoestring.models.unet_students import copy_renamed, kept_block

_BLOCKS = "transformer_blocks"


def transformer_student_config(teacher_config: Mapping[str, Any], spec: StudentSpec) -> dict[str, Any]:
    """The student's configuration, with the teacher's class in it.

    Raises `RecipeError` for a spec that is not one depth, or a depth the teacher does not have.
    """
    # diffusers notes there which arguments were left at their defaults, and would put those back
    config = {key: value for key, value in teacher_config.items() if key != "_use_default_values"}
    name, of = _blocks_of(config)
    depth = _depth(spec, of)
    config[name] = depth
    if name == "depth":
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
) -> ModelMixin:
    """The student with its teacher's weights, in `dtype` on the CPU.

    It is built in float32, since positions are computed then, and cast; memory beside that: one tensor.
    `teacher_config` names its class (`_class_name`), which is MicroDiT's or one of diffusers. Raises
    `CheckpointError` where the weights do not belong to it, and `RecipeError` where its blocks are not alike
    (some families build the last one otherwise) or lie elsewhere.
    """
    kind, config = _class_of(teacher_config), transformer_student_config(teacher_config, spec)
    with torch.device("meta"):
        teacher = kind.from_config(teacher_config)
        cut = kind.from_config(config).state_dict()
    whole = teacher.state_dict()
    names = {name: transformer_teacher_key(name, spec, teacher_config) for name in cut}
    odd = [
        name
        for name, source in names.items()
        if source not in whole or whole[source].shape != cut[name].shape
    ]
    if odd or len(getattr(teacher, _BLOCKS, ())) != _blocks_of(teacher_config)[1]:
        raise RecipeError(
            f"teacher: the blocks of a {kind.__name__} are not a row of equals"
            + (f" ({odd[0]} does not fit {names[odd[0]]})" if odd else "")
            + ". It cannot be cut by depth."
        )
    student = kind.from_config(config).to(dtype)  # not to_empty: positions are computed when it is built
    copy_renamed(student.state_dict(), tensors, names, whole)
    return student.eval()


def _blocks_of(config: Mapping[str, Any]) -> tuple[str, int]:
    """The argument that says how many blocks there are, and its value."""
    for name in ("num_layers", "depth"):
        if isinstance(config.get(name), int):
            return name, int(config[name])
    raise RecipeError(
        f"teacher: a {config.get('_class_name', 'network')} whose configuration has neither num_layers nor "
        "depth. Give a MicroDiT or a transformer of diffusers with a row of equal blocks."
    )


def _depth(spec: StudentSpec, of: int) -> int:
    for name in ("layers_per_block", "up_depth"):
        if getattr(spec, name) is not None:
            raise RecipeError(
                f"student {name}: is for a U-Net; a transformer is cut by depth alone. Leave it out."
            )
    if spec.mid != "keep" or not spec.inner_stage:
        raise RecipeError("student mid, inner_stage: are for a U-Net; a transformer is cut by depth alone.")
    if spec.depth is None:
        return of
    if len(spec.depth) != 1 or not isinstance(spec.depth[0], int) or not 1 <= spec.depth[0] <= of:
        raise RecipeError(
            f"student depth {spec.depth}: the teacher has {of} blocks. Give one number, 1 to {of}."
        )
    return spec.depth[0]


def _class_of(config: Mapping[str, Any]) -> type[ModelMixin]:
    name = str(config.get("_class_name"))
    kind = MicroDiT if name == MicroDiT.__name__ else getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise CheckpointError(f"teacher: a {name}, which is neither MicroDiT nor a network of diffusers.")
    return kind
