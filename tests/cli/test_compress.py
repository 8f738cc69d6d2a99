"""`shoestring compress`: students of runs, pipelines and folders, opened by what opens their teachers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DiTTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file

import shoestring
from shoestring.models.microdit import MicroDiT
from shoestring.models.unet_students import StudentSpec, teacher_key

Command = Callable[..., Any]


@pytest.fixture
def sdxl(sdxl_folder: Path, empty: Path) -> Path:
    """A copy of a tiny SDXL's pipeline in the current folder."""
    shutil.copytree(sdxl_folder, empty / "sdxl")
    return Path("sdxl")


def count(network: Any) -> int:
    return sum(weight.numel() for weight in network.parameters())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_a_pipelines_student_opens_in_the_stock_pipeline(
    command: Command, sdxl: Path, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    before = tree(sdxl)
    said = command("compress", sdxl, "out", "--layers-per-block", 1, "--depth", "1,1,1", "--mid", "drop")
    assert (said.code, said.err) == (0, "")
    teacher = StableDiffusionXLPipeline.from_pretrained(sdxl)
    student = AutoPipelineForText2Image.from_pretrained("out")
    assert type(student) is StableDiffusionXLPipeline
    assert student.unet.mid_block is None
    assert f"{count(teacher.unet):,} parameters" in said.out
    assert f"out: {count(student.unet):,} parameters" in said.out
    assert "`teacher: sdxl` and this cut as its `model`" in said.out  # not one of the recipes' cuts
    after = tree(Path("out"))
    others = {name: content for name, content in before.items() if not name.startswith("unet/")}
    assert {name: content for name, content in after.items() if not name.startswith("unet/")} == others
    assert tree(sdxl) == before
    spec = StudentSpec(layers_per_block=1, depth=(1, 1, 1), mid="drop")
    theirs, config = teacher.unet.state_dict(), dict(teacher.unet.config)
    for name, tensor in student.unet.state_dict().items():
        assert torch.equal(tensor, theirs[teacher_key(name, spec, config)])
    assert student("red noise", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


def test_a_preset_a_depth_map_and_a_type(command: Command, sdxl: Path) -> None:
    assert command("compress", sdxl, "base", "--preset", "bk-sdxl", "--dtype", "bfloat16").code == 0
    assert {tensor.dtype for tensor in weights(Path("base/unet")).values()} == {torch.bfloat16}
    assert command("compress", sdxl, "top", "--depth", "1,1,1", "--depth-map", "top").code == 0
    block = "mid_block.attentions.0.transformer_blocks.{}.ff.net.2.weight"
    theirs = weights(sdxl / "unet")
    assert torch.equal(weights(Path("top/unet"))[block.format(0)], theirs[block.format(1)])


def test_a_u_nets_folder_gives_a_u_nets_folder_that_knows_its_schedule(command: Command, sdxl: Path) -> None:
    path = sdxl / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    said = command("compress", sdxl / "unet", "out", "--layers-per-block", 1)
    assert said.code == 0, said.err
    assert "the network alone" in said.out
    assert sorted(each.name for each in Path("out").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "scheduler",
    ]
    assert UNet2DConditionModel.from_pretrained("out").config.layers_per_block == 1
    said = command("compress", "out", "smaller", "--mid", "drop")  # a student can teach
    assert said.code == 0, said.err
    assert json.loads(Path("smaller/scheduler/scheduler_config.json").read_text())["prediction_type"] == (
        "v_prediction"
    )


def test_a_run_of_microdit_gives_a_pipeline_that_draws(command: Command, here: Path) -> None:
    shallow = shoestring.load("runs/tiny").transformer.config
    plain = {name: value for name, value in shallow.items() if not name.startswith("_")}
    teacher = MicroDiT(**{**plain, "depth": 4, "expert_blocks": 2})
    teacher.save_pretrained("runs/tiny/pipeline/transformer")
    said = command("compress", "runs/tiny", "half", "--depth", 2)
    assert said.code == 0, said.err
    pipeline = shoestring.load("half")
    assert len(pipeline.transformer.transformer_blocks) == 2
    assert f"half: {count(pipeline.transformer):,} parameters" in said.out
    assert "in a copy of its pipeline" in said.out
    first = "transformer_blocks.0.attn.to_q.weight"
    own, theirs = pipeline.transformer.state_dict(), teacher.state_dict()
    assert torch.equal(own[first], theirs[first])
    assert command("sample", "half", "a red circle", "--steps", 2).code == 0


def test_a_transformer_of_diffusers_is_halved(command: Command, empty: Path) -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "num_layers": 4}
    teacher = DiTTransformer2DModel(**sizes, in_channels=4)
    teacher.half().save_pretrained("dit/transformer")
    said = command("compress", "dit", "out", "--depth", 2, "--depth-map", "interleave")
    assert (said.code, said.err) == (0, "")
    student = DiTTransformer2DModel.from_pretrained("out", torch_dtype=torch.float16)
    kept = student.transformer_blocks[1].ff.net[2].weight
    assert torch.equal(kept, teacher.transformer_blocks[3].ff.net[2].weight)
    assert {tensor.dtype for tensor in weights(Path("out")).values()} == {torch.float16}  # as stored
    for words, says in (
        (
            ("--preset", "koala-700m"),
            "--preset koala-700m: a cut of U-Nets, and the network of dit is of the",
        ),
        (
            ("--depth", 2, "--mid", "drop"),
            "student mid: is for a U-Net; a transformer is cut by depth alone.",
        ),
    ):
        assert says in command("compress", "dit", "other", *words).refused()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "compress: say what to cut"),
        (("--preset", "koala-2b"), "student preset 'koala-2b': unknown"),
        (("--preset", "bk-sdxl", "--mid", "drop"), "--mid: the preset bk-sdxl says it already"),
        (("--preset", "bk-sdxl", "--depth-map", "top"), "--depth-map top: has no effect without a depth"),
        (("--depth", "1,two"), "--depth 1,two: must be numbers"),
        (("--depth", "1,1"), "depth (1, 1): 2 numbers, and 3 are needed"),
        (("--depth", "1,1,9"), "depth 9 in down_blocks.2"),
        (("--mid", "half"), "student mid 'half': unknown"),
        (("--layers-per-block", 0), "numbers must be 1 or more"),
        (("--mid", "drop", "--dtype", "int8"), "--dtype int8: unknown"),
        (("--layers-per-block", 2), "already has the shape asked for"),
    ],
)
def test_a_cut_that_makes_no_sense_is_refused(
    words: tuple[Any, ...], says: str, command: Command, sdxl: Path
) -> None:
    assert says in command("compress", sdxl, "out", *words).refused()
    assert not Path("out").exists()


