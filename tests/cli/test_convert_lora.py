"""`shoestring convert-lora`: which student is meant, what is said, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

TEACHER: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 12, 16),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 20,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}
CUT = ("--layers-per-block", 1, "--depth", "1,2,2", "--mid", "drop")
MODULES = (
    "down_blocks.2.attentions.0.proj_in",
    "down_blocks.2.attentions.1.proj_in",  # its layer goes
    "mid_block.attentions.0.proj_in",  # with the mid block
    "up_blocks.0.attentions.2.transformer_blocks.1.attn1.to_q",  # becomes attentions.1
    "up_blocks.0.attentions.2.transformer_blocks.2.attn1.to_q",  # below the student's depth
)
KEPT = {
    "unet.down_blocks.2.attentions.0.proj_in",
    "unet.up_blocks.0.attentions.1.transformer_blocks.1.attn1.to_q",
}
SAID = "2 kept, 3 dropped (1 in down_blocks.2, 1 in mid_block, 1 in up_blocks.0)."


@pytest.fixture
def lora(empty: Path) -> Path:
    """`lora.safetensors` for the small teacher, which is in `teacher/`."""
    torch.manual_seed(0)
    UNet2DConditionModel(**TEACHER).save_pretrained(empty / "teacher")
    tensors = {}
    for module in MODULES:
        tensors[f"unet.{module}.lora_A.weight"] = torch.randn(2, 16)
        tensors[f"unet.{module}.lora_B.weight"] = torch.randn(16, 2)
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    tensors |= {f"{text}.lora_A.weight": torch.randn(2, 8), f"{text}.lora_B.weight": torch.randn(8, 2)}
    save_file(tensors, empty / "lora.safetensors")
    return empty / "lora.safetensors"


def modules(path: str) -> set[str]:
    return {name.split(".lora_")[0] for name in load_file(path) if name.startswith(("unet.", "lora_unet"))}


def run_of(name: str, teacher: str, model: str) -> None:
    """A run's folder as far as its recipe goes."""
    Path(name).mkdir()
    Path(name, "recipe.yaml").write_text(f"base: koala-700m\nteacher: {teacher}\nmodel: {model}\n")


def test_the_cut_is_said_as_to_compress(lora: Path, command: Any) -> None:
    said = command("convert-lora", lora, "out.safetensors", *CUT, "--teacher", "teacher")
    assert (said.code, said.err) == (0, "")
    assert modules("out.safetensors") == KEPT
    assert f"{lora}: 5 modules of the U-Net, 1 of the text encoders." in said.out
    assert f"out.safetensors: {SAID}" in said.out
    assert "load_lora_weights('out.safetensors')" in said.out


def test_depth_map_and_kohyas_names(lora: Path, command: Any) -> None:
    """From the top, the teacher's blocks 1 and 2 are the student's 0 and 1."""
    options = ("--depth-map", "top", "--kohya", "--teacher", "teacher")
    said = command("convert-lora", lora, "out.safetensors", *CUT, *options)
    assert (said.code, said.err) == (0, "")
    assert "Next: ComfyUI, or what else reads kohya's names" in said.out
    inside = "lora_unet_up_blocks_0_attentions_1_transformer_blocks"
    kept = {"lora_unet_down_blocks_2_attentions_0_proj_in"}
    kept |= {f"{inside}_0_attn1_to_q", f"{inside}_1_attn1_to_q"}
    assert {name.split(".")[0] for name in modules("out.safetensors")} == kept


def test_a_run_says_its_cut_itself(lora: Path, command: Any) -> None:
    model = "{preset: null, layers_per_block: 1, depth: [1, 2, 2], mid: drop}"
    run_of("student", "teacher", model)
    said = command("convert-lora", lora, "out.safetensors", "--student", "student")
    assert (said.code, said.err) == (0, "")
    assert modules("out.safetensors") == KEPT
    assert SAID in said.out


