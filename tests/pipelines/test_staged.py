"""Stages against the whole pipeline: the same pictures, with less in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextModel

from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.text_encoders import TextEncoder
from shoestring.pipelines.defaults import write_sampling
from shoestring.pipelines.generate import Picture, generate
from shoestring.pipelines.load import load
from shoestring.pipelines.memory_parts import set_tile
from shoestring.pipelines.parts import use_scheduler, use_tiny_decoder
from shoestring.pipelines.staged import StagedPipeline
from tests.models.test_network_files import served
from tests.pipelines import stock_parts as parts
from tests.pipelines.test_unet import make, scenes, sdxl, stable_diffusion

PROMPTS = ["a red circle", "a blue square in the top left", "dots"]
SEEDS = [3, 1, 2]
BUDGET = 2**30
KINDS = {"sdxl": sdxl, "stable_diffusion": stable_diffusion, "ours": scenes}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved pipeline of each kind."""
    made = {}
    for name, kind in KINDS.items():
        made[name] = tmp_path_factory.mktemp(name)
        pipeline = kind()
        pipeline.save_pretrained(made[name])
        write_sampling(pipeline, made[name])
    return made


def pixels(pictures: Sequence[Picture]) -> Any:
    return np.stack([np.asarray(picture.image, dtype=np.float32) for picture in pictures])


def staged(folder: Path, *, change: Any = None, batch: int = 2, **settings: Any) -> list[Picture]:
    """Pictures by stages; `change` alters the plan."""
    opened = StagedPipeline(
        folder, **{name: settings.pop(name) for name in ("scheduler", "tiny_decoder") if name in settings}
    )
    plan = opened.plan(BUDGET, batch=batch, guidance=settings.get("guidance"))
    return list(opened.generate(change(plan) if change else plan, PROMPTS, SEEDS, **settings))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"guidance": 1.0, "steps": 2}, {"guidance": 4.0}])
def test_stages_draw_what_the_whole_pipeline_draws(
    kind: str, settings: dict[str, Any], folders: dict[str, Path]
) -> None:
    """Bit for bit in float32, over two batches, with the folder's own numbers and with given ones."""
    whole = list(generate(load(folders[kind]), PROMPTS, SEEDS, batch_size=2, **settings))
    by_stages = staged(folders[kind], **settings)
    assert [each.settings() for each in by_stages] == [each.settings() for each in whole]
    assert (pixels(by_stages) == pixels(whole)).all()
    assert pixels(whole).std() > 10  # a picture, not a blank


def test_a_scheduler_is_put_in_place_as_in_the_whole_pipeline(folders: dict[str, Path]) -> None:
    pipeline = load(folders["sdxl"])
    use_scheduler(pipeline, "ddim")
    whole = list(generate(pipeline, PROMPTS, SEEDS, batch_size=2))
    by_stages = staged(folders["sdxl"], scheduler="ddim")
    assert by_stages[0].scheduler == "DDIMScheduler"
    assert (pixels(by_stages) == pixels(whole)).all()


@pytest.mark.parametrize("kind", ["sdxl", "stable_diffusion"])
def test_a_tiny_decoder_is_put_in_place_as_in_the_whole_pipeline(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    parts.tiny().save_pretrained(tmp_path)
    pipeline = load(folders[kind])
    use_tiny_decoder(pipeline, str(tmp_path))
    whole = list(generate(pipeline, PROMPTS, SEEDS, batch_size=2))
    opened = StagedPipeline(folders[kind], tiny_decoder=str(tmp_path))
    plan = opened.plan(BUDGET, batch=2)
    assert plan.decode.tiny
    assert (pixels(list(opened.generate(plan, PROMPTS, SEEDS))) == pixels(whole)).all()


def test_tiles_are_diffusers_own(folders: dict[str, Path]) -> None:
    pipeline = load(folders["sdxl"])
    set_tile(pipeline.vae, 8)
    pipeline.vae.enable_slicing()
    whole = list(generate(pipeline, PROMPTS, SEEDS, batch_size=2))
    by_stages = staged(
        folders["sdxl"], change=lambda plan: replace(plan, decode=replace(plan.decode, tile=8, batch=1))
    )
    assert (pixels(by_stages) == pixels(whole)).all()
    assert (pixels(by_stages) != pixels(staged(folders["sdxl"]))).any()


@pytest.mark.parametrize("kind", KINDS)
def test_8_bit_weights_draw_nearly_the_same(kind: str, folders: dict[str, Path]) -> None:
    pytest.importorskip("torchao")
    exact = pixels(staged(folders[kind]))
    rough = pixels(
        staged(
            folders[kind],
            change=lambda plan: replace(plan, denoise=replace(plan.denoise, int8=True, dtype=torch.bfloat16)),
        )
    )
    difference = abs(rough - exact).mean()
    assert 0 < difference < 4  # of 255


def test_fewer_pictures_at_once_draw_the_same(folders: dict[str, Path]) -> None:
    """Each has a generator of its own, so a plan's batches change rounding alone."""
    one, three = (pixels(staged(folders["sdxl"], batch=batch)) for batch in (1, 3))
    assert abs(one - three).max() <= 1


def test_a_safety_checker_is_loaded_for_the_decode_and_asked(tmp_path: Path) -> None:
    """What the stock pipeline blackens, stages blacken."""
    pipeline = stable_diffusion()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=8)
    )
    checker.concept_embeds_weights.fill_(-2.0)  # below every cosine: all that is near is flagged
    size = {"height": 16, "width": 16}
    pipeline.register_modules(
        safety_checker=checker.eval(),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size),
    )
    pipeline.save_pretrained(tmp_path)
    whole = list(generate(load(tmp_path), PROMPTS, SEEDS, batch_size=2, steps=2, guidance=2.0))
    assert (pixels(staged(tmp_path, steps=2, guidance=2.0)) == pixels(whole)).all()
    assert (pixels(whole) == 0).all()


