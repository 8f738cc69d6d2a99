"""Students of transformers: fewer blocks, each as it was in the teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor, nn

from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.microdit import MicroDiT
from shoestring.models.transformer_students import (
    cut_transformer,
    transformer_student_config,
    transformer_teacher_key,
)
from shoestring.models.unet_students import SDXL, StudentSpec

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "num_layers": 5}
LATENTS, STEP = (2, 4, 8, 8), torch.tensor([3, 700])


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"cross_attention_dim": 16, "caption_channels": 12, "in_channels": 4, "norm_num_groups": 1}
    network = PixArtTransformer2DModel(**HEADS, **sizes)
    return network, {"encoder_hidden_states": torch.randn(2, 3, 12), "timestep": STEP}


def dit() -> tuple[nn.Module, dict[str, Any]]:
    network = DiTTransformer2DModel(**HEADS, in_channels=4, num_embeds_ada_norm=10)
    return network, {"timestep": STEP % 10, "class_labels": torch.tensor([1, 2])}


def microdit() -> tuple[nn.Module, dict[str, Any]]:
    """Blocks of rising width, every second with experts: no two of the five are alike."""
    network = MicroDiT(
        sample_size=8,
        caption_channels=12,
        hidden_size=32,
        depth=5,
        head_dim=8,
        multiple_of=8,
        mixer_depth=1,
        mixer_size=16,
        num_experts=2,
    )
    return network, {"encoder_hidden_states": torch.randn(2, 3, 12), "timestep": torch.tensor([0.1, 0.9])}


KINDS = {"PixArt": pixart, "DiT": dit, "MicroDiT": microdit}
MAPS = {"bottom": [0, 1, 2], "interleave": [0, 2, 4], "top": [2, 3, 4]}


def make(kind: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A network with weights that are nowhere zero, its configuration, and what it is told."""
    torch.manual_seed(0)
    network, told = KINDS[kind]()
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.1)
    config: Any = network.config
    return network.eval(), {"_class_name": type(network).__name__, **config}, told


def run(network: nn.Module, told: dict[str, Any]) -> Tensor:
    torch.manual_seed(1)
    extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    more = extra if isinstance(network, PixArtTransformer2DModel) else {}
    with torch.no_grad():
        output: Tensor = network(torch.randn(LATENTS), **told, **more).sample
    return output


def silence(block: nn.Module) -> None:
    """Make the identity of a block: everything that it adds to the residual stream is zero."""
    ends = (".to_out.0", ".net.2", ".down")  # attentions, diffusers' feed-forward, ours and its experts
    found = [m for n, m in block.named_modules() if n.endswith(ends) and isinstance(m, nn.Linear)]
    assert len(found) >= 2
    for module in found:
        nn.init.zeros_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@pytest.mark.parametrize(
    ("kind", "depth_map"),
    [(kind, depth_map) for kind in KINDS for depth_map in MAPS if (kind, depth_map) != ("DiT", "top")],
)  # DiT's output is conditioned by a part of its first block
def test_dropping_blocks_that_add_nothing_changes_nothing(kind: str, depth_map: Any) -> None:
    teacher, config, told = make(kind)
    before = run(teacher, told)
    for place, block in enumerate(teacher.transformer_blocks):
        if place not in MAPS[depth_map]:
            silence(block)
    student = cut_transformer(teacher.state_dict(), StudentSpec(depth=(3,), depth_map=depth_map), config)
    assert len(student.transformer_blocks) == 3
    assert torch.equal(run(student, told), run(teacher, told))
    assert not torch.equal(run(student, told), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_drops_nothing_is_its_teacher(kind: str) -> None:
    teacher, config, told = make(kind)
    student = cut_transformer(teacher.state_dict(), StudentSpec(), config)
    assert torch.equal(run(student, told), run(teacher, told))
    assert not student.training


def test_half_of_a_published_dit_is_the_papers() -> None:
    """DiT-XL of PixArt, 28 blocks of 1152: 611 M parameters to 313 M (KOALA, A.4)."""
    sizes = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 64}
    config = sizes | {
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "in_channels": 4,
        "out_channels": 8,
    }
    counts = []
    for each in (config, transformer_student_config(config, StudentSpec(depth=(14,)))):
        with torch.device("meta"):
            network = PixArtTransformer2DModel(**each)
        counts.append(sum(weight.numel() for weight in network.parameters()))
    assert [round(count / 1e6) for count in counts] == [611, 313]


