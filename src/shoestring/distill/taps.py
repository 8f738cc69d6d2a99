"""Features of a teacher and its student, matched by the role of the module that puts them out.

    role             modules of a U-Net                   the feature, batch first
    self_attention   transformer_blocks.j.attn1           its output, before the residual is added
    cross_attention  transformer_blocks.j.attn2           the same
    feed_forward     transformer_blocks.j.ff              the same
    resnet           resnets.k                            with its residual
    block            down_blocks.i, up_blocks.i           output of the stage (BK-SDM, arXiv 2305.15798)
    outer_blocks     first down block, last up block      the same: DW-1 and UP-3 of KOALA (arXiv 2312.04005)

A student's module is held against the one of the teacher that it starts from. A mid block that the student
lacks has no partner and is left out; `block` leaves it out always, as BK-SDM does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shoestring.errors import RecipeError
from shoestring.models.unet_presets import StudentSpec
from shoestring.models.unet_students import layout, teacher_module

_PATTERNS = {
    "self_attention": r".*\.transformer_blocks\.\d+\.attn1",
    "cross_attention": r".*\.transformer_blocks\.\d+\.attn2",
    "feed_forward": r".*\.transformer_blocks\.\d+\.ff",
    "resnet": r".*\.resnets\.\d+",
    "block": r"(down|up)_blocks\.\d+",
    "outer_blocks": r"down_blocks\.0|up_blocks\.{last}",
}
ROLES = tuple(_PATTERNS)


class TapPair(NamedTuple):
    """Names of a module of the student and of the teacher's whose outputs should be alike."""

    role: str
    student: str
    teacher: str


def tap_pairs(
    student_config: Mapping[str, Any],
    teacher_config: Mapping[str, Any],
    spec: StudentSpec,
    roles: Sequence[str],
) -> list[TapPair]:
    """The pairs of these roles, in the order of `roles` and of the student's modules.

    Raises `RecipeError` for a role that is unknown, matches nothing, or adds nothing to those before it.
    """
    with torch.device("meta"):
        names = [name for name, _ in UNet2DConditionModel.from_config(student_config).named_modules()]
    pairs: dict[str, TapPair] = {}
    for role in roles:
        if role not in ROLES:
            raise RecipeError(f"objective.taps {role!r}: unknown. Use {', '.join(ROLES)}.")
        pattern = _PATTERNS[role].replace("{last}", str(len(student_config["up_block_types"]) - 1))
        found = [name for name in names if re.fullmatch(pattern, name)]
        if not found:
            raise RecipeError(f"objective.taps {role!r}: the student has no such module. Leave it out.")
        if pairs.keys() >= set(found):
            raise RecipeError(f"objective.taps {role!r}: other taps hold all of it. Name it once.")
        for name in found:
            pairs.setdefault(name, _pair(role, name, student_config, teacher_config, spec))
    return list(pairs.values())


def _pair(
    role: str,
    name: str,
    student_config: Mapping[str, Any],
    teacher_config: Mapping[str, Any],
    spec: StudentSpec,
) -> TapPair:
    """A student's module with its partner.

    The innermost down block of a student without the teacher's inner stage halves nothing more, so that its
    output fits no output of the teacher's: the last attention's projection stands in, as in BK-SDM's script.
    """
    inner = len(student_config["down_block_types"]) - 1
    if spec.inner_stage or name != f"down_blocks.{inner}":
        return TapPair(role, name, teacher_module(name, spec, teacher_config))
    own, theirs = layout(student_config).down[inner], layout(teacher_config).down[inner]
    place = "attentions.{}.proj_out" if own[-1] else "resnets.{}"
    return TapPair(role, *(f"{name}.{place.format(len(each) - 1)}" for each in (own, theirs)))


class Taps:
    """Catches the outputs of some modules of a network while asked to.

    The hooks sit on the modules themselves, so it does not matter in what the network is wrapped or called
    (DDP, FSDP2, `torch.compile`). They are deaf outside of `catching`: what gradient checkpointing computes
    again in the backward pass is not caught a second time. Raises `RecipeError` for a module there is not.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        network = unwrapped(network)
        self._caught: dict[str, Tensor] | None = None
        for name in names:
            try:
                module = network.get_submodule(name)
            except AttributeError:
                raise RecipeError(
                    f"objective.taps: {type(network).__name__} has no module {name}. "
                    "The teacher's or student's weights are not of the configuration given."
                ) from None
            module.register_forward_hook(partial(self._catch, name))

    @contextmanager
    def catching(self) -> Iterator[dict[str, Tensor]]:
        """Within, each module's output goes into the dictionary yielded, under the module's name."""
        caught = self._caught = {}
        try:
            yield caught
        finally:
            self._caught = None

    def _catch(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._caught is not None:
            self._caught[name] = output[0] if isinstance(output, tuple) else output


def unwrapped(network: nn.Module) -> nn.Module:
    """The network that DDP or `torch.compile` was given; itself where neither was."""
    while True:
        if isinstance(network, DistributedDataParallel):
            network = network.module
        elif isinstance(network, torch._dynamo.OptimizedModule):
            network = network._orig_mod
        else:
            return network


def check_gradients(features: Mapping[str, Tensor]) -> None:
    """Raise `RecipeError` for features of a student in training through which no gradient can flow.

    Reentrant checkpointing computes its inside without gradients and so loses such a term without a word.
    """
    dead = [name for name, feature in features.items() if not feature.requires_grad]
    if torch.is_grad_enabled() and dead:
        raise RecipeError(
            f"objective.taps: no gradient reaches {len(dead)} of the student's {len(features)} taps, such "
            f"as {dead[0]}. Checkpoint with use_reentrant=False; where only some weights are trained (LoRA), "
            "leave out taps that lie before all of them."
        )
