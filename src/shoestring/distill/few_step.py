"""Few-step students by latent consistency (LCM, arXiv 2310.04378; by adapter, 2311.05556) and in phases
(PCM, 2405.18407).

A consistency function f(z_t, t, w) goes in one pass to where a teacher, guided by w, goes in many steps of a
solver. It learns to from one of them, on a grid of N times t_1 < ... < t_N:

    z_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                          t = t_n, n uniform
    F_T = F_T(z_t, c) + w (F_T(z_t, c) - F_T(z_t, null))                   w uniform: `guidance`
    z_s = DDIM step of F_T from t to s = t_(n-1)                           s = 0 for n = 1
    loss = d(f(z_t, t, w), f_target(z_s, s, w)),   no gradient through f_target

    phases   f(z_t, t, w)                                   leads to           sampled by
    1        c_skip(t) z_t + c_out(t) x_0(F)                the image          LCMScheduler
    P > 1    sqrt(abar_e) x_0(F) + sqrt(1 - abar_e) eps(F)  e, its phase's     TCDScheduler, eta 0, P steps
                                                            lower edge

x_0(F) and eps(F) are what an output implies. Either f is the identity at the end of its way, z_0 or z_e.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.distill.objective import check_teacher, number_type
from shoestring.errors import RecipeError
from shoestring.interfaces import Batch, Loss, Objective
from shoestring.models.unet_guidance import guidance_embedding, guidance_width
from shoestring.objectives.denoising import held_out_noise, in_eval_mode
from shoestring.objectives.noise import Conditioning, NoiseSchedule, drops_out, mean_square, predict
from shoestring.runtime import full_precision, keyed_generator, keyed_normal, keyed_uniform

LOSSES = ("huber", "l2")
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def solver_grid(num_timesteps: int, steps: int) -> Tensor:
    """The (N,) times of N = `steps` solver steps, rising: k - 1, 2k - 1, ..., k = T // N (2310.04378, 4.3).

    The `original_inference_steps` of diffusers' `LCMScheduler` and `TCDScheduler`.
    """
    return torch.arange(1, steps + 1) * (num_timesteps // steps) - 1


def phase_edges(grid: Tensor, phases: int) -> Tensor:
    """The time (N,) to which f leads from each time of the grid: the lower edge of its phase, 0 for the last.

    The edges are the times of `TCDScheduler` and `LCMScheduler` at `phases` steps: 4 of 50 steps of 20 begin
    at 999, 759, 499, 259 and lead to 759, 499, 259, 0.
    """
    count = len(grid)
    starts = [count - 1 - count * phase // phases for phase in range(phases)]  # falling
    edges = torch.zeros_like(grid)
    for start, below in pairwise(starts):
        edges[below + 1 : start + 1] = grid[below]
    return edges


def boundary_scalings(
    t: Tensor, sigma_data: float = SIGMA_DATA, timestep_scaling: float = TIMESTEP_SCALING
) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of times (B,), each (B,): 1 and 0 at t = 0, nearly 0 and 1 from the grid's first on.

    c_skip = sigma_data^2 / (tau^2 + sigma_data^2), c_out = tau / sqrt(tau^2 + sigma_data^2), tau = scaling t
    (2310.04378, appendix D, as `LCMScheduler` computes it).
    """
    tau = t.float() * timestep_scaling
    spread = tau.square() + sigma_data**2
    return sigma_data**2 / spread, tau * spread.rsqrt()


