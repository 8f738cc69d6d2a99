"""What Stage C and Stage B share when they sample: prompts, guidance, times and the loop over them.

Latents, times and the scheduler stay in float32 whatever the networks' type: a time rounded to bfloat16 is
another point of the schedule (and of the embedding, which multiplies it by 10,000).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.models.text_encoders import TextEncoder
from shoestring.objectives.cosine import default_timesteps, published_timesteps
from shoestring.pipelines.calls import Callback, CallState, Generators
from shoestring.pipelines.prompts import Text, encode_prompts, repeat_text, stack_text

TIMES: dict[str, Callable[[], list[float]]] = {
    "default": default_timesteps,
    "published": published_timesteps,
}
"""Named lists of Stage C's times: diffusers' default (29 steps) and the authors' (30)."""

Times = str | Sequence[float] | Tensor | None


class DenoisingStage(CallState):
    """One diffusion stage of a cascade, mixed into its pipeline.

    The pipeline has `scheduler`, `text_encoder`, `tokenizer` and `text_pad` and `max_tokens` in its
    configuration. `tensors` of a call are what a callback may see and replace.
    """

    config: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any
    progress_bar: Callable[..., Any]
    output_types: tuple[str, ...]
    _callback_tensor_inputs: list[str]

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call under way evaluates the unconditional too."""
        return self._guidance_scale > 1

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """A line for each prompt that is longer than the text encoder takes."""
        return self._captions().warnings(prompts)

    def _captions(self) -> TextEncoder:
        if self.text_encoder is None:
            raise ValueError(
                f"{type(self).__name__} has no text_encoder. Give prompt_embeds (and, with guidance, "
                "negative_prompt_embeds)."
            )
        return TextEncoder(
            self.text_encoder, self.tokenizer, pad=self.config.text_pad, max_tokens=self.config.max_tokens
        )

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
    ) -> Text:
        """States (B n, L, C), each prompt n times in a row, and their mask (None: all tokens count).

        With guidance B n rows of the negative prompt follow; without one, of the encoded empty string.
        Raises `ValueError` for a prompt given twice or not at all.
        """
        text = self._encode_either(prompt, prompt_embeds, prompt_attention_mask)
        if text is None:
            raise ValueError("Give either prompt or prompt_embeds.")
        count = len(text[0])
        text = repeat_text(text, num_images_per_prompt, device)
        if not do_classifier_free_guidance:
            return text
        negative = self._encode_either(
            negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask, "negative_"
        ) or self._encode("")
        given = len(negative[0])
        if given not in (1, count):
            raise ValueError(
                f"{given} negative prompts for {count} prompts: give one, or one for each prompt."
            )
        states, mask = repeat_text(negative, len(text[0]) // given, device)
        return stack_text(text, (states.to(text[0].dtype), mask))

    def _encode_either(
        self, prompt: str | list[str] | None, embeds: Tensor | None, mask: Tensor | None, kind: str = ""
    ) -> Text | None:
        """The text of a prompt or its embeddings; None without both."""
        if prompt is not None and embeds is not None:
            raise ValueError(f"Give either {kind}prompt or {kind}prompt_embeds.")
        if embeds is not None:
            return embeds, mask
        return None if prompt is None else self._encode(prompt)

    def _encode(self, prompt: str | list[str]) -> Text:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("prompt []: must hold at least one prompt.")
        return encode_prompts(self._captions(), prompts)

    def check_call(
        self,
        num_inference_steps: int,
        timesteps: Times,
        guidance_scale: float,
        callback_on_step_end_tensor_inputs: Sequence[str],
        output_type: str,
    ) -> None:
        """Raise `ValueError` for numbers with which nothing can be sampled."""
        if timesteps is None and (not isinstance(num_inference_steps, int) or num_inference_steps < 1):
            raise ValueError(
                f"num_inference_steps {num_inference_steps!r}: must be a whole number from 1. "
                "Explicit times go into timesteps."
            )
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale {guidance_scale}: must be a finite number; up to 1 is none.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {sorted(unknown)}: not among "
                f"{self._callback_tensor_inputs}."
            )
        if output_type not in self.output_types:
            raise ValueError(f"output_type {output_type!r}: unknown. Use {', '.join(self.output_types)}.")

    def set_times(self, num_inference_steps: int, timesteps: Times, device: torch.device) -> None:
        """Set the scheduler: `num_inference_steps` even steps from 1 to 0, or the times given."""
        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(timesteps=as_times(timesteps).to(device), device=device)

    def denoise(
        self,
        network: nn.Module,
        latents: Tensor,
        tensors: dict[str, Any],
        conditions: Callable[[dict[str, Any], bool], dict[str, Any]],
        generator: Generators,
        callback: Callback | None,
        callback_tensor_inputs: Sequence[str],
    ) -> Tensor:
        """From noise (B, C, h, w) to latents along the scheduler's times, in float32.

        `conditions(tensors, guided)` gives the network's arguments that stay the same from step to step
        (rows of the conditional, then of the unconditional); it is asked again when a callback replaces one
        of `tensors` or switches guidance off.
        """
        guided = self.do_classifier_free_guidance
        fetch(network)
        fixed = conditions(tensors, guided)
        times = self.scheduler.timesteps[:-1]
        self._num_timesteps, self._interrupt = len(times), False
        for step, time in enumerate(self.progress_bar(times)):
            if self._interrupt:
                continue
            self._current_timestep = time
            t = time.expand(len(latents))
            inputs = (torch.cat([latents, latents]), torch.cat([t, t])) if guided else (latents, t)
            noise = network(*inputs, **fixed).float()
            if guided:
                text, null = noise.chunk(2)
                noise = torch.lerp(null, text, self._guidance_scale)
            latents = self.scheduler.step(noise, t, latents, generator).prev_sample
            if callback is None:
                continue
            seen = {"latents": latents, **tensors}
            returned = callback(self, step, time, {name: seen[name] for name in callback_tensor_inputs}) or {}
            latents = returned.pop("latents", latents).float()
            replaced = {name: value for name, value in returned.items() if value is not seen.get(name)}
            still_guided = guided and self.do_classifier_free_guidance
            if replaced or still_guided != guided:
                guided = still_guided
                tensors.update(replaced)
                fixed = conditions(tensors, guided)
        self._current_timestep = None
        return latents


def fetch(network: nn.Module) -> None:
    """Move an offloaded network to its device, before a method of it other than `forward` is called."""
    hook = getattr(network, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(network)


def as_times(times: str | Sequence[float] | Tensor) -> Tensor:
    """Times for the scheduler, float32; `times` is also the name of one of `TIMES`.

    Raises `ValueError` unless they fall from at most 1 to at least 0.
    """
    if isinstance(times, str):
        if times not in TIMES:
            raise ValueError(f"timesteps {times!r}: unknown. Use {', '.join(TIMES)}, or a list from 1 to 0.")
        times = TIMES[times]()
    points = torch.as_tensor(times, dtype=torch.float32)
    falling = points.ndim == 1 and len(points) > 1 and bool((points.diff() < 0).all())
    if not falling or points[0] > 1 or points[-1] < 0:
        raise ValueError(f"timesteps {points.tolist()}: must fall from at most 1 to 0, at least two of them.")
    return points
