"""Parameters by role, optimisers for them, and learning-rate schedules counted in images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.errors import RecipeError
from shoestring.processes import ALONE, World
from shoestring.training.muon import SharedMuon

MATRIX, EXPERT, KERNEL, BOUNDARY, VECTOR = "matrix", "expert", "kernel", "boundary", "vector"
"""Roles: hidden matrices; hidden matrices of experts; kernels of convolutions; matrices and kernels where
signals enter and leave; the rest."""

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """The role of every parameter, by its name.

    A Linear layer's weight is a matrix; below a module's `experts` list, an expert's; below a module that
    some part of the model lists as its `boundary`, it is boundary; a convolution's elsewhere is a kernel.
    Everything else (norms, biases) is a vector.
    """
    boundary = _below(model, "boundary")
    experts = _below(model, "experts")
    roles: dict[str, str] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            role = VECTOR
            if parameter.ndim >= 2 and id(module) in boundary:
                role = BOUNDARY
            elif parameter.ndim > 2 and isinstance(module, _CONVOLUTIONS):
                role = KERNEL
            elif parameter.ndim == 2 and isinstance(module, nn.Linear):
                role = EXPERT if id(module) in experts else MATRIX
            roles[f"{prefix}.{name}" if prefix else name] = role
    return roles


def _below(model: nn.Module, attribute: str) -> set[int]:
    """Identities of all modules below those that any part of the model lists under `attribute`."""
    return {
        id(inner)
        for module in model.modules()
        for listed in getattr(module, attribute, ())
        for inner in listed.modules()
    }


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimiser, and its numbers; learning rates come from the phase."""

    kind: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.95
    lr_ratio: float = 10.0
    expert_lr_ratio: float = 1.0
    kernels: bool = False


@dataclass
class Optimizers:
    """One or two torch optimisers stepped as one; each group's rate is its `lr_ratio` times the phase's."""

    parts: list[torch.optim.Optimizer]
    names: dict[int, str] = field(default_factory=dict)

    def set_lr(self, lr: float) -> None:
        """Set every group's learning rate to its own ratio of `lr`."""
        for optimizer in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_ratio"]

    def step(self) -> None:
        for optimizer in self.parts:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.parts:
            optimizer.zero_grad(set_to_none=True)

    def parameters(self) -> Iterator[Tensor]:
        """Every parameter that is optimised."""
        for optimizer in self.parts:
            if isinstance(optimizer, SharedMuon):
                yield from optimizer.parameters()
            else:
                yield from (parameter for group in optimizer.param_groups for parameter in group["params"])

    def state(self) -> dict[str, Tensor]:
        """The optimisers' tensors under `<parameter>/<name>`; parameters not stepped yet have none."""
        return {
            f"{self.names[id(parameter)]}/{key}": value
            for optimizer in self.parts
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def prepare(self, names: Sequence[str]) -> None:
        """Make the (zero) tensors that `state` gave under `names`, to be filled from a checkpoint."""
        keys: dict[str, list[str]] = {}
        for name in names:
            parameter, key = name.rsplit("/", 1)
            keys.setdefault(parameter, []).append(key)
        for optimizer in self.parts:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = {
                        key: _step_count(parameter, group) if key == "step" else torch.zeros_like(parameter)
                        for key in keys.get(self.names[id(parameter)], ())
                    }


def _step_count(parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """AdamW's count of steps: on the CPU, but for the fused kernel."""
    return torch.zeros((), device=parameter.device if group.get("fused") else "cpu")


def make_optimizers(model: nn.Module, settings: OptimizerSettings, world: World = ALONE) -> Optimizers:
    """AdamW for everything, or Muon for hidden matrices (with `kernels`, these too) and AdamW for the rest.

    The model may be sharded over the processes of `world` already.

    Weight decay applies to matrices, hidden and boundary, not to norms and biases. Raises `RecipeError` for
    an unknown kind.
    """
    if settings.kind not in ("adamw", "muon"):
        raise RecipeError(f"optimizer.kind {settings.kind!r}: unknown. Use adamw or muon.")
    by_role: dict[str, list[Tensor]] = {role: [] for role in (MATRIX, EXPERT, KERNEL, BOUNDARY, VECTOR)}
    names: dict[int, str] = {}
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_role[roles[name]].append(parameter)
            names[id(parameter)] = name

    def group(role: str, ratio: float, decay: float) -> dict[str, Any]:
        return {"params": by_role[role], "lr_ratio": ratio, "weight_decay": decay}

    muon = settings.kind == "muon"
    ratio = settings.lr_ratio if muon else 1.0
    if not (muon and settings.kernels):
        by_role[BOUNDARY] += by_role.pop(KERNEL)
    hidden = [
        *([group(KERNEL, ratio, settings.weight_decay)] if KERNEL in by_role else []),
        group(MATRIX, ratio, settings.weight_decay),
        group(EXPERT, ratio * settings.expert_lr_ratio, settings.weight_decay),
    ]
    rest = [group(BOUNDARY, 1.0, settings.weight_decay), group(VECTOR, 1.0, 0.0)]
    adamw_groups = [g for g in (rest if muon else hidden + rest) if g["params"]]
    parts: list[torch.optim.Optimizer] = []
    if muon and (muon_groups := [g for g in hidden if g["params"]]):
        shared = SharedMuon(muon_groups, settings.momentum, world)
        names |= {id(matrix): names[id(kernel)] for matrix, kernel in shared.kernels}
        parts.append(shared)
    if adamw_groups:
        fused = all(p.device.type == "cuda" for group in adamw_groups for p in group["params"])
        parts.append(
            torch.optim.AdamW(
                adamw_groups, lr=1.0, betas=settings.betas, eps=settings.eps, fused=fused or None
            )
        )
    return Optimizers(parts, names)


def lr_factor(schedule: str, images: int, total: int, warmup: int, final: float) -> float:
    """The share of the phase's learning rate after `images` of `total`.

    Linear warm-up over `warmup` images; then `constant`, or `cosine` or `linear` down to `final` at the end.
    """
    if images < warmup:
        return images / warmup
    done = min(1.0, (images - warmup) / max(1, total - warmup))
    if schedule == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "linear":
        return final + (1 - final) * (1 - done)
    return 1.0
