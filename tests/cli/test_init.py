"""`init`: a training that starts from another one's network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import shoestring
from tests.cli.test_train import same, weights

BRIEFLY = "[{name: tuned, size: 32, images: 24, batch: 24, lr: 1.0e-12}]"
STILL = (
    "--set",
    f"phases={BRIEFLY}",
    "--set",
    "seed=5",
    "--set",
    "train.preview_every=null",
    "--set",
    "ema=null",
)
"""A step that leaves weights as they are, but for the last digits."""


def close(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-8) for name in a)


def test_init_starts_from_the_runs_weights(here: Path, tiny: Path, command: Any) -> None:
    """The averaged ones, which the run has exported."""
    assert command("train", tiny, "--name", "tuned", "--set", "init=runs/tiny", *STILL).code == 0
    assert command("train", tiny, "--name", "fresh", *STILL).code == 0
    assert close(here / "runs/tuned", here / "runs/tiny")
    fresh, before = weights(here / "runs/fresh"), weights(here / "runs/tiny")
    assert not torch.allclose(before["patch_embed.weight"], fresh["patch_embed.weight"], atol=1e-3)


def test_init_takes_a_pipeline_folder_and_reads_nothing_but_its_network(
    here: Path, tiny: Path, command: Any
) -> None:
    """Neither encoders nor an index are there."""
    shutil.copytree(here / "runs/tiny/pipeline/transformer", here / "bare/transformer")
    assert command("train", tiny, "--name", "tuned", "--set", "init=bare", *STILL).code == 0
    assert close(here / "runs/tuned", here / "runs/tiny")


def test_a_network_goes_on_at_another_size_with_another_objective_and_optimiser(
    here: Path, tiny: Path, command: Any
) -> None:
    """Flow matching with Muon at 32 px on scenes becomes EDM with AdamW at 16 px on pictures."""
    recipe = here / "other.yaml"
    recipe.write_text(
        f"""
base: {tiny}
init: runs/tiny
data: {{store: parted}}
objective: {{kind: edm}}
optimizer: {{kind: adamw}}
phases: [{{name: small, size: 16, images: 24, batch: 24, lr: 1.0e-12, position_scale: 0.5}}]
sampling: {{scheduler: edm_heun}}
ema: null
train: {{preview_every: null}}
"""
    )
    assert command("train", recipe).code == 0
    assert close(here / "runs/other", here / "runs/tiny")
    pipeline = shoestring.load("runs/other")
    config = pipeline.transformer.config
    assert (config.sample_size, config.pos_interp_scale) == (16, 0.5)
    assert pipeline("some grey noise").images[0].size == (16, 16)


def test_a_resumed_run_no_longer_needs_what_it_was_started_from(here: Path, tiny: Path, command: Any) -> None:
    sets = ("--name", "tuned", "--set", "init=runs/tiny", "--set", "phases.1.images=48")
    assert command("train", tiny, *sets).code == 0
    shutil.copytree(here / "runs/tuned", here / "unbroken")
    shutil.rmtree(here / "runs/tiny")
    shutil.rmtree(here / "runs/tuned/checkpoints/000000000240")
    said = command("train", "runs/tuned", "--resume")
    assert said.code == 0
    assert "Resuming runs/tuned after 192 images." in said.err
    assert same(here / "runs/tuned", here / "unbroken")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ("init=runs/tiny", "model.depth=2"),
            "init runs/tiny: not the recipe's network: model.depth is 1 there, 2 here. Use the `model`",
        ),
        (
            ("init=runs/tiny", "model.mlp_ratio=2", "model.patch_size=2"),
            "model.patch_size is 4 there, 2 here; model.mlp_ratio is (1.0, 4.0) there, 2.0 here.",
        ),
        (("init=runs/tiny", "model.head_dim=32"), "model.head_dim is 16 there, 32 here."),
        (("init=runs/none",), "runs/none: neither a folder here nor a hub repository"),
        (("init=plain",), "plain: no pipeline here"),
        (("init=photos",), "photos: no pipeline here (no model_index.json)"),
    ],
)
def test_init_from_what_does_not_fit_is_refused(
    sets: tuple[str, ...], message: str, here: Path, tiny: Path, command: Any
) -> None:
    words = [word for each in sets for word in ("--set", each)]
    assert message in command("train", tiny, "--name", "new", *words).refused()
    assert not (here / "runs/new").exists()
