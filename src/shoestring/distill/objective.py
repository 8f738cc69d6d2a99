"""A student learns from its teacher: task, output and feature losses (KOALA, arXiv 2312.04005, section 3.3).

    z_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    L_task = w_t ||F_S(z_t, t, c) - target||^2              target of the teacher's schedule (eps, v, x_0)
    L_out  = w_t ||F_S(z_t, t, c) - F_T(z_t, t, c)||^2      neither side guided
    L_feat = sum_i ||f_S^i - f_T^i||^2                      f^i: features of the i-th pair of taps
    L = task_weight L_task + output_weight L_out + feature_weight L_feat

Each norm is a mean over the elements of one image, in float32. The paper prints the sum over i inside of
L_feat's norm, where errors of taps would cancel; this is the sum of errors, which BK-SDM (2305.15798) trains.

    feature_scale     L_feat
    none              as above
    teacher_power     each tap's error divided by the mean square of that image's f_T^i
    per_layer_mean    the mean over taps

    timesteps         t
    uniform           0 .. T-1
    teacher_grid      the `teacher_steps` times a step-distilled teacher was made for: 999, 749, 499, 249
    mixed             half of the images each, a coin for every image

Every draw is keyed by (seed, position of the image in the run).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shoestring.distill.taps import TapPair, Taps, check_gradients
from shoestring.errors import RecipeError
from shoestring.interfaces import Batch, Loss, Objective
from shoestring.models.unet_guidance import guidance_width
from shoestring.objectives.denoising import held_out_noise, in_eval_mode
from shoestring.objectives.noise import (
    Conditioning,
    NoiseSchedule,
    check_weight,
    drops_out,
    mean_square,
    predict,
)
from shoestring.runtime import full_precision, keyed_generator, keyed_normal, keyed_uniform

FEATURE_SCALES = ("none", "teacher_power", "per_layer_mean")
TIMESTEPS = ("uniform", "teacher_grid", "mixed")

_LEAST_POWER = 1e-6  # a teacher's feature of a smaller mean square counts as one of this


class Terms(NamedTuple):
    """The three losses of each image, (B,) each, before their weights."""

    task: Tensor
    output: Tensor
    feature: Tensor


class Asked(NamedTuple):
    """A network's output (B, C, H, W) float32 and its features by the names of their modules."""

    output: Tensor
    features: Mapping[str, Tensor]


