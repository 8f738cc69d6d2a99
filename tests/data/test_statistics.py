"""Normalised latents have mean 0 and deviation 1, whatever the chunks; rules that do not fit are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoestring.data import statistics
from shoestring.data.rows import Row
from shoestring.data.splits import Split
from shoestring.data.statistics import ROWS, latent_statistics, measured_rows
from shoestring.data.store import Store
from shoestring.errors import StoreError
from shoestring.models.autoencoders import LatentScaling

MakeStore = Callable[..., Store]
MakeRows = Callable[..., list[Row]]


def raw_of(store: Store, rows: np.ndarray[Any, Any], size: int = 16) -> Tensor:
    """Latents as stored, (B, C, h, w) float64."""
    return torch.from_numpy(store._gather(f"latents-{size}", "mean", rows)).double()


def train_rows(store: Store) -> np.ndarray[Any, Any]:
    split = store.splits["train"]
    return split.rows(np.arange(len(split)))


def test_measured_latents_have_mean_0_and_std_1_in_each_channel(
    make_store: MakeStore, rows: MakeRows, kl_folder: Path
) -> None:
    """On the training rows alone, at the largest of two sizes; the store as opened stays as it was."""
    store = make_store(rows(30, 24), autoencoder=str(kl_folder), held_out=6, sizes=(16, 24))
    before = store.latents(24, np.arange(30))
    normalised = store.normalised("measured")
    latents = normalised.latents(24, train_rows(store)).double()
    assert latents.shape == (24, 4, 12, 12)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (latents.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    assert torch.equal(store.latents(24, np.arange(30)), before)
    raw = raw_of(store, np.arange(30), 24).float()
    torch.testing.assert_close(normalised.scaling.undo(normalised.latents(24, np.arange(30))), raw)
    other = store.normalised("measured", 16).latents(16, train_rows(store)).double()
    assert other.mean(dim=(0, 2, 3)).abs().max() < 1e-5


def test_measured_equals_torch_over_the_raw_values(
    make_store: MakeStore, rows: MakeRows, kl_folder: Path
) -> None:
    store = make_store(rows(20), autoencoder=str(kl_folder))
    raw = raw_of(store, np.arange(20))
    scaling = latent_statistics(store, 16)
    assert scaling.shift == pytest.approx(raw.mean(dim=(0, 2, 3)).tolist(), rel=1e-5, abs=1e-9)
    assert scaling.factor == pytest.approx((1 / raw.std(dim=(0, 2, 3), correction=0)).tolist(), rel=1e-5)


def test_distributions_count_with_their_variance(
    make_store: MakeStore, rows: MakeRows, kl_folder: Path
) -> None:
    """Draws of the normalised store, not only their means, have deviation 1."""
    store = make_store(rows(40), autoencoder=str(kl_folder), log_variance=True)
    normalised, every = store.normalised("measured"), np.tile(np.arange(40), 20)
    noise = torch.randn(800, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = normalised.latents(16, every, noise=noise)
    assert drawn.mean(dim=(0, 2, 3)).abs().max() < 0.03
    assert (drawn.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02
    assert normalised.latents(16, every).std(dim=(0, 2, 3)).max() < 0.9


def test_chunks_and_parts_change_no_digit(
    make_store: MakeStore, rows: MakeRows, kl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, name = rows(30), str(kl_folder)
    few = latent_statistics(make_store(given, "few", autoencoder=name, chunk_rows=30), 16)
    many = make_store(given, "many", autoencoder=name, chunk_rows=4)
    assert latent_statistics(many, 16) == few
    monkeypatch.setattr(statistics, "ROWS_AT_ONCE", 7)
    assert latent_statistics(many, 16) == few


def test_x42_1_is_the_published_scaling(make_store: MakeStore, rows: MakeRows, kl_folder: Path) -> None:
    store = make_store(rows(3), autoencoder=str(kl_folder))
    every = np.arange(3)
    torch.testing.assert_close(
        store.normalised("x42-1").latents(16, every), ((raw_of(store, every) + 1) / 42).float()
    )
    undone = store.normalised("x42-1").scaling.undo(torch.tensor([[[[0.5]]]]))
    assert undone.item() == pytest.approx(0.5 * 42 - 1)


def test_autoencoder_is_the_manifests_own_whatever_came_before(
    make_store: MakeStore, rows: MakeRows, kl_folder: Path
) -> None:
    store = make_store(rows(3), autoencoder=str(kl_folder))
    assert store.normalised("measured").normalised("autoencoder").scaling == LatentScaling((0.25,), (0.5,))
    pixels = make_store(rows(3), "pixels")
    assert pixels.normalised("autoencoder").scaling.is_identity


# --- which rows ------------------------------------------------------------------------------------------


def test_all_rows_of_a_small_split_are_measured_and_runs_of_a_large_one() -> None:
    small = Split(0, ROWS, True, 7, ROWS + 100)
    assert sorted(measured_rows(small).tolist()) == sorted(small.rows(np.arange(ROWS)).tolist())
    for total in (ROWS + 1, 1_000_003):
        chosen = measured_rows(Split(0, total, False, 0, total))
        assert len(np.unique(chosen)) == ROWS
        assert (chosen[0], chosen[-1]) == (0, total - 1)
        assert np.count_nonzero(np.diff(chosen) != 1) <= 63
    starts = chosen.reshape(64, 256)[:, 0]
    assert np.ptp(np.diff(starts)) <= 1, "evenly spread"


def test_runs_touch_few_shards_of_a_large_store() -> None:
    """Of 1,000 chunks of 4,096 rows, with rows held out at random, at most two for each run."""
    split = Split(0, 4_086_000, True, 3, 4_096_000)
    assert len(np.unique(measured_rows(split) // 4096)) <= 128


# --- what is refused -------------------------------------------------------------------------------------


def test_rules_that_do_not_fit_are_refused(make_store: MakeStore, rows: MakeRows, kl_folder: Path) -> None:
    pixels = make_store(rows(3))
    for rule in ("measured", "x42-1"):
        with pytest.raises(StoreError, match=r"holds pictures, which are in \[-1, 1\] already"):
            pixels.normalised(rule)
    store = make_store(rows(3), "latents", autoencoder=str(kl_folder))
    with pytest.raises(StoreError, match=r"'x42': unknown\. Use one of autoencoder, measured, x42-1\."):
        store.normalised("x42")
    with pytest.raises(StoreError, match="holds images of 16 pixels, not 24"):
        store.normalised("measured", 24)


def test_a_channel_that_never_changes_is_named(
    make_store: MakeStore, rows: MakeRows, tmp_path: Path, kl_folder: Path
) -> None:
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(kl_folder, low_cpu_mem_usage=False)
    with torch.no_grad():
        model.quant_conv.weight[2] = 0
        model.quant_conv.bias[2] = 0.7
    model.save_pretrained(tmp_path / "dead")
    store = make_store(rows(3), autoencoder=str(tmp_path / "dead"))
    with pytest.raises(StoreError, match=r"channel 2 of the latents is 0\.7 everywhere"):
        store.normalised("measured")


def test_a_store_without_training_rows_cannot_be_measured(
    make_store: MakeStore, rows: MakeRows, kl_folder: Path
) -> None:
    given = [Row(row.key, row.image, row.captions, "hard") for row in rows(3)]
    with pytest.raises(StoreError, match="no training rows"):
        make_store(given, autoencoder=str(kl_folder)).normalised("measured")
