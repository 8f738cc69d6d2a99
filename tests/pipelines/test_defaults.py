"""Steps and guidance that belong to a pipeline, prompts that are cut, and pictures of stock pipelines."""

from __future__ import annotations

import inspect
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import IFPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

import shoestring
from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.autoencoders import PixelAutoencoder
from shoestring.pipelines.defaults import SAMPLING, Sampling, draws_prompts, sampling_of
from shoestring.pipelines.export import export
from shoestring.pipelines.generate import generate, warn_cut_prompts
from shoestring.pipelines.unet import make_unet_pipeline
from shoestring.sampling.schedulers import make_noise_scheduler
from tests.models.test_wuerstchen_autoencoder import tiny as wuerstchen
from tests.pipelines import stock_parts as parts
from tests.pipelines.test_unet import make as unet_pipeline

PROMPTS = ["red", "a blue cat, asleep"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export(parts.sdxl_pipeline(), tmp_path / "pipeline", ("unet",))
    return tmp_path / "pipeline"


def test_a_stock_pipeline_is_opened_with_the_numbers_beside_it(folder: Path) -> None:
    opened = shoestring.load(folder)
    assert sampling_of(opened) == Sampling(3, 3.5)
    pictures = list(generate(opened, PROMPTS, [5, 6]))
    assert [(each.steps, each.guidance, each.scheduler) for each in pictures] == [
        (3, 3.5, "EulerDiscreteScheduler")
    ] * 2


def test_without_them_the_numbers_are_the_class_own(folder: Path) -> None:
    (folder / SAMPLING).unlink()
    opened = shoestring.load(folder)
    defaults = inspect.signature(type(opened).__call__).parameters
    assert sampling_of(opened) == Sampling(
        defaults["num_inference_steps"].default, defaults["guidance_scale"].default
    )
    assert sampling_of(opened) == Sampling(50, 5.0)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot be used"),
        ('{"steps": 10}', "'guidance'"),
        ('{"steps": 0, "guidance": 1}', "steps 0 must be a whole number from 1"),
        ('{"steps": true, "guidance": 1}', "steps True"),
        ('{"steps": 10, "guidance": NaN}', "guidance nan must be a number from 0"),
        ('{"steps": 10, "guidance": "3"}', "guidance '3'"),
        ("[1]", "cannot be used"),
    ],
)
def test_numbers_that_cannot_be_used_are_told_in_one_line(content: str, problem: str, folder: Path) -> None:
    (folder / SAMPLING).write_text(content)
    with pytest.raises(CheckpointError) as told:
        shoestring.load(folder)
    assert problem in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("with_numbers", [True, False])
def test_a_hub_id_and_its_revision_are_opened_likewise(
    with_numbers: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cache as the hub's client leaves it; nothing is downloaded."""
    if not with_numbers:
        (folder / SAMPLING).unlink()
    cached = tmp_path / "hub/models--someone--koala"
    shutil.move(folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs/v1").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    opened = shoestring.load("someone/koala", revision="v1")
    assert type(opened) is StableDiffusionXLPipeline
    assert sampling_of(opened) == (Sampling(3, 3.5) if with_numbers else Sampling(50, 5.0))


def test_a_stock_picture_does_not_depend_on_its_neighbours(folder: Path) -> None:
    opened = shoestring.load(folder)
    together = [np.asarray(each.image, np.int16) for each in generate(opened, PROMPTS, [5, 6])]
    alone = [
        np.asarray(next(generate(opened, [prompt], [seed])).image, np.int16)
        for prompt, seed in zip(PROMPTS, [5, 6], strict=True)
    ]
    assert together[0].std() > 1
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(together, alone, strict=True)), "but for rounding"
    assert np.abs(together[0] - together[1]).max() > 1


def test_prompts_that_are_cut_are_told_once(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of SDXL by its tokenizers' limit: 16 tokens, two of which are its marks; drawing says no more."""
    opened = shoestring.load(folder)
    fits, long = "a" * 14, "a" * 14 + " red"
    assert warn_cut_prompts(opened, [fits, long]) == [
        "warning: prompt too long for the text encoder: the last 3 of its tokens are ignored "
        f"(it takes 16): {long}"
    ]
    for name in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    list(generate(opened, [long], [0]))
    assert not caplog.records


def test_pipelines_that_draw_from_prompts_alone_are_told_from_others() -> None:
    pipeline = parts.sdxl_pipeline()
    assert draws_prompts(pipeline)
    pipeline.sampling = None
    assert draws_prompts(pipeline)
    assert not draws_prompts(StableDiffusionXLImg2ImgPipeline(**pipeline.components))


def test_every_stock_pipeline_that_draws_has_numbers_of_its_own() -> None:
    """Their defaults are numbers, so that `generate` can tell what a picture was made with."""
    found = []
    for kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
        bare = kind.__new__(kind)
        names = list(inspect.signature(kind.__init__).parameters)[1:]
        bare.register_to_config(**dict.fromkeys(names))
        if draws_prompts(bare):
            found.append(kind.__name__)
            sampling = sampling_of(bare)
            assert sampling.steps >= 1, kind
            assert sampling.guidance >= 0, kind
    assert {"StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"} <= set(found)
    assert not [name for name in found if "ControlNet" in name or "Img2Img" in name]


def test_sides_are_what_an_autoencoder_of_odd_cells_takes() -> None:
    """Cells of 16/3 px, which fill multiples of 16."""
    pipeline = unet_pipeline(parts.unet(sample_size=6), parts.hashed_text(), wuerstchen(), steps=1)
    assert next(generate(pipeline, ["a"], [0], size=(32, 48))).image.size == (48, 32)
    with pytest.raises(RecipeError, match="40 x 32: both must be multiples of 16; nearest to 40: 32 or 48"):
        next(generate(pipeline, ["a"], [0], size=(40, 32)))


def test_a_pipeline_whose_sizes_are_not_known_is_given_none() -> None:
    pixels = IFPipeline.__new__(IFPipeline)  # on pixels: no autoencoder tells what sides must be
    pixels.register_to_config(**dict.fromkeys(list(inspect.signature(IFPipeline.__init__).parameters)[1:]))
    with pytest.raises(RecipeError, match=r"--size: cannot be given to a IFPipeline"):
        next(generate(pixels, ["a"], [0], size=(64, 64)))


def test_ours_keeps_its_numbers_in_its_configuration(tmp_path: Path) -> None:
    pipeline = make_unet_pipeline(
        parts.unet(in_channels=3, out_channels=3),
        text=parts.hashed_text(),
        vae=PixelAutoencoder(),
        scheduler=make_noise_scheduler("ddim", parts.SCHEDULE, prediction="epsilon"),
        null="zeros",
        steps=2,
        guidance=1.5,
        size=parts.SIZE,
    )
    export(pipeline, tmp_path / "pipeline", ("unet",))
    assert not (tmp_path / "pipeline" / SAMPLING).exists()
    assert sampling_of(shoestring.load(tmp_path / "pipeline")) == Sampling(2, 1.5)