def test_a_microdits_blocks_keep_their_widths_and_experts() -> None:
    _, config, _ = make("MicroDiT")
    assert config["qkv_ratio"] == (0.5, 1.0)
    student = transformer_student_config(config, StudentSpec(depth=(3,), depth_map="interleave"))
    assert student["depth"] == 3
    assert student["qkv_ratio"] == [0.5, 0.75, 1.0]
    assert student["mlp_ratio"] == [0.5, 2.25, 4.0]
    assert student["expert_blocks"] == []  # of 0, 2 and 4; the teacher's are 1 and 3
    top = transformer_student_config(config, StudentSpec(depth=(2,), depth_map="top"))
    assert (top["qkv_ratio"], top["expert_blocks"]) == ([0.875, 1.0], [0])


def test_a_microdit_saved_and_opened_is_as_it_was(tmp_path: Any) -> None:
    teacher, config, told = make("MicroDiT")
    student = cut_transformer(teacher.state_dict(), StudentSpec(depth=(2,)), config, torch.float32)
    student.save_pretrained(tmp_path)
    assert torch.equal(run(MicroDiT.from_pretrained(tmp_path), told), run(student, told))


def test_names_outside_the_blocks_are_the_same() -> None:
    spec, config = StudentSpec(depth=(2,), depth_map="top"), {"num_layers": 5}
    assert transformer_teacher_key("transformer_blocks.1.attn1.to_q.weight", spec, config) == (
        "transformer_blocks.4.attn1.to_q.weight"
    )
    assert transformer_teacher_key("transformer_blocks.0", spec, config) == "transformer_blocks.3"
    assert transformer_teacher_key("proj_out.weight", spec, config) == "proj_out.weight"
    with pytest.raises(ValueError, match="no such part"):
        transformer_teacher_key("transformer_blocks.2.attn1", spec, config)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (StudentSpec(depth=(6,)), "has 5 blocks. Give one number, 1 to 5"),
        (StudentSpec(depth=(0,)), "Give one number, 1 to 5"),
        (StudentSpec(depth=(1, 2)), "Give one number"),
        (StudentSpec(depth=(2,), layers_per_block=1), "layers_per_block: is for a U-Net"),
        (StudentSpec(depth=(2,), mid="drop"), "mid: is for a U-Net.*Leave it out"),
    ],
)
def test_a_spec_that_cannot_fit_says_why(spec: StudentSpec, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        transformer_student_config({"num_layers": 5}, spec)


def test_networks_without_a_row_of_equal_blocks_are_refused() -> None:
    with pytest.raises(RecipeError, match="its network, UNet2DConditionModel, is neither"):
        transformer_student_config({"_class_name": "UNet2DConditionModel", **SDXL}, StudentSpec(depth=(2,)))
    sizes = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 8}
    network: ModelMixin = SD3Transformer2DModel(**HEADS, **sizes)
    config = {"_class_name": "SD3Transformer2DModel", **network.config}
    with pytest.raises(RecipeError, match=r"SD3Tran.*not a row of equals.*keep that, with .* top"):
        cut_transformer(network.state_dict(), StudentSpec(depth=(2,)), config)
    last = cut_transformer(network.state_dict(), StudentSpec(depth=(2,), depth_map="top"), config)
    assert torch.equal(last.proj_out.weight, network.proj_out.weight)  # the one that is unlike stays last
    for name in ("Nothing", "AutoPipelineForText2Image"):
        with pytest.raises(CheckpointError, match=f"the class {name}, neither MicroDiT"):
            cut_transformer({}, StudentSpec(depth=(2,)), {"_class_name": name, "num_layers": 5})
