"""A U-Net's deep features, computed every few steps and kept in between (DeepCache, arXiv 2312.00858).

    every `interval` steps   outer down -> inner down -> (mid) -> inner up -> outer up
                                                                     | kept
    the steps in between     outer down ---- its skips -----------------> outer up

Deep features change slowly from step to step, and most of the work is there. Any U-Net of at least two stages
will do, without a mid block and with one layer a stage too. It pays where there are many steps: with ten or
fewer there is little left to skip.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from shoestring.errors import RecipeError

_NAME = "shoestring_deep_cache"


@contextmanager
def deep_cache(unet: UNet2DConditionModel, *, interval: int = 3, outer: int = 1) -> Iterator[None]:
    """Within it, every call of `unet` but each `interval`-th reuses the deep features of the last whole one.

    interval   1 or more; 1 changes nothing
    outer      how many stages, from the outermost, are computed in every step: 1 to stages - 1

    For sampling, not for training: nothing is differentiated through what is kept. A call whose timestep is
    not below the last one's, or whose input has another shape, begins a new picture and is computed whole;
    so two-stage solvers, which call twice at a timestep, skip nothing there. On a GPU, reading the timestep
    waits for the device once a step.

    Raises `RecipeError` for numbers out of range, and within another `deep_cache` of the same network;
    `TypeError` for a network that is no U-Net, and for `interval` and `outer` that are no whole numbers.
    """
    if not all(hasattr(unet, part) for part in ("down_blocks", "mid_block", "up_blocks")):
        raise TypeError(
            f"unet: of the class {type(unet).__name__}, which is no U-Net. Give the pipeline's unet."
        )
    for name, value in (("interval", interval), ("outer", outer)):
        if not isinstance(value, int):
            raise TypeError(f"{name} {value!r}: must be a whole number, such as {name}=1.")
    stages = len(unet.down_blocks)
    if interval < 1:
        raise RecipeError(f"interval {interval}: must be 1 or more, such as 3.")
    if not 1 <= outer < stages:
        raise RecipeError(f"outer {outer}: this U-Net has {stages} stages. Use 1 to {stages - 1}.")
    if HookRegistry.check_if_exists_or_initialize(unet).get_hook(_NAME) is not None:
        raise RecipeError("deep_cache: is on already for this U-Net. Leave the first before the next.")
    steps = _Steps(interval)
    mid = [] if unet.mid_block is None else [unet.mid_block]
    deep: list[nn.Module] = [*unet.down_blocks[outer:], *mid, *unet.up_blocks[:-outer]]
    hooks: list[tuple[nn.Module, ModelHook]] = [(unet, _Counting(steps)), (deep.pop(), _Keeping(steps))]
    hooks += [(block, _Skipping(steps)) for block in deep]
    for module, hook in hooks:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _NAME)
    try:
        yield
    finally:
        for module, _ in hooks:
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(_NAME, recurse=False)


@dataclass
class _Steps:
    """Where in the round of `interval` calls the network is."""

    interval: int
    place: int = 0
    timestep: float = -1.0
    shape: torch.Size = field(default_factory=torch.Size)

    @property
    def whole(self) -> bool:
        return self.place == 0

    def advance(self, sample: Tensor, timestep: Tensor | float) -> None:
        now = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        same = sample.shape == self.shape and now < self.timestep
        self.place = (self.place + 1) % self.interval if same else 0
        self.timestep, self.shape = now, sample.shape


class _Counting(ModelHook):
    """On the U-Net: decides which calls are whole."""

    def __init__(self, steps: _Steps) -> None:
        super().__init__()
        self.steps = steps

    def pre_forward(
        self, module: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        self.steps.advance(named["sample"], named["timestep"])
        return args, kwargs


class _Keeping(ModelHook):
    """On the last deep block: keeps what it gives, and gives that where it is not computed."""

    def __init__(self, steps: _Steps) -> None:
        super().__init__()
        self.steps = steps
        self.kept: Any = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.steps.whole:
            self.kept = self.fn_ref.original_forward(*args, **kwargs)
        return self.kept


class _Skipping(ModelHook):
    """On the other deep blocks: where they are not computed, zeros of the shapes they gave.

    Nothing reads those but what adds to them (a ControlNet's residuals).
    """

    def __init__(self, steps: _Steps) -> None:
        super().__init__()
        self.steps = steps
        self.shapes: Any = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.steps.whole:
            output = self.fn_ref.original_forward(*args, **kwargs)
            self.shapes = _mapped(output, lambda tensor: tensor.shape)
            return output
        like: Tensor = args[0] if args else kwargs["hidden_states"]
        return _mapped(self.shapes, like.new_zeros)


def _mapped(tree: Any, function: Any) -> Any:
    """`function` of a tensor (or shape), or of those in a block's nested tuples."""
    nested = isinstance(tree, tuple) and not isinstance(tree, torch.Size)
    return tuple(_mapped(each, function) for each in tree) if nested else function(tree)
