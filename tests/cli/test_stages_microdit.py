"""Stage C with other parts: a MicroDiT on a cascade's codes, and a prior on AutoencoderDC's latents."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from PIL import Image

import shoestring
from shoestring.data.store import Store
from shoestring.models.microdit import MicroDiT
from shoestring.models.wuerstchen_autoencoder import WuerstchenAutoencoder
from shoestring.models.wuerstchen_prior import WuerstchenPrior
from tests.cli.conftest import Command
from tests.cli.conftest import run as command_line

STAGES = Path(__file__).with_name("stages.yaml")

FEW = ("train.checkpoint_every=16", "train.preview_every=null", "stages.a.phases.0.images=16",
       "stages.a.objective.adversarial_start=0", "stages.b.phases.0.images=16")  # fmt: skip

EVALUATION = "evaluation={prompts: 4, seeds: 1, loss_images: 8, loss_levels: [-1, 1]}"


def words(sets: tuple[str, ...]) -> list[str]:
    """Assignments as the command line takes them."""
    return [word for each in sets for word in ("--set", each)]


def measured(run: Path) -> dict[str, dict[str, Any]]:
    """Overall rows of unseen scenes by their metrics."""
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    return {row["metric"]: row for row in rows if row["split"] == "unseen_scenes" and row["facet"] == "all"}


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Stage A and B of a few steps, and a store of its codes at two sizes."""
    folder = tmp_path_factory.mktemp("codes")
    with contextlib.chdir(folder):
        for stage in ("a", "b"):
            assert command_line("train", STAGES, "--stage", stage, *words(FEW)) == 0
        assert command_line(
            *("encode", "scenes", "--out", "store", "--images", 48, "--held-out", 8),
            *("--size", 64, "--size", 128, "--autoencoder", "runs/cascade-b"),
        ) == 0  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def microdit(codes: Path) -> Path:
    """The same folder with a run of recipe wuerstchen-microdit: its four phases, a few images each."""
    images = [f"stages.c.phases.{i}.{each}" for i in range(4) for each in ("images=16", "batch=8")]
    sets = (
        *("stages.c.data.store=store", "stages.c.data.autoencoder=runs/cascade-b"),
        *("stages.c.data.text_encoder=hashing", "data.pad=none", "data.max_tokens=null"),
        *("train.compile=false", "train.dtype=float32"),
        "stages.c.model={hidden_size: 32, head_dim: 16, depth: 3, multiple_of: 8, mixer_depth: 1, "
        "mixer_size: 32, num_experts: 2, expert_blocks: 2}",
        *images,
        *(f"stages.c.phases.{i}.size={size}" for i, size in enumerate((64, 64, 128, 128))),
        *("stages.c.phases.0.warmup=8", "stages.c.phases.2.ema.start=8", "stages.c.phases.3.ema.start=8"),
        *("stages.c.sampling.steps=2", "train.checkpoint_every=64", "train.log_every=16", EVALUATION),
    )
    with contextlib.chdir(codes):
        assert command_line("train", "wuerstchen-microdit", "--stage", "c", *words(sets)) == 0
    return codes


def test_recipe_wuerstchen_microdit_trains_on_codes_through_all_its_phases_and_draws(
    microdit: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """Two sizes, masked and dense."""
    monkeypatch.chdir(microdit)
    run = microdit / "runs/wuerstchen-microdit-c"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [(line["phase"], line["mask"]) for line in lines if line["kind"] == "train"]
    assert trained == [("masked-512", 0.5), ("dense-512", 0), ("masked-1024", 0.5), ("dense-1024", 0)]
    pipeline = shoestring.load(run)
    assert isinstance(pipeline.vae, WuerstchenAutoencoder)
    assert isinstance(pipeline.transformer, MicroDiT)
    assert pipeline.transformer.config.patch_size == 1
    assert command("sample", run, "a red circle", "--count", 2, "--out", "drawn").code == 0
    assert {Image.open(path).size for path in (microdit / "drawn").glob("0*.png")} == {(128, 128)}
    assert command("evaluate", run).code == 0
    rows = measured(run)
    assert rows["compression_spatial"]["value"] == 16
    assert rows["scene_accuracy"]["n"] == 4
    assert rows["held_out_loss"]["value"] > 0


def test_codes_are_normalised_by_their_own_statistics(microdit: Path) -> None:
    """The numbers that its pipeline keeps give mean 0 and deviation 1 in each channel."""
    pipeline = shoestring.load(microdit / "runs/wuerstchen-microdit-c")
    store = Store.open(str(microdit / "store"))
    train = store.splits["train"].rows(np.arange(48))
    mean, std = (torch.tensor(pipeline.config[f"latents_{each}"])[:, None, None] for each in ("mean", "std"))
    seen = (store.latents(128, train).float() - mean) / std
    assert seen.mean(dim=(0, 2, 3)).abs().max() < 1e-2
    assert (seen.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-2


def dc(folder: Path) -> AutoencoderDC:
    """A small AutoencoderDC (8:1, 8 channels), saved to disk."""
    torch.manual_seed(0)
    model = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=(8, 8, 16, 16),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        scaling_factor=0.4,
    )
    model.save_pretrained(folder)
    return model.eval()


def test_an_autoencoder_dc_stands_in_for_stages_a_and_b(empty: Path, command: Command) -> None:
    """The same prior on its latents: trained, drawn, measured; pictures are what its decoder makes."""
    saved = dc(empty / "dc")
    sets = (
        *("stages.c.data.autoencoder=dc", "data.scenes.images=48", "data.scenes.held_out=8"),
        *("stages.c.phases.0.images=16", "train.checkpoint_every=16", "train.preview_every=16"),
    )
    assert command("train", STAGES, "--stage", "c", *words(sets)).code == 0
    run = empty / "runs/cascade-c"
    assert command("sample", run, "a red circle", "--count", 2).code == 0
    assert {Image.open(path).size for path in (empty / "samples").glob("0*.png")} == {(64, 64)}
    assert command("evaluate", run).code == 0
    rows = measured(run)
    assert rows["compression_spatial"]["value"] == 8
    assert rows["compression_elements"]["value"] == 3 * 64 / 8
    assert rows["scene_accuracy"]["n"] == 4
    assert rows["held_out_loss"]["value"] > 0

    pipeline = shoestring.load(run)
    assert isinstance(pipeline.prior_prior, WuerstchenPrior)
    seeded = torch.Generator().manual_seed
    latents = pipeline("a red circle", output_type="latent", generator=seeded(0)).images
    drawn = pipeline("a red circle", output_type="pt", generator=seeded(0)).images
    assert torch.allclose(drawn, (saved.decode(latents).sample / 2 + 0.5).clamp(0, 1), atol=1e-5)