def test_cut_prompts_are_told(folders: dict[str, Path]) -> None:
    told: list[str] = []
    opened = StagedPipeline(folders["sdxl"])
    plan = opened.plan(BUDGET)
    list(opened.generate(plan, ["a " * 40] * 3, [0, 1, 2], tell=told.append))
    assert len(told) == 1
    assert "prompt too long" in told[0]


def test_what_is_no_such_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no pipeline here"):
        StagedPipeline(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "MicroDiTPipeline"}))
    with pytest.raises(RecipeError, match="is a MicroDiTPipeline; plans are made for"):
        StagedPipeline(tmp_path)


def test_a_repository_without_safetensors_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of a hub, in one line, as from a folder."""
    repository = tmp_path / "repository"
    shutil.copytree(folders["sdxl"], repository)
    for weights in [*repository.glob("*/*.safetensors")]:
        weights.rename(weights.with_suffix(".bin"))
    with served(repository) as environment:
        words = ("sample", "owner/name", "a cat", "--memory", "2GiB", "--out", str(tmp_path / "out"))
        done = subprocess.run(
            [sys.executable, "-m", "shoestring", *words], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: owner/name: a part of the pipeline is missing or damaged (")
    assert "safetensors" in line
    assert len(line) < 400


PEAK = """
import sys, torch
from shoestring.pipelines.generate import generate
from shoestring.pipelines.load import load
from shoestring.pipelines.staged import StagedPipeline
from shoestring.runtime import PeakMemory

folder, how = sys.argv[1:]
torch.set_num_threads(1)
opened = StagedPipeline(folder)
plan = opened.plan(2**30)
drawn = opened.generate(plan, ["a"], [0]) if how == "staged" else generate(load(folder), ["a"], [0])
assert len(list(drawn)) == 1
print(plan.peak, PeakMemory(torch.device("cpu")).bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="says what a process on Linux holds")
def test_stages_never_hold_the_text_encoder_with_the_unet(tmp_path: Path) -> None:
    """Peaks of two processes: the text encoder (60 MiB) apart, the lower one as the plan foretold."""
    config = stable_diffusion().text_encoder.config
    config.update({"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5})
    config.update({"num_attention_heads": 8})
    text = TextEncoder(CLIPTextModel(config).eval(), parts.tokenizer(), pad="encoder")
    unet = parts.unet(cross_attention_dim=512, block_out_channels=(64, 512), norm_num_groups=32)
    large, larger = (sum(each.numel() * 4 for each in part.parameters()) for part in (text.model, unet))
    assert 55 * 2**20 < large < larger
    make(unet, text, parts.kl(), null="empty", steps=1).save_pretrained(tmp_path)
    peaks = {}
    for how in ("plain", "staged"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path), how], capture_output=True, text=True, check=True
        )
        planned, peaks[how] = map(int, done.stdout.split())
    assert peaks["plain"] - peaks["staged"] > 0.8 * large, peaks  # a heap keeps more or less besides
    assert 0.6 * planned < peaks["staged"] <= planned, (planned, peaks)