def test_a_place_that_is_taken_and_a_teacher_that_is_none_are_refused(command: Command, sdxl: Path) -> None:
    Path("taken").mkdir()
    Path("taken/file").write_text("")
    assert "taken: is there already" in command("compress", sdxl, "taken", "--mid", "drop").refused()
    said = command("compress", sdxl / "vae", "out", "--depth", 2).refused()
    assert said.startswith("sdxl/vae: its network, AutoencoderKL, is neither a U-Net")
    said = command("compress", sdxl / "text_encoder", "out", "--depth", 2).refused()
    assert said.startswith("sdxl/text_encoder: its network, CLIPTextModel, is neither a U-Net")
    assert "/proc/x: cannot be written" in command("compress", sdxl, "/proc/x", "--mid", "drop").refused()
    assert "no such file" in command("compress", "gone.safetensors", "out", "--mid", "drop").refused()
    assert "neither a folder here nor a hub" in command("compress", "gone", "out", "--mid", "drop").refused()
    shutil.rmtree(sdxl / "vae")
    said = command("compress", sdxl, "out", "--mid", "drop").refused()
    assert "its model_index.json names vae, and there is no such folder" in said
    (sdxl / "vae").mkdir()
    said = command("compress", sdxl, "out", "--mid", "drop").refused()
    assert "its model_index.json names vae, and its folder is empty" in said
    assert not Path("out").exists()


def test_a_full_disk_leaves_nothing(command: Command, sdxl: Path, full_disk: Callable[[str], Any]) -> None:
    with full_disk("unet"):
        assert "the disk is full" in command("compress", sdxl, "out", "--mid", "drop").refused()
    assert [path.name for path in Path().iterdir()] == ["sdxl"]