class DistillationObjective(Objective):
    """Trains `unet`, the student; `teacher` is frozen, in eval mode, never under gradients.

    The teacher may be of any floating type, or of 8-bit weights: it computes in its own type, whatever
    `autocast` says. It is not asked at all where output and feature losses have no weight. Without `pairs`
    there is no feature loss. `weight` (`objectives/noise.py`) holds for task and output loss.
    Raises `RecipeError` for settings that do not fit together and for a few-step teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        schedule: NoiseSchedule,
        conditioning: Conditioning,
        pairs: Sequence[TapPair],
        *,
        seed: int,
        task_weight: float = 1.0,
        output_weight: float = 1.0,
        feature_weight: float = 1.0,
        feature_scale: str = "none",
        timesteps: str = "uniform",
        teacher_steps: int = 4,
        weight: str = "none",
        weight_cap: float | None = None,
        sigma_data: float = 1.0,
    ) -> None:
        super().__init__({"unet": student}, {"teacher": teacher})
        check_teacher(teacher)
        check_weight(weight, weight_cap)
        for name, value, known in (
            ("feature_scale", feature_scale, FEATURE_SCALES),
            ("timesteps", timesteps, TIMESTEPS),
        ):
            if value not in known:
                raise RecipeError(f"objective.{name} {value!r}: unknown. Use {', '.join(known)}.")
        self.schedule, self.conditioning, self.seed = schedule, conditioning, seed
        self.task_weight, self.output_weight, self.feature_weight = task_weight, output_weight, feature_weight
        self.feature_scale, self.timesteps = feature_scale, timesteps
        self.teacher_grid = schedule.trailing(teacher_steps)
        self.weight, self.weight_cap, self.sigma_data = weight, weight_cap, sigma_data
        self.drops_out = drops_out(student)
        self.pairs = tuple(pairs) if feature_weight else ()
        self._student_taps = Taps(student, [pair.student for pair in self.pairs])
        self._teacher_taps = Taps(teacher, [pair.teacher for pair in self.pairs])
        self.train(self.training)

    def train(self, mode: bool = True) -> DistillationObjective:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, batch: Batch) -> Loss:
        t = self.draw_times(batch.index)
        noise = keyed_normal(self.seed, "noise", batch.index, batch.latents.shape[1:])
        with keyed_generator(self.seed, "dropout", batch.index) if self.drops_out else nullcontext():
            task, output, feature = self.terms(batch.latents, t, noise, self.conditioning(batch))
        loss = self.task_weight * task + self.output_weight * output + self.feature_weight * feature
        return Loss(loss, noise_level=self.schedule.log_sigma(t))

    def terms(self, x0: Tensor, t: Tensor, noise: Tensor, given: Mapping[str, Any]) -> Terms:
        """The three losses at times t (B,) for given noise (B, C, H, W).

        Output and feature loss are 0 where the teacher is not asked, the latter also without pairs. The
        teacher comes first: what it needed in memory is free before the student's activations are kept.
        """
        z = self.schedule.add_noise(x0, noise, t)
        teacher = self.ask_teacher(z, t, given) if self.output_weight or self.pairs else None
        student = self.ask_student(z, t, given)
        weight = self.schedule.weight(t, self.weight, self.weight_cap, self.sigma_data)
        task = weight * mean_square(student.output - self.schedule.target(x0, noise, t))
        if teacher is None:
            return Terms(task, torch.zeros_like(task), torch.zeros_like(task))
        output = weight * mean_square(student.output - teacher.output)
        return Terms(task, output, self.feature_loss(student.features, teacher.features, like=task))

    def feature_loss(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], *, like: Tensor
    ) -> Tensor:
        """L_feat (B,) of features by their modules' names, one for each pair; zeros `like` where none are."""
        total = torch.zeros_like(like)
        for pair in self.pairs:
            own, theirs = student[pair.student].float(), teacher[pair.teacher].float()
            if own.shape != theirs.shape:
                raise RecipeError(
                    f"objective.taps {pair.role!r}: {pair.student} of the student puts out "
                    f"{tuple(own.shape)}, {pair.teacher} of the teacher {tuple(theirs.shape)}. Leave it out."
                )
            error = mean_square(own - theirs)
            if self.feature_scale == "teacher_power":
                error = error / mean_square(theirs).clamp(min=_LEAST_POWER)
            total = total + error
        return total / len(self.pairs) if self.feature_scale == "per_layer_mean" and self.pairs else total

    def ask_student(self, z: Tensor, t: Tensor, given: Mapping[str, Any]) -> Asked:
        """The student's answer; raises `RecipeError` in training for features that gradients cannot reach."""
        with self._student_taps.catching() as features:
            output = predict(self.trained["unet"], z, t, given)
        check_gradients(features)
        return Asked(output, features)

    @torch.no_grad()
    def ask_teacher(self, z: Tensor, t: Tensor, given: Mapping[str, Any]) -> Asked:
        """The teacher's answer, computed in its own type; time ids stay float32, which holds them all."""
        teacher = self.frozen["teacher"]
        own = number_type(teacher)
        text = given["encoder_hidden_states"].to(own)
        with full_precision(z.device), self._teacher_taps.catching() as features:
            output = predict(teacher, z.to(own), t, {**given, "encoder_hidden_states": text})
        return Asked(output, features)

    def draw_times(self, index: Tensor) -> Tensor:
        """t (B,) of the images at positions `index` (B,) of the run."""
        uniform = keyed_uniform(self.seed, "noise_level", index)
        anywhere = self.schedule.draw(uniform)
        if self.timesteps == "uniform":
            return anywhere
        grid = self.teacher_grid.to(index.device)
        on_grid = grid[(uniform * len(grid)).long()]
        if self.timesteps == "teacher_grid":
            return on_grid
        return torch.where(keyed_uniform(self.seed, "teacher_grid", index) < 0.5, on_grid, anywhere)

    def loss_at(self, batch: Batch, log_sigma: Tensor) -> Tensor:
        """The task loss (B,), weighted, at the schedule's times nearest to given noise levels (B,).

        Captions kept, no dropout, the same noise in every run: comparable with a U-Net trained by itself.
        """
        t, noise, z, given = self._held_out(batch, log_sigma)
        with in_eval_mode(self.trained):
            output = predict(self.trained["unet"], z, t, given)
        weight = self.schedule.weight(t, self.weight, self.weight_cap, self.sigma_data)
        return weight * mean_square(output - self.schedule.target(batch.latents, noise, t))

    def teacher_error_at(self, batch: Batch, log_sigma: Tensor) -> Tensor:
        """The mean squared distance (B,) of the two networks' outputs, on what `loss_at` shows them."""
        t, _, z, given = self._held_out(batch, log_sigma)
        with in_eval_mode(self.trained):
            output = predict(self.trained["unet"], z, t, given)
        return mean_square(output - self.ask_teacher(z, t, given).output)

    def _held_out(self, batch: Batch, log_sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Times (B,), noise and z_t (B, C, H, W), and what else the networks take."""
        t, noise = self.schedule.nearest(log_sigma), held_out_noise(batch)
        z = self.schedule.add_noise(batch.latents, noise, t)
        return t, noise, z, self.conditioning(batch, train=False)


def check_teacher(teacher: nn.Module) -> None:
    """Raise `RecipeError` for a network that is told the guidance scale, as few-step ones are."""
    if guidance_width(teacher) is not None:
        raise RecipeError(
            "teacher: takes a guidance embedding, so it is a few-step network itself, with no unguided "
            "output to learn from. Give the network that it was distilled from."
        )


def number_type(network: nn.Module) -> torch.dtype:
    """The floating type a network computes in: its first floating weight's; 8-bit weights name theirs."""
    return next(weight.dtype for weight in network.parameters() if weight.is_floating_point())
