"""`shoestring sample`: pictures that say how they were made, and what it says to a mistake."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import shoestring

PROMPTS = ("a red circle", "two blue squares on white")


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path).convert("RGB"))


def test_each_prompt_becomes_a_picture_and_all_of_them_a_grid(here: Path, command: Any) -> None:
    said = command("sample", "runs/tiny", *PROMPTS, "--count", 2, "--seed", 5, "--out", "new/place")
    assert (said.code, said.err) == (0, "")
    out = here / "new/place"
    assert said.out.splitlines() == [
        "new/place/00000.png  seed 5  a red circle",
        "new/place/00001.png  seed 6  a red circle",
        "new/place/00002.png  seed 5  two blue squares on white",
        "new/place/00003.png  seed 6  two blue squares on white",
        "new/place/grid.png  4 pictures",
    ]
    assert sorted(path.name for path in out.iterdir()) == [*(f"0000{i}.png" for i in range(4)), "grid.png"]
    assert Image.open(out / "00000.png").size == (32, 32)
    width, height = Image.open(out / "grid.png").size
    assert width == height > 2 * 128, "two columns, enlarged to be seen"


def test_a_picture_says_how_it_was_made_and_python_makes_it_again(here: Path, command: Any) -> None:
    words = ("--seed", 3, "--steps", 3, "--guidance", 1.5, "--device", "cpu")
    assert command("sample", "runs/tiny", "ein grüner Kreis", *words).code == 0
    image = Image.open(here / "samples/00000.png")
    assert image.text["prompt"] == "ein grüner Kreis"
    settings = json.loads(image.text["shoestring"])
    asked = {"prompt": "ein grüner Kreis", "seed": 3, "steps": 3, "guidance": 1.5}
    assert settings == {**asked, "scheduler": "FlowMatchHeunDiscreteScheduler"}
    again = shoestring.load(here / "runs/tiny")(
        settings["prompt"],
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"],
        generator=torch.Generator().manual_seed(settings["seed"]),
    ).images[0]
    assert np.array_equal(np.asarray(again), pixels(here / "samples/00000.png"))


def test_without_options_the_recipes_sampling_is_used(here: Path, command: Any) -> None:
    assert command("sample", "runs/tiny", "a red circle").code == 0
    settings = json.loads(Image.open("samples/00000.png").text["shoestring"])
    assert (settings["steps"], settings["guidance"], settings["seed"]) == (2, 3.0, 0)


def test_a_pipeline_folder_gives_the_runs_pictures(here: Path, command: Any) -> None:
    (here / "runs/tiny/pipeline").rename(here / "alone")
    (here / "runs/tiny").rename(here / "gone")
    assert command("sample", "alone", "a red circle", "--out", "a").code == 0
    (here / "gone").rename(here / "runs/tiny")
    (here / "alone").rename(here / "runs/tiny/pipeline")
    assert command("sample", "runs/tiny", "a red circle", "--out", "b").code == 0
    assert np.array_equal(pixels(here / "a/00000.png"), pixels(here / "b/00000.png"))


def test_a_picture_does_not_depend_on_how_many_are_made_at_once(here: Path, command: Any) -> None:
    for batch in (1, 3):
        command("sample", "runs/tiny", *PROMPTS, "a", "--batch", batch, "--out", f"by{batch}")
    for number in range(3):
        one, three = (pixels(here / f"by{b}/0000{number}.png").astype(int) for b in (1, 3))
        assert np.abs(one - three).max() <= 1, "but for rounding"


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("scheduler", ["flow_euler", "flow_heun"])
def test_every_fitting_scheduler_samples_in_any_number_of_steps(
    scheduler: str, steps: int, here: Path, command: Any
) -> None:
    said = command("sample", "runs/tiny", "a", "--scheduler", scheduler, "--steps", steps)
    assert (said.code, said.err) == (0, "")


def test_a_prompt_too_long_is_warned_of_with_the_tokens_cut(here: Path, command: Any) -> None:
    said = command("sample", "runs/tiny", "short", " ".join(["word"] * 70))
    assert said.code == 0
    (line,) = said.err.splitlines()
    assert line.startswith(
        "warning: prompt too long for the text encoder: "
        "the last 6 of its tokens are ignored (it takes 64): word "
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("runs/tiny", "a", "--steps", 0), "--steps 0: must be at least 1."),
        (("runs/tiny", "a", "--steps", -3), "--steps -3: must be at least 1."),
        (("runs/tiny", "a", "--guidance", -1), "--guidance -1.0: must be a number from 0; 1 is none."),
        (("runs/tiny", "a", "--guidance", "nan"), "--guidance nan: must be a number from 0"),
        (
            ("runs/tiny", "a", "--scheduler", "ddim"),
            "scheduler 'ddim': unknown. Use flow_euler, flow_heun.",
        ),
        (
            ("runs/tiny", "a", "--scheduler", "edm_heun"),
            "scheduler 'edm_heun': does not fit prediction x0. Use flow_euler, flow_heun.",
        ),
        (("runs/tiny", "a", "--device", "tpu"), "device 'tpu': unknown."),
        (("runs/none", "a"), "runs/none: neither a folder here nor a hub repository that can be read ("),
        (("photos", "a"), "photos: no pipeline here (no model_index.json). Give a run or a pipeline folder."),
        (("stopped", "a"), "stopped: this run has no pipeline yet; it is written at the first checkpoint."),
        (("halved", "a"), "halved: a part of the pipeline is missing or damaged ("),
        (("garbled", "a"), "garbled/model_index.json: cannot be read ("),
        (("foreign", "a"), "foreign: a DDPMPipeline, which `shoestring sample` cannot prompt."),
    ],
)
def test_a_mistake_is_one_line_and_makes_no_picture(
    words: tuple[object, ...], message: str, here: Path, command: Any
) -> None:
    spoil(here, str(words[0]))
    assert command("sample", *words).refused().startswith(message)
    assert not (here / "samples").exists()


def spoil(here: Path, name: str) -> None:
    """Make the folders that the mistakes above name."""
    if name == "stopped":
        (here / "stopped").mkdir()
        (here / "runs/tiny/recipe.yaml").rename(here / "stopped/recipe.yaml")
    if name == "halved":
        (here / "runs/tiny/pipeline").rename(here / "halved")
        (here / "halved/transformer/diffusion_pytorch_model.safetensors").unlink()
    if name == "garbled":
        (here / "garbled").mkdir()
        (here / "garbled/model_index.json").write_text("{")
    if name == "foreign":
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        unet = UNet2DModel(8, block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, **blocks)
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(here / "foreign")


def test_a_read_only_folder_is_told(here: Path, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def refusing(self: Path, *arguments: Any, **named: Any) -> None:
        if self.name == "locked":
            raise PermissionError(13, os.strerror(13), str(self))
        mkdir(self, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", refusing)
    error = command("sample", "runs/tiny", "a", "--out", "locked").refused()
    assert error.startswith("locked/00000.png: cannot be written (Permission denied). Choose another folder")


def test_a_file_in_the_place_of_the_folder_is_told(here: Path, command: Any) -> None:
    (here / "taken").write_text("mine")
    error = command("sample", "runs/tiny", "a", "--out", "taken").refused()
    assert error.startswith("taken/00000.png: cannot be written (")
    assert (here / "taken").read_text() == "mine"
