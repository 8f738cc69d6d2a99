"""Schedulers by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from shoestring.errors import RecipeError
from shoestring.recipes.checks import SCHEDULERS
from shoestring.sampling.schedulers import (
    COSINE,
    EDM,
    FLOW,
    NOISE,
    check_steps,
    make_noise_scheduler,
    make_scheduler,
)

SDXL: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
"""The configuration in SDXL's repository."""


def test_recipes_and_code_know_the_same_names() -> None:
    cosine = {"decoder": tuple(COSINE), "prior": tuple(COSINE)}
    few = ("lcm", "tcd")
    many = tuple(name for name in NOISE if name not in few)
    noise = {"noise": many, "distillation": many, "lcm": few}
    assert {"edm": tuple(EDM), "flow": tuple(FLOW), **cosine, **noise} == SCHEDULERS


@pytest.mark.parametrize("name", EDM)
def test_edm_schedulers_take_the_objectives_sigma_data(name: str) -> None:
    scheduler = make_scheduler(name, prediction="edm", sigma_data=0.7)
    assert scheduler.config.sigma_data == 0.7


@pytest.mark.parametrize("name", FLOW)
def test_flow_schedulers_shift_their_times_as_stated(name: str) -> None:
    """Each sigma s becomes 3 s / (1 + 2 s)."""
    plain, shifted = (make_scheduler(name, prediction="x0", shift=shift) for shift in (1.0, 3.0))
    assert torch.allclose(shifted.sigmas, 3 * plain.sigmas / (1 + 2 * plain.sigmas), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "prediction", "message"),
    [
        ("heun", "edm", "unknown. Use edm_heun, edm_euler, edm_dpm"),
        ("ddim", "edm", "does not fit prediction edm. Use edm_heun, edm_euler, edm_dpm"),
        ("edm_heun", "x0", "does not fit prediction x0. Use flow_euler, flow_heun"),
    ],
)
def test_a_wrong_scheduler_is_refused_with_those_that_fit(name: str, prediction: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_scheduler(name, prediction=prediction, sigma_data=0.9)


@pytest.mark.parametrize("name", ["euler", "ddim", "dpm++"])
@pytest.mark.parametrize(
    ("steps", "times"),
    [
        (10, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        (4, [999, 749, 499, 249]),
        (1, [999]),
    ],
)
def test_steps_trail_from_the_noisiest_time(name: str, steps: int, times: list[int]) -> None:
    """KOALA's 10 steps, and the 4 of step-distilled networks, which must begin at 999."""
    scheduler = make_noise_scheduler(name, SDXL, prediction="epsilon")
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == times


def test_lcm_takes_its_times_from_the_fifty_it_is_distilled_on() -> None:
    scheduler = make_noise_scheduler("lcm", SDXL, prediction="epsilon")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]
    assert set(scheduler.timesteps.tolist()) <= {20 * k - 1 for k in range(1, 51)}


@pytest.mark.parametrize("name", ["lcm", "tcd"])
@pytest.mark.parametrize("most", [8, 50])
def test_few_step_schedulers_take_as_many_steps_as_they_have_times(name: str, most: int) -> None:
    """diffusers takes as many too, and no more."""
    scheduler: Any = make_noise_scheduler(
        name, {**SDXL, "original_inference_steps": most}, prediction="epsilon"
    )
    check_steps(scheduler, most)
    scheduler.set_timesteps(most)
    assert scheduler.timesteps.tolist() == [k * (1000 // most) - 1 for k in range(most, 0, -1)]
    with pytest.raises(RecipeError, match=f"--steps {most + 1}: .* has the {most} times .* Use 1 to {most}"):
        check_steps(scheduler, most + 1)
    with pytest.raises(ValueError, match="num_inference_steps"):
        scheduler.set_timesteps(most + 1)
    check_steps(make_noise_scheduler("euler", SDXL, prediction="epsilon"), most + 1)


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_schedule_trained_on_is_kept(name: str, zero_snr: bool) -> None:
    trained = {
        **SDXL,
        "beta_end": 0.02,
        "rescale_betas_zero_snr": zero_snr,
        "prediction_type": "v_prediction",
    }
    scheduler: Any = make_noise_scheduler(name, trained, prediction="v_prediction")
    known = {
        key: trained[key] for key in ("beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
    }
    oracle = DDPMScheduler(**known).alphas_cumprod
    # A few schedulers put 2^-24 where zero would divide.
    assert torch.allclose(scheduler.alphas_cumprod, oracle, atol=1e-7)
    assert scheduler.config.prediction_type == "v_prediction"


def test_another_samplers_settings_are_left_behind_and_clipping_is_kept() -> None:
    odd = {
        **SDXL,
        "use_karras_sigmas": True,
        "timestep_spacing": "linspace",
        "algorithm_type": "sde-dpmsolver++",
    }
    solver: Any = make_noise_scheduler("dpm++", odd, prediction="epsilon")
    assert solver.config.use_karras_sigmas is False
    assert solver.config.algorithm_type == "dpmsolver++"
    silent = {key: value for key, value in SDXL.items() if key != "clip_sample"}
    for config, clipped in ((SDXL, False), (silent, False), ({**SDXL, "clip_sample": True}, True)):
        made: Any = make_noise_scheduler("ddim", config, prediction="epsilon")
        assert made.config.clip_sample is clipped


@pytest.mark.parametrize("name", sorted(set(NOISE) - {"tcd"}))  # which ends at t = 0, not quite the picture
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 4])
def test_on_data_of_one_picture_every_scheduler_ends_at_it(name: str, prediction: str, steps: int) -> None:
    """The exact network for such data is known: x_0 is the picture, whatever z and t."""
    picture = torch.linspace(-1, 1, 12).view(1, 3, 2, 2)
    scheduler: Any = make_noise_scheduler(name, SDXL, prediction=prediction)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(picture.shape, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(z, t)
        abar = DDPMScheduler(**{key: SDXL[key] for key in ("beta_start", "beta_end", "beta_schedule")})
        signal = abar.alphas_cumprod[int(t)].sqrt()
        spread = (1 - signal**2).sqrt()
        noise = (seen - signal * picture) / spread
        exact = {"epsilon": noise, "sample": picture, "v_prediction": signal * noise - spread * picture}
        z = scheduler.step(exact[prediction], t, z, return_dict=False)[0]
    assert torch.allclose(z, picture, atol=1e-2 if name == "lcm" else 2e-4)


@pytest.mark.parametrize(
    ("name", "config", "prediction", "message"),
    [
        ("pndm", SDXL, "epsilon", r"scheduler 'pndm': unknown. Use euler, ddim, dpm\+\+, lcm, tcd."),
        ("flow_euler", SDXL, "epsilon", "scheduler 'flow_euler': does not fit prediction epsilon. Use euler"),
        ("euler", SDXL, "edm", "prediction 'edm': unknown. Use epsilon, v_prediction, sample."),
        ("euler", {"_class_name": "EDMEulerScheduler"}, "epsilon", "which EDMEulerScheduler does not give"),
    ],
)
def test_a_wrong_noise_scheduler_is_refused(
    name: str, config: dict[str, Any], prediction: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make_noise_scheduler(name, config, prediction=prediction)
