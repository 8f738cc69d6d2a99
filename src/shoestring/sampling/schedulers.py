"""Schedulers by their names in recipes and commands; EDM ones precondition with `sigma_data`."""

from __future__ import annotations

from collections.abc import Callable

from diffusers.schedulers.scheduling_ddpm_wuerstchen import DDPMWuerstchenScheduler
from diffusers.schedulers.scheduling_edm_dpmsolver_multistep import EDMDPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from shoestring.errors import RecipeError
from shoestring.sampling.edm_heun import EDMHeunScheduler

EDM: dict[str, Callable[..., SchedulerMixin]] = {
    "edm_heun": EDMHeunScheduler,
    "edm_euler": EDMEulerScheduler,
    "edm_dpm": EDMDPMSolverMultistepScheduler,
}
FLOW: dict[str, Callable[..., SchedulerMixin]] = {
    "flow_euler": FlowMatchEulerDiscreteScheduler,
    "flow_heun": FlowMatchHeunDiscreteScheduler,
}
COSINE: dict[str, Callable[..., SchedulerMixin]] = {"cosine_ddpm": DDPMWuerstchenScheduler}
"""For the stages of a cascade, which predict noise on the cosine schedule."""


def make_scheduler(
    name: str, *, prediction: str, sigma_data: float | None = None, shift: float = 1.0
) -> SchedulerMixin:
    """The scheduler `name` for a network that predicts `prediction` ("edm", "velocity" or "x0").

    EDM schedulers take `sigma_data`; flow schedulers take `shift`: times t become
    shift t / (1 + (shift - 1) t), above 1 with more steps near the noise. Raises `RecipeError` for an
    unknown name and for one of the other kind.
    """
    fitting = EDM if prediction == "edm" else FLOW
    if name not in fitting:
        problem = f"does not fit prediction {prediction}" if name in EDM | FLOW else "unknown"
        raise RecipeError(f"scheduler {name!r}: {problem}. Use {', '.join(fitting)}.")
    return fitting[name](sigma_data=sigma_data) if prediction == "edm" else fitting[name](shift=shift)
