"""Schedulers by their names in recipes and commands; EDM ones precondition with `sigma_data`.

U-Nets on Stable Diffusion's noise schedule take "trailing" steps (arXiv 2305.08891, table 2), which begin at
the noisiest time: what few-step and step-distilled networks need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm_wuerstchen import DDPMWuerstchenScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_dpmsolver_multistep import EDMDPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_tcd import TCDScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from shoestring.errors import RecipeError
from shoestring.objectives.noise import PREDICTIONS
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
NOISE: dict[str, Callable[..., SchedulerMixin]] = {
    "euler": EulerDiscreteScheduler,
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "lcm": LCMScheduler,
    "tcd": TCDScheduler,
}
"""For U-Nets on a schedule of betas. The last two are for networks distilled to few steps: by consistency to
the image, and to the ends of stretches of the path."""

_TRAINED = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("rescale_betas_zero_snr", "steps_offset", "clip_sample", "clip_sample_range"),
    *("thresholding", "dynamic_thresholding_ratio", "sample_max_value", "original_inference_steps"),
)
"""What a configuration says of the schedule and the range trained on; all else is the other sampler's own."""


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
        problem = f"does not fit prediction {prediction}" if name in EDM | FLOW | NOISE else "unknown"
        raise RecipeError(f"scheduler {name!r}: {problem}. Use {', '.join(fitting)}.")
    return fitting[name](sigma_data=sigma_data) if prediction == "edm" else fitting[name](shift=shift)


def make_noise_scheduler(name: str, config: Mapping[str, Any], *, prediction: str) -> SchedulerMixin:
    """The scheduler `name` for a U-Net that predicts `prediction` ("epsilon", "v_prediction" or "sample").

    config   of any diffusers scheduler with betas: the noise schedule that the network was trained on
             (betas, zero terminal SNR, offset; of a few-step network, how many of its times). What it says
             of another sampler (spacing, Karras' sigmas) is left out, and latents are clipped only where it
             asks for it.

    Raises `RecipeError` for an unknown name or prediction, and for a configuration without betas.
    """
    if name not in NOISE:
        problem = f"does not fit prediction {prediction}" if name in EDM | FLOW | COSINE else "unknown"
        raise RecipeError(f"scheduler {name!r}: {problem}. Use {', '.join(NOISE)}.")
    if prediction not in PREDICTIONS:
        raise RecipeError(f"prediction {prediction!r}: unknown. Use {', '.join(PREDICTIONS)}.")
    if "beta_schedule" not in config:
        raise RecipeError(
            f"scheduler {name!r}: needs the noise schedule trained on (betas), which "
            f"{config.get('_class_name', 'this configuration')} does not give. Use it with a U-Net."
        )
    kind = NOISE[name]
    taken = inspect.signature(kind).parameters
    # Stable Diffusion's conventions where nothing is said; DDIM's own would clip latents to [-1, 1].
    trained = {
        "clip_sample": False,
        "steps_offset": 1,
        **{key: config[key] for key in _TRAINED if key in config},
    }
    return kind(
        **{key: value for key, value in trained.items() if key in taken},
        prediction_type=prediction,
        timestep_spacing="trailing",
    )


def check_steps(scheduler: SchedulerMixin, steps: int) -> None:
    """Raise `RecipeError` for more steps than there are times: `lcm` and `tcd` have those distilled at."""
    config: Any = scheduler.config
    most = config.get("original_inference_steps")
    if most is not None and steps > most:
        raise RecipeError(
            f"--steps {steps}: {type(scheduler).__name__} has the {most} times that a network is distilled "
            f"at. Use 1 to {most}."
        )