def ddim_step(schedule: NoiseSchedule, output: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """z_s of a network's output at z_t, without fresh noise (DDIM, 2010.02502, equation 12, sigma 0).

    (B, C, H, W) and times (B,). From a time to itself it is the identity, whatever the output.
    """
    return schedule.add_noise(schedule.x0_of(output, z, t), schedule.noise_of(output, z, t), s)


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """sqrt(error^2 + c^2) - c, the mean of each image: (B, ...) -> (B,) float32."""
    with full_precision(error.device):
        return ((error.float().square() + c**2).sqrt() - c).flatten(1).mean(dim=1)


class LcmObjective(Objective):
    """Consistency distillation of `teacher` into `unet`: all of it, or the adapter that is in it.

    solver_steps      N: the teacher's steps from noise to image, and the sampler's `original_inference_steps`
    guidance          w from ... to. w is guidance as LCM counts it, and the pipelines' `guidance_scale` w + 1
    loss, huber_c     d: "huber", pseudo-Huber with `huber_c`, or "l2"
    sigma_data,
    timestep_scaling  of c_skip and c_out; `LCMScheduler` has 0.5 and takes the other in its config
    target_decay      0: the target is the student's own weights; above: their average, which moves by
                      1 - decay after every step and is a part that is saved but not optimised
    phases            1 is LCM; more are PCM's, without its adversarial loss

    The teacher may be of any floating type, or of 8-bit weights.
    A student whose config has `time_cond_proj_dim` (`unet_guidance.with_guidance_embedding`) is told w, which
    is drawn for each image; any other learns one w, and is sampled with guidance off. All draws are keyed by
    (seed, position in the run). Raises `RecipeError` for settings that do not fit together.
    """

    grid: Tensor
    edges: Tensor

    def __init__(
        self,
        unet: nn.Module,
        teacher: nn.Module,
        schedule: NoiseSchedule,
        conditioning: Conditioning,
        *,
        seed: int,
        solver_steps: int = 50,
        guidance: tuple[float, float] = (3.0, 15.0),
        loss: str = "huber",
        huber_c: float = 0.001,
        sigma_data: float = SIGMA_DATA,
        timestep_scaling: float = TIMESTEP_SCALING,
        target_decay: float = 0.0,
        phases: int = 1,
    ) -> None:
        parts = {"unet": unet}
        if target_decay:
            parts["target"] = copy.deepcopy(unet).requires_grad_(False)
        super().__init__(parts, {"teacher": teacher})
        self.guidance_width = guidance_width(unet)
        _check(schedule, solver_steps, guidance, self.guidance_width, loss, phases)
        check_teacher(teacher)
        self.schedule, self.conditioning, self.seed = schedule, conditioning, seed
        self.guidance, self.loss, self.huber_c = guidance, loss, huber_c
        self.sigma_data, self.timestep_scaling = sigma_data, timestep_scaling
        self.target_decay, self.phases = target_decay, phases
        self.drops_out = drops_out(unet)
        grid = solver_grid(schedule.num_timesteps, solver_steps)
        self.register_buffer("grid", grid, persistent=False)
        self.register_buffer("edges", phase_edges(grid, phases), persistent=False)
        self.train(self.training)

    def train(self, mode: bool = True) -> LcmObjective:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, batch: Batch) -> Loss:
        step = (keyed_uniform(self.seed, "noise_level", batch.index) * len(self.grid)).long()
        noise = keyed_normal(self.seed, "noise", batch.index, batch.latents.shape[1:])
        low, high = self.guidance
        w = low + (high - low) * keyed_uniform(self.seed, "guidance", batch.index)
        z = self.schedule.add_noise(batch.latents, noise, self.grid[step])
        told = self.conditioning(batch)
        target = self.target(z, step, w, told, self.conditioning.unconditional(batch))
        with keyed_generator(self.seed, "dropout", batch.index) if self.drops_out else nullcontext():
            error = self.consistent(self.trained["unet"], z, self.grid[step], step, w, told) - target
        distance = mean_square(error) if self.loss == "l2" else pseudo_huber(error, self.huber_c)
        return Loss(distance, noise_level=self.schedule.log_sigma(self.grid[step]))

    def consistent(
        self, unet: nn.Module, z: Tensor, t: Tensor, step: Tensor, w: Tensor, told: Mapping[str, Any]
    ) -> Tensor:
        """f(z, t, w) by the weights of `unet`, towards the edge of the phase that `step` (B,) lies in."""
        if self.guidance_width is not None:
            told = {**told, "timestep_cond": guidance_embedding(w, self.guidance_width)}
        output = predict(unet, z, t, told)
        if self.phases > 1:
            return ddim_step(self.schedule, output, z, t, self.edges[step])
        c_skip, c_out = boundary_scalings(t, self.sigma_data, self.timestep_scaling)
        x0 = self.schedule.x0_of(output, z, t)
        return c_skip[:, None, None, None] * z + c_out[:, None, None, None] * x0

    @torch.no_grad()
    def target(
        self, z: Tensor, step: Tensor, w: Tensor, told: Mapping[str, Any], untold: Mapping[str, Any]
    ) -> Tensor:
        """f_target at the end of the teacher's step from z, at times grid[step]."""
        z = self.teacher_step(z, step, w, told, untold)
        network = self.trained["target" if self.target_decay else "unet"]
        with in_eval_mode(network):
            return self.consistent(network, z, self._below(step), step, w, told)

    @torch.no_grad()
    def teacher_step(
        self, z: Tensor, step: Tensor, w: Tensor, told: Mapping[str, Any], untold: Mapping[str, Any]
    ) -> Tensor:
        """The guided teacher's solver step from grid[step] to the time below: (B, C, H, W), (B,), (B,)."""
        t = self.grid[step]
        output = self._ask_teacher(z, t, told)
        if max(self.guidance) > 0:
            output = output + w[:, None, None, None] * (output - self._ask_teacher(z, t, untold))
        return ddim_step(self.schedule, output, z, t, self._below(step))

    def _ask_teacher(self, z: Tensor, t: Tensor, told: Mapping[str, Any]) -> Tensor:
        """The teacher's output, computed in its own type, whatever `autocast` says."""
        teacher = self.frozen["teacher"]
        own = number_type(teacher)
        text = told["encoder_hidden_states"].to(own)
        with full_precision(z.device):
            return predict(teacher, z.to(own), t, {**told, "encoder_hidden_states": text})

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the target: target <- decay target + (1 - decay) student."""
        if self.target_decay:
            target: list[Tensor] = list(self.trained["target"].parameters())
            weights: list[Tensor] = list(self.trained["unet"].parameters())
            torch._foreach_lerp_(target, weights, 1 - self.target_decay)

    def loss_at(self, batch: Batch, log_sigma: Tensor) -> Tensor:
        """Mean squared error (B,) of f at given noise levels (B,) against the image, noised as f leaves it.

        One pass, captions kept, the least guidance, the same noise in every run. Not what is trained: no
        teacher is asked, so that a run can be looked at without one.
        """
        step = self._nearest(log_sigma)
        noise, w = held_out_noise(batch), torch.full_like(log_sigma, min(self.guidance))
        z = self.schedule.add_noise(batch.latents, noise, self.grid[step])
        told = self.conditioning(batch, train=False)
        with in_eval_mode(self.trained):
            found = self.consistent(self.trained["unet"], z, self.grid[step], step, w, told)
        return mean_square(found - self.schedule.add_noise(batch.latents, noise, self.edges[step]))

    def teacher_error_at(self, batch: Batch, log_sigma: Tensor) -> Tensor:
        """Mean squared distance (B,) of f from where the guided teacher's whole walk ends, from given levels.

        The middle of the guidance. Takes up to 2 N passes of the teacher and one of the student.
        """
        step = self._nearest(log_sigma)
        w = torch.full_like(log_sigma, sum(self.guidance) / 2)
        z = self.schedule.add_noise(batch.latents, held_out_noise(batch), self.grid[step])
        told = self.conditioning(batch, train=False)
        with in_eval_mode(self.trained):
            found = self.consistent(self.trained["unet"], z, self.grid[step], step, w, told)
        return mean_square(found - self.walk(z, step, w, told, self.conditioning.unconditional(batch)))

    def walk(
        self, z: Tensor, step: Tensor, w: Tensor, told: Mapping[str, Any], untold: Mapping[str, Any]
    ) -> Tensor:
        """Where the guided teacher gets from z at grid[step], step by step to the phase's edge."""
        for number in range(int(step.max()), -1, -1):
            here = torch.full_like(step, number)
            on_the_way = (here <= step) & (self._below(here) >= self.edges[step])
            moved = self.teacher_step(z, here, w, told, untold)
            z = torch.where(on_the_way[:, None, None, None], moved, z)
        return z

    def _below(self, step: Tensor) -> Tensor:
        """The time (B,) that the solver steps to from grid[step]."""
        return torch.where(step > 0, self.grid[step - 1], 0)

    def _nearest(self, log_sigma: Tensor) -> Tensor:
        """The step (B,) of the grid whose time is nearest to that of each noise level."""
        return (self.schedule.nearest(log_sigma)[:, None] - self.grid).abs().argmin(dim=1)


def _check(
    schedule: NoiseSchedule,
    solver_steps: int,
    guidance: tuple[float, float],
    guidance_width: int | None,
    loss: str,
    phases: int,
) -> None:
    """Raise `RecipeError` for settings that do not fit together."""
    if not 1 <= solver_steps <= schedule.num_timesteps:
        raise RecipeError(
            f"objective.solver_steps {solver_steps}: the teacher's schedule has {schedule.num_timesteps} "
            f"steps. Use 1 to {schedule.num_timesteps}, such as 50."
        )
    if not 1 <= phases <= solver_steps:
        raise RecipeError(f"objective.phases {phases}: use 1 to solver_steps, here {solver_steps}.")
    if loss not in LOSSES:
        raise RecipeError(f"objective.loss {loss!r}: unknown. Use {' or '.join(LOSSES)}.")
    low, high = guidance
    if not 0 <= low <= high:
        raise RecipeError(f"objective.guidance {low:g} to {high:g}: give two numbers from 0 up, rising.")
    if low != high and guidance_width is None:
        raise RecipeError(
            f"objective.guidance {low:g} to {high:g}: this student has no guidance embedding and learns one "
            f"strength alone. Give it twice, such as [7, 7], or set embed_guidance."
        )