def test_a_few_step_student_of_a_student_takes_the_first_teachers_lora(lora: Path, command: Any) -> None:
    """Its own recipe cuts nothing; with --teacher the file is for the network in between."""
    run_of("student", "teacher", "{preset: null, layers_per_block: 1, depth: [1, 2, 2], mid: drop}")
    assert command("compress", "teacher", "student/pipeline", *CUT).code == 0
    run_of("fast", "student", "{preset: null}")
    assert command("convert-lora", lora, "out.safetensors", "--student", "fast").code == 0
    assert modules("out.safetensors") == KEPT
    again = ("convert-lora", "out.safetensors", "again.safetensors", "--student", "fast", "--teacher")
    assert command(*again, "student/pipeline").code == 0
    assert modules("again.safetensors") == KEPT


def test_the_cuts_lead_to_the_network_that_the_run_has(lora: Path, command: Any) -> None:
    """The first teacher is not what a few-step student was distilled from: nothing would be left out."""
    run_of("student", "teacher", "{preset: null, layers_per_block: 1, depth: [1, 2, 2], mid: drop}")
    run_of("fast", "student", "{preset: null}")
    for run in ("student", "fast"):
        assert command("compress", "teacher", f"{run}/pipeline/unet", *CUT).code == 0
    config = Path("fast/pipeline/unet/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"time_cond_proj_dim": 256}))
    told = command(
        "convert-lora", lora, "out.safetensors", "--student", "fast", "--teacher", "teacher"
    ).refused()
    assert told.startswith("fast: its U-Net is not what its recipe cuts out of teacher (")
    assert told.endswith("Give --teacher the network that it was distilled from.")
    assert not Path("out.safetensors").exists()
    assert command("convert-lora", lora, "out.safetensors", "--student", "fast").code == 0
    assert modules("out.safetensors") == KEPT


def test_a_preset_needs_no_teacher(empty: Path, command: Any) -> None:
    """A real module of SDXL under kohya's name for it, in the real size; nothing is downloaded."""
    name = "lora_unet_output_blocks_2_1_transformer_blocks_4_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 1280), f"{name}.lora_up.weight": torch.ones(1280, 1)}
    save_file(tensors | {f"{name}.alpha": torch.tensor(0.5)}, "lora.safetensors")
    said = command("convert-lora", "lora.safetensors", "out.safetensors", "--preset", "koala-700m")
    assert (said.code, said.err) == (0, "")
    assert modules("out.safetensors") == {"unet.up_blocks.0.attentions.1.transformer_blocks.4.attn1.to_q"}
    assert "1 kept, 0 dropped.\n" in said.out


def test_what_it_refuses(lora: Path, command: Any) -> None:
    """One line, exit code 2, and no file is written."""
    run_of("other", "teacher", "{preset: koala-700m}")
    Path("plain").mkdir()
    Path("plain/recipe.yaml").write_text("base: demo\n")
    Path("taken.safetensors").write_text("mine")
    out = "out.safetensors"
    for words, message in (
        ((lora, out), "say which student: --student RUN, --preset koala-700m"),
        ((lora, out, "--preset", "koala-7"), "'koala-7': unknown. Use koala-1b"),
        ((lora, out, "--preset", "koala-1b", "--mid", "drop"), "--mid"),
        ((lora, out, "--student", "other", "--depth", "1,2"), "--depth: the recipe of other says it"),
        (
            (lora, out, "--student", "teacher"),
            "teacher: not a run folder (no recipe.yaml in it). Give one that `shoe",
        ),
        ((lora, out, "--student", "plain"), "plain: a run of the kind microdit, no student of a U-Net"),
        ((lora, out, "--student", "other"), "student depth 5"),
        ((lora, out, "--preset", "koala-700m"), "do not make up the teacher's weight (1280, 1280)"),
        ((lora, "out.pt", *CUT), "out.pt: must be a FILE.safetensors"),
        (("lora.pt", out, *CUT), "lora.pt: no such file"),
        ((lora, "taken.safetensors", *CUT), "taken.safetensors: is there already"),
        ((lora, out, *CUT, "--teacher", "nowhere"), "nowhere"),
    ):
        assert message in command("convert-lora", *words).refused(), words
        assert not Path(out).exists()
    assert Path("taken.safetensors").read_text() == "mine"
