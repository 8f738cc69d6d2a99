"""What a call of our pipelines begins and ends with: its checks, the first noise, latents to be decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from shoestring.models.autoencoders import LatentScaling, as_scaling

Generators = torch.Generator | list[torch.Generator] | None
Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]


class CallState:
    """What a pipeline tells of the call under way, as diffusers' own do; mixed in."""

    _guidance_scale: float = 1.0
    _num_timesteps: int = 0
    _current_timestep: Tensor | None = None
    _interrupt: bool = False

    @property
    def guidance_scale(self) -> float:
        """w of the call under way: out = null + w (text - null)."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Evaluations of the call under way."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The time being evaluated, None outside a call."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` to True in a callback to stop after the step."""
        return self._interrupt


def check_call(
    prompt: str | list[str] | None,
    prompt_embeds: Tensor | None,
    height: int,
    width: int,
    multiple: int,
    num_inference_steps: int,
    callback_tensor_inputs: Sequence[str],
    known: Sequence[str],
) -> None:
    """Raise `ValueError` for inputs that cannot be sampled.

    `multiple` is what sides must be multiples of, in pixels; `known` are the tensors a callback may see.
    """
    if height % multiple or width % multiple or min(height, width) < multiple:
        nearest = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        raise ValueError(
            f"height x width {height} x {width}: both must be multiples of {multiple}; "
            f"nearest: {nearest[0]} x {nearest[1]}."
        )
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps {num_inference_steps}: must be at least 1.")
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("Give either prompt or prompt_embeds.")
    if unknown := set(callback_tensor_inputs) - set(known):
        raise ValueError(f"callback_on_step_end_tensor_inputs {sorted(unknown)}: not among {list(known)}.")


def first_noise(
    shape: tuple[int, ...], device: torch.device, generator: Generators, latents: Tensor | None
) -> Tensor:
    """Standard normal noise in float32, drawn with `generator` unless given as `latents`."""
    if isinstance(generator, list) and len(generator) not in (1, shape[0]):
        raise ValueError(f"{len(generator)} generators for {shape[0]} pictures: give one, or one for each.")
    if latents is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents of shape {tuple(latents.shape)}: must be {shape}.")
    return latents.to(device, torch.float32)


def as_decoded(config: Mapping[str, Any], autoencoder: nn.Module, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) scaled as the autoencoder wants them, from as the network was trained on them.

    They differ where `config`, a pipeline's, has `latents_mean` and `latents_std` of raw latents.
    """
    mean, std = config["latents_mean"], config["latents_std"]
    if mean is None or std is None:
        return latents
    scaling = LatentScaling(tuple(mean), tuple(1 / each for each in std))
    return as_scaling(autoencoder).apply(scaling.undo(latents))
