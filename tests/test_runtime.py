"""Keyed randomness, devices and the memory meter."""

from __future__ import annotations

import math

import pytest
import torch

from shoestring.errors import RecipeError
from shoestring.runtime import (
    PeakMemory,
    autocast,
    full_precision,
    keyed_generator,
    keyed_normal,
    keyed_seed,
    keyed_uniform,
    pick_device,
    pick_dtype,
)

INDEX = torch.arange(1000, 1020)


def test_draws_depend_on_seed_stream_and_index_alone() -> None:
    """Any grouping and order of the indices gives the same numbers, bit for bit."""
    whole = keyed_normal(3, "noise", INDEX, (4, 5))
    pieces = torch.cat([keyed_normal(3, "noise", INDEX[i : i + 3], (4, 5)) for i in range(0, 20, 3)])
    assert torch.equal(whole, pieces)
    assert torch.equal(whole.flip(0), keyed_normal(3, "noise", INDEX.flip(0), (4, 5)))


def test_other_seeds_streams_and_indices_give_other_draws() -> None:
    base = keyed_uniform(0, "a", INDEX, (50,))
    for other in (
        keyed_uniform(1, "a", INDEX, (50,)),
        keyed_uniform(0, "b", INDEX, (50,)),
        keyed_uniform(0, "a", INDEX + 1000, (50,)),
    ):
        assert not (base == other).any(dim=1).all()
        assert abs(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]) < 0.1


def test_uniform_draws_fill_the_unit_interval_evenly() -> None:
    u = keyed_uniform(0, "u", torch.arange(100_000)).double()
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, bins=20, min=0, max=1)
    chi_square = ((counts - 5000) ** 2 / 5000).sum().item()
    assert chi_square < 43.8, "0.1 % point of chi-square with 19 degrees of freedom"


def test_normal_draws_have_the_moments_and_tails_of_a_normal() -> None:
    z = keyed_normal(0, "n", torch.arange(2000), (101,)).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert z.var().item() == pytest.approx(1, abs=0.02)
    assert (z**4).mean().item() == pytest.approx(3, abs=0.1)
    for threshold in (1.0, 2.0, 3.0):
        expected = math.erfc(threshold / math.sqrt(2))
        assert (z.abs() > threshold).double().mean().item() == pytest.approx(expected, rel=0.1)


def test_neighbouring_draws_and_images_are_uncorrelated() -> None:
    z = keyed_normal(0, "n", torch.arange(8), (20_000,))
    off_diagonal = torch.corrcoef(z) - torch.eye(8)
    assert off_diagonal.abs().max() < 0.03
    assert abs(torch.corrcoef(torch.stack([z[0, :-1], z[0, 1:]]))[0, 1]) < 0.03


def test_draws_are_a_format() -> None:
    """The very bits are part of exact resume across versions: changing them must be a decision."""
    assert keyed_seed(0, "noise") == 2271721880203020764
    assert keyed_uniform(0, "noise", torch.tensor([0, 1])).tolist() == [
        0.24048978090286255,
        0.09601670503616333,
    ]


def test_devices_and_types_that_are_not_there_are_refused() -> None:
    cpu = pick_device("cpu")
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(RecipeError, match="unknown"):
        pick_device("abacus")
    with pytest.raises(RecipeError, match="Use auto, float32"):
        pick_dtype("float8", cpu)
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="not available here"):
            pick_device("cuda")


def test_autocast_computes_in_the_type_asked_for() -> None:
    a = torch.randn(4, 4)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), torch.float32):
        assert (a @ a).dtype == torch.float32


def test_peak_memory_sees_an_allocation() -> None:
    meter = PeakMemory(torch.device("cpu"))
    meter.reset()
    before = meter.bytes()
    block = torch.ones(256 * 2**20, dtype=torch.uint8)
    assert meter.bytes() >= before + 200 * 2**20
    del block


def test_the_keyed_generator_depends_on_its_key_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with keyed_generator(0, "dropout", INDEX):
        drawn = torch.rand(100)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    with keyed_generator(0, "dropout", INDEX[:1]):
        assert torch.equal(torch.rand(100), drawn)
    for seed, stream, index in ((1, "dropout", INDEX), (0, "other", INDEX), (0, "dropout", INDEX[1:])):
        with keyed_generator(seed, stream, index):
            assert not torch.equal(torch.rand(100), drawn)
    with keyed_generator(0, "dropout", INDEX.to("meta")):
        pass


def test_the_keyed_generator_is_left_as_it_was_when_something_fails() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="size"), keyed_generator(0, "dropout", INDEX):
        torch.rand(2) + torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_full_precision_undoes_autocast() -> None:
    device, x = torch.device("cpu"), torch.rand(4, 4)
    with autocast(device, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision(device):
            assert (x @ x).dtype == torch.float32
    with full_precision(torch.device("meta")):
        pass
