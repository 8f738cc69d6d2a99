"""Schedulers by name."""

from __future__ import annotations

import pytest
import torch

from shoestring.errors import RecipeError
from shoestring.recipes.checks import SCHEDULERS
from shoestring.sampling.schedulers import COSINE, EDM, FLOW, make_scheduler


def test_recipes_and_code_know_the_same_names() -> None:
    cosine = {"decoder": tuple(COSINE), "prior": tuple(COSINE)}
    assert {"edm": tuple(EDM), "flow": tuple(FLOW), **cosine} == SCHEDULERS


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
        ("ddim", "edm", "unknown. Use edm_heun, edm_euler, edm_dpm"),
        ("edm_heun", "x0", "does not fit prediction x0. Use flow_euler, flow_heun"),
    ],
)
def test_a_wrong_scheduler_is_refused_with_those_that_fit(name: str, prediction: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_scheduler(name, prediction=prediction, sigma_data=0.9)
