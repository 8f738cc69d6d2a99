"""`shoestring sample`: pictures that say how they were made, and what it says to a mistake."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

import shoestring
from shoestring.pipelines.export import export
from shoestring.sampling.schedulers import EDM, FLOW, NOISE
from tests.pipelines import stock_parts as parts

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
        (("runs/tiny", "a", "--size", "big"), "--size big: must be pixels, height x width"),
        (("runs/tiny", "a", "--size", "0"), "height x width 0 x 0: both must be multiples of"),
        (("runs/tiny", "a", "--size", "33x32"), "height x width 33 x 32: both must be multiples of"),
        (("runs/tiny", "a", "--guidance", -1), "--guidance -1.0: must be a number from 0; 1 is none."),
        (("runs/tiny", "a", "--guidance", "nan"), "--guidance nan: must be a number from 0"),
        (
            ("runs/tiny", "a", "--scheduler", "heun"),
            "scheduler 'heun': unknown. Use flow_euler, flow_heun.",
        ),
        (
            ("runs/tiny", "a", "--scheduler", "ddim"),
            "scheduler 'ddim': does not fit prediction x0. Use flow_euler, flow_heun.",
        ),
        (
            ("runs/tiny", "a", "--tiny-decoder", "x/y"),
            "--tiny-decoder: stands in for an AutoencoderKL, and this MicroDiTPipeline has a Pixel",
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


def test_every_scheduler_is_in_the_help(command: Any) -> None:
    told = command("sample", "--help").out
    assert not [name for name in (*EDM, *FLOW, *NOISE) if name not in told]


# Stock pipelines of diffusers, as a student of SDXL is exported


@pytest.fixture
def stock(empty: Path) -> Path:
    """An export of a tiny SDXL (`student`) and a tiny decoder (`taesd`) in the current folder."""
    export(parts.sdxl_pipeline(), empty / "student", ("unet",))
    parts.tiny().save_pretrained(empty / "taesd")
    return empty


def test_a_stock_pipeline_draws_with_the_numbers_beside_it(stock: Path, command: Any) -> None:
    said = command("sample", "student", "a red circle", "a cat", "--seed", 3)
    assert (said.code, said.err) == (0, "")
    settings = json.loads(Image.open("samples/00001.png").text["shoestring"])
    asked = {"prompt": "a cat", "seed": 3, "steps": 3, "guidance": 3.5}
    assert settings == {**asked, "scheduler": "EulerDiscreteScheduler"}
    again = StableDiffusionXLPipeline.from_pretrained("student")(
        ["a red circle", "a cat"],
        num_inference_steps=3,
        guidance_scale=3.5,
        generator=[torch.Generator().manual_seed(3) for _ in range(2)],
    ).images[1]
    assert np.array_equal(np.asarray(again), pixels(stock / "samples/00001.png"))


def test_of_a_stock_pipeline_steps_guidance_scheduler_and_decoder_may_be_others(
    stock: Path, command: Any
) -> None:
    options = ("--steps", 2, "--guidance", 1, "--scheduler", "lcm", "--tiny-decoder", "taesd", "--out", "few")
    said = command("sample", "student", "a red circle", *options)
    assert (said.code, said.err) == (0, "")
    settings = json.loads(Image.open("few/00000.png").text["shoestring"])
    assert (settings["steps"], settings["guidance"], settings["scheduler"]) == (2, 1.0, "LCMScheduler")
    command("sample", "student", "a red circle", *options[:-4], "--out", "full")
    assert not np.array_equal(pixels(stock / "few/00000.png"), pixels(stock / "full/00000.png"))


def test_a_prompt_too_long_for_a_stock_pipeline_is_warned_of_once(stock: Path, command: Any) -> None:
    said = command("sample", "student", "a" * 20)
    assert said.err.splitlines() == [
        "warning: prompt too long for the text encoder: the last 6 of its tokens are ignored "
        f"(it takes 16): {'a' * 20}"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--scheduler", "flow_euler"),
            "scheduler 'flow_euler': does not fit prediction epsilon. Use euler,",
        ),
        (("--scheduler", "pndm"), "scheduler 'pndm': unknown. Use euler, ddim, dpm++, lcm, tcd."),
        (("--tiny-decoder", "student"), "--tiny-decoder student: is of class AutoencoderKL, not"),
        (("--tiny-decoder", "./none"), "--tiny-decoder ./none: no autoencoder there"),
        (("--scheduler", "lcm", "--steps", 60), "--steps 60: LCMScheduler has the 50 times"),
        (("--scheduler", "tcd", "--steps", 60, "--memory", "2GiB"), "--steps 60: TCDScheduler has the 50 t"),
    ],
)
def test_options_that_do_not_fit_a_stock_pipeline_are_one_line(
    options: tuple[object, ...], message: str, stock: Path, command: Any
) -> None:
    assert command("sample", "student", "a", *options).refused().startswith(message)
    assert not (stock / "samples").exists()


def test_a_stock_pipeline_that_needs_a_picture_is_told(stock: Path, command: Any) -> None:
    index = json.loads((stock / "student/model_index.json").read_text())
    index["_class_name"] = "StableDiffusionXLImg2ImgPipeline"
    (stock / "student/model_index.json").write_text(json.dumps(index))
    assert (
        command("sample", "student", "a")
        .refused()
        .startswith("student: a StableDiffusionXLImg2ImgPipeline, which `shoestring sample` cannot prompt.")
    )


@pytest.mark.parametrize(("size", "shape"), [("24x32", (24, 32)), ("32", (32, 32))])
def test_the_size_is_height_by_width_whole_or_staged(
    size: str, shape: tuple[int, int], stock: Path, command: Any
) -> None:
    asked = ("sample", "student", "a cat", "--size", size)
    assert command(*asked, "--out", "plain").code == 0
    assert pixels(stock / "plain/00000.png").shape == (*shape, 3)
    said = command(*asked, "--memory", "2GiB", "--out", "planned")
    assert said.out.startswith(f"{shape[0]} x {shape[1]} px in 2.00 GiB")
    assert (stock / "planned/00000.png").read_bytes() == (stock / "plain/00000.png").read_bytes()
    refused = command(*asked[:-1], "1025", "--memory", "2GiB").refused()
    assert refused.startswith("height x width 1025 x 1025: both must be multiples of")


# Within a budget of memory


def test_a_budget_tells_its_plan_and_draws_the_same_pictures(stock: Path, command: Any) -> None:
    asked = ("sample", "student", "a red circle", "a cat", "--count", 2, "--seed", 3)
    said = command(*asked, "--memory", "2GiB", "--out", "planned")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("16 x 16 px in 2.00 GiB on cpu: expected peak 0.63 GiB, one stage in memory")
    assert "U-Net 0.63 GiB (float32, 4 at once)" in said.out.splitlines()[1]
    command(*asked, "--out", "plain")
    for number in range(4):
        planned, plain = (stock / folder / f"{number:05d}.png" for folder in ("planned", "plain"))
        assert planned.read_bytes() == plain.read_bytes()


def test_a_budget_goes_with_another_scheduler_and_a_tiny_decoder(stock: Path, command: Any) -> None:
    asked = ("sample", "student", "a cat", "--steps", 2, "--scheduler", "lcm", "--tiny-decoder", "taesd")
    said = command(*asked, "--memory", "2GiB", "--out", "planned")
    assert "tiny decoder" in said.out
    command(*asked, "--out", "plain")
    assert (stock / "planned/00000.png").read_bytes() == (stock / "plain/00000.png").read_bytes()


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("4G", "--memory 4G: must be a number with KiB, MiB, GiB, TiB, MB or GB, such as 4GiB."),
        ("100MiB", "--memory 100.00 MiB: 16 x 16 px on cpu takes 0.63 GiB at the least"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_one_line(
    memory: str, message: str, stock: Path, command: Any
) -> None:
    assert command("sample", "student", "a", "--memory", memory).refused().startswith(message)
    assert not (stock / "samples").exists()


def test_a_budget_is_refused_for_other_pipelines(here: Path, command: Any) -> None:
    error = command("sample", "runs/tiny", "a", "--memory", "4GiB").refused()
    assert error.startswith("--memory: runs/tiny is a MicroDiTPipeline; plans are made for")
