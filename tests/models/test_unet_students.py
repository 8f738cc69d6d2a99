"""Students of U-Nets: published sizes, where each weight comes from, and cuts that change nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.unet_students import (
    PRESETS,
    SD14,
    SD21,
    SDXL,
    Layout,
    StudentSpec,
    copy_weights,
    cut_student,
    kept_block,
    layout,
    preset_config,
    preset_spec,
    student_config,
    teacher_key,
    teacher_module,
)

PARAMETERS = {  # as published, or counted from published configurations
    "koala-1b": 1_161_184_324,
    "koala-700m": 782_822_724,
    "bk-sdxl": 1_717_277_764,
    "ssd-1b": 1_331_334_404,
    "vega": 745_225_604,
    "bk-sdm-base": 579_384_964,
    "bk-sdm-small": 482_346_884,
    "bk-sdm-tiny": 323_384_964,
    "bk-sdm-v2-base": 583_480_964,
    "bk-sdm-v2-small": 485_787_524,
    "bk-sdm-v2-tiny": 326_825_604,
}
TENSORS = {"koala-1b": 790, "koala-700m": 584, "bk-sdxl": 1110}
TEACHERS = {"SDXL": (SDXL, 2_567_463_684), "SD14": (SD14, 859_520_964), "SD21": (SD21, 865_910_724)}

# What the published config.json files say, as differences to their teachers'.
PUBLISHED: dict[str, dict[str, Any]] = {
    "koala-1b": SDXL | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]},
    "koala-700m": SDXL
    | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5], "mid_block_type": None},
    "bk-sdxl": SDXL | {"layers_per_block": 1},
    "ssd-1b": SDXL
    | {
        "transformer_layers_per_block": [0, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 0],
        "mid_block_type": "UNetMidBlock2D",
    },
    "bk-sdm-base": SD14 | {"layers_per_block": 1},
    "bk-sdm-small": SD14 | {"layers_per_block": 1, "mid_block_type": None},
    "bk-sdm-tiny": SD14
    | {
        "layers_per_block": 1,
        "mid_block_type": None,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    },
}

SMALL: dict[str, Any] = SDXL | {
    "sample_size": 8,
    "block_out_channels": [8, 16, 16],
    "transformer_layers_per_block": [1, 2, 5],
    "attention_head_dim": [1, 2, 2],
    "cross_attention_dim": 12,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
    "norm_num_groups": 4,
}
SMALL_SD14: dict[str, Any] = SD14 | {
    "sample_size": 8,
    "block_out_channels": [8, 16, 16, 16],
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
KOALA = StudentSpec(layers_per_block=1, depth=(1, 1, 2))

Shapes = dict[str, tuple[int, ...]]


def shapes(config: Mapping[str, Any]) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(each.shape) for name, each in UNet2DConditionModel(**config).state_dict().items()}


@cache
def teacher_shapes(family: str) -> Shapes:
    return shapes(TEACHERS[family][0])


def family_of(preset: str) -> str:
    return next(name for name, (config, _) in TEACHERS.items() if config == PRESETS[preset][0])


def numel(all_shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in all_shapes.values())


def small(config: Mapping[str, Any] = SMALL) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**config).eval()


def run(unet: nn.Module) -> Tensor:
    """The output for a fixed input that fits the small networks."""
    draw = torch.Generator().manual_seed(1)
    config: Any = unet.config
    told: dict[str, Any] = {"encoder_hidden_states": torch.randn(2, 5, 12, generator=draw)}
    if config.addition_embed_type:
        ids = torch.full((2, 6), 8.0)
        told["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 10, generator=draw), "time_ids": ids}
    with torch.no_grad():
        output: Tensor = unet(torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([3, 700]), **told).sample
    return output


def silence(*modules: Any) -> None:
    """Make modules put out zeros: what they add to a residual stream is nothing."""
    for module in modules:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)


def silence_dropped(teacher: nn.Module, student: nn.Module, spec: StudentSpec) -> int:
    """Make the identity of each of the teacher's transformer blocks that `student` lacks; how many."""
    block = re.compile(r".*\.transformer_blocks\.\d+")
    config: Any = dict(teacher.config)  # type: ignore[arg-type]
    kept = {teacher_module(n, spec, config) for n, _ in student.named_modules() if block.fullmatch(n)}
    dropped = [m for n, m in teacher.named_modules() if block.fullmatch(n) and n not in kept]
    for each in dropped:
        parts: Any = each
        silence(parts.attn1.to_out[0], parts.attn2.to_out[0], parts.ff.net[2])
    return len(dropped)


@pytest.mark.parametrize("family", TEACHERS)
def test_teachers_have_the_published_number_of_parameters(family: str) -> None:
    assert numel(teacher_shapes(family)) == TEACHERS[family][1]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_published_size_and_all_its_weights_from_its_teacher(preset: str) -> None:
    config, spec = PRESETS[preset]
    own, theirs = shapes(preset_config(preset)), teacher_shapes(family_of(preset))
    assert numel(own) == PARAMETERS[preset]
    assert len(own) == TENSORS.get(preset, len(own))
    sources = {name: teacher_key(name, spec, config) for name in own}
    assert {name: theirs.get(source) for name, source in sources.items()} == own
    assert len(set(sources.values())) == len(own)  # none is taken twice


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_the_published_configuration(preset: str) -> None:
    assert preset_config(preset) == PUBLISHED[preset]


def test_vega_is_written_a_number_a_layer_by_its_authors_and_is_the_same_network() -> None:
    nested = {
        "transformer_layers_per_block": [0, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 0],
    }
    assert layout(SDXL | nested | {"mid_block_type": "UNetMidBlock2D"}) == layout(preset_config("vega"))


@pytest.mark.parametrize("preset", ["koala-1b", "koala-700m", "bk-sdxl"])
def test_copying_equal_names_misses_eight_tensors_and_takes_the_wrong_attention(preset: str) -> None:
    own, theirs = shapes(preset_config(preset)), teacher_shapes("SDXL")
    odd = {name for name, shape in own.items() if theirs[name] != shape}
    assert len(odd) == 8
    assert {name.rsplit(".", 2)[0] for name in odd} == {f"up_blocks.{i}.resnets.1" for i in (0, 1)}
    last = "up_blocks.0.attentions.1.proj_in.weight"
    assert teacher_key(last, preset_spec(preset), SDXL) == last.replace("attentions.1", "attentions.2")


@pytest.mark.parametrize(
    ("preset", "student", "teacher"),
    [
        ("koala-1b", "up_blocks.0.resnets.0.conv1.bias", "up_blocks.0.resnets.0.conv1.bias"),
        ("koala-1b", "up_blocks.2.resnets.1.conv1.bias", "up_blocks.2.resnets.2.conv1.bias"),
        ("koala-1b", "up_blocks.1.upsamplers.0.conv.bias", "up_blocks.1.upsamplers.0.conv.bias"),
        ("koala-1b", "down_blocks.2.resnets.0.conv1.bias", "down_blocks.2.resnets.0.conv1.bias"),
        ("koala-1b", "mid_block.resnets.1.conv1.bias", "mid_block.resnets.1.conv1.bias"),
        ("koala-1b", "add_embedding.linear_1.bias", "add_embedding.linear_1.bias"),
        ("bk-sdm-tiny", "up_blocks.0.resnets.1.conv1.bias", "up_blocks.1.resnets.2.conv1.bias"),
        ("bk-sdm-tiny", "up_blocks.2.attentions.0.norm.bias", "up_blocks.3.attentions.0.norm.bias"),
        ("bk-sdm-tiny", "up_blocks.1.upsamplers.0.conv.bias", "up_blocks.2.upsamplers.0.conv.bias"),
        ("bk-sdm-tiny", "down_blocks.2.attentions.0.norm.bias", "down_blocks.2.attentions.0.norm.bias"),
    ],
)
def test_the_map_is_the_published_one(preset: str, student: str, teacher: str) -> None:
    assert teacher_key(student, preset_spec(preset), PRESETS[preset][0]) == teacher


def test_modules_are_mapped_as_their_tensors_are() -> None:
    spec = StudentSpec(layers_per_block=1, depth=(1, 2, 6), depth_map="top")
    for name in shapes(student_config(SDXL, spec)):
        module, _, tensor = name.rpartition(".")
        assert teacher_key(name, spec, SDXL) == f"{teacher_module(module, spec, SDXL)}.{tensor}"
    assert teacher_module("up_blocks.0", preset_spec("bk-sdm-tiny"), SD14) == "up_blocks.1"
    assert teacher_module("mid_block", KOALA, SDXL) == "mid_block"
    assert teacher_module("up_blocks.0.attentions.1", spec, SDXL) == "up_blocks.0.attentions.2"


@pytest.mark.parametrize(
    "name",
    [
        "mid_block.resnets.0",
        "down_blocks.3.resnets.0",
        "down_blocks.0.resnets.1.conv1.bias",
        "up_blocks.0.attentions.2",
        "up_blocks.0.attentions.0.transformer_blocks.5.attn1",
    ],
)
def test_a_name_the_student_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no such part in this student"):
        teacher_module(name, preset_spec("koala-700m"), SDXL)


def test_six_of_ten_interleaved_are_the_papers() -> None:
    places = {each: [kept_block(j, 6, 10, each) + 1 for j in range(6)] for each in ("bottom", "top")}
    assert places == {"bottom": [1, 2, 3, 4, 5, 6], "top": [5, 6, 7, 8, 9, 10]}
    assert [kept_block(j, 6, 10, "interleave") + 1 for j in range(6)] == [1, 3, 5, 7, 9, 10]


@pytest.mark.parametrize("depth_map", ["bottom", "interleave", "top"])
def test_any_number_of_blocks_is_kept_in_order_without_repeats(depth_map: Any) -> None:
    for of in range(1, 30):
        for kept in range(1, of + 1):
            places = [kept_block(j, kept, of, depth_map) for j in range(kept)]
            assert all(a < b for a, b in pairwise(places))
            assert 0 <= places[0] <= places[-1] < of
            if depth_map == "interleave" and kept > 1:
                assert (places[0], places[-1]) == (0, of - 1)
                gaps = {b - a for a, b in pairwise(places)}
                assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("config", [SMALL, SMALL_SD14], ids=["SDXL", "SD14"])
def test_a_student_that_drops_nothing_is_its_teacher(config: dict[str, Any]) -> None:
    spec, teacher = StudentSpec(), small(config)
    assert student_config(config, spec) == config
    names = teacher.state_dict().keys()
    assert {name: teacher_key(name, spec, config) for name in names} == {name: name for name in names}
    student = cut_student(teacher.state_dict(), spec, config)
    assert torch.equal(run(student), run(teacher))


@pytest.mark.parametrize("depth_map", ["bottom", "interleave", "top"])
def test_dropping_blocks_that_add_nothing_changes_nothing(depth_map: Any) -> None:
    spec = StudentSpec(depth=(1, 1, 3), depth_map=depth_map)
    teacher = small()
    before = run(teacher)
    student = cut_student(teacher.state_dict(), spec, SMALL)
    assert silence_dropped(teacher, student, spec) == 5 * 1 + 6 * 2  # 2 + 3 attentions a stage, and mid
    assert torch.equal(run(student), run(teacher))
    assert not torch.equal(run(teacher), before)


def test_a_depth_a_layer_drops_what_it_says() -> None:
    spec = StudentSpec(depth=(0, (2, 1), (3, 2)), up_depth=((5, 2, 1), (1, 2, 1), 0), mid="resnets")
    teacher = small()
    silence(teacher.mid_block.attentions[0].proj_out, teacher.mid_block.resnets[1].conv2)
    student = cut_student(teacher.state_dict(), spec, SMALL)
    assert layout(dict(student.config)) == Layout(
        down=((0, 0), (2, 1), (3, 2)), mid=0, up=((5, 2, 1), (1, 2, 1), (0, 0, 0))
    )
    silence_dropped(teacher, student, spec)
    assert torch.equal(run(student), run(teacher))


def test_dropping_a_mid_block_that_adds_nothing_changes_nothing() -> None:
    teacher = small()
    mid = teacher.mid_block
    silence(mid.resnets[0].conv2, mid.resnets[1].conv2, mid.attentions[0].proj_out)
    student = cut_student(teacher.state_dict(), StudentSpec(mid="drop"), SMALL)
    assert student.mid_block is None
    assert torch.equal(run(student), run(teacher))


def test_a_students_weights_are_its_teachers_by_the_map() -> None:
    teacher, spec = small(), StudentSpec(layers_per_block=1, depth=(1, 1, 2), mid="drop", depth_map="top")
    weights = teacher.state_dict()
    student = cut_student(weights, spec, SMALL)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, weights[teacher_key(name, spec, SMALL)]), name
    attention = "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight"
    source = "up_blocks.0.attentions.2.transformer_blocks.3.attn1.to_q.weight"
    assert torch.equal(student.state_dict()[attention], weights[source])


@pytest.mark.parametrize("spec", [KOALA, StudentSpec(layers_per_block=1, depth=(1, 1, 2), mid="drop")])
def test_a_saved_student_opens_as_it_was(spec: StudentSpec, tmp_path: Any) -> None:
    student = cut_student(small().state_dict(), spec, SMALL)
    student.save_pretrained(tmp_path)
    opened = UNet2DConditionModel.from_pretrained(tmp_path)
    assert (opened.mid_block is None) == (spec.mid == "drop")
    assert torch.equal(run(opened), run(student))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "tflop"),
    [(SDXL, 6.761), (preset_config("koala-1b"), 3.432), (preset_config("koala-700m"), 2.702)],
    ids=["SDXL", "koala-1b", "koala-700m"],
)
def test_a_forward_at_1024_px_costs_what_was_measured(config: dict[str, Any], tflop: float) -> None:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        UNet2DConditionModel(**config)(
            torch.empty(1, 4, 128, 128),
            torch.empty(1),
            encoder_hidden_states=torch.empty(1, 77, 2048),
            added_cond_kwargs={"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)},
        )
    assert counter.get_total_flops() / 1e12 == pytest.approx(tflop, rel=0.01)


def varied(**changes: Any) -> dict[str, Any]:
    return SMALL | {"transformer_layers_per_block": [1, 1, 2], **changes}


ODD_TEACHERS = {
    "layers a stage": varied(layers_per_block=[2, 3, 2]),
    "attention down alone": varied(up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]),
    "no attention": varied(
        down_block_types=["DownBlock2D"] * 3,
        up_block_types=["UpBlock2D"] * 3,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=1,
    ),
    "attention of other kinds": varied(
        down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D", "SimpleCrossAttnDownBlock2D"],
        up_block_types=["SimpleCrossAttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=4,
    ),
    "a student": preset_config("ssd-1b") | {k: v for k, v in SMALL.items() if "transformer" not in k},
}


@pytest.mark.parametrize("name", ODD_TEACHERS)
def test_other_u_nets_are_cut_too(name: str) -> None:
    config, spec = ODD_TEACHERS[name], StudentSpec(layers_per_block=1)
    teacher = small(config)
    student = cut_student(teacher.state_dict(), spec, config)
    assert [len(block.resnets) for block in (*student.down_blocks, *student.up_blocks)] == [1] * 3 + [2] * 3
    assert run(student).isfinite().all()


def test_layers_may_differ_by_stage_and_keep_the_skips_they_meet() -> None:
    config, spec = ODD_TEACHERS["layers a stage"], StudentSpec(layers_per_block=(1, 2, 2))
    student = cut_student(small(config).state_dict(), spec, config)
    assert student.config.layers_per_block == [1, 2, 2]
    assert run(student).isfinite().all()
    kept = [teacher_module(f"up_blocks.1.resnets.{k}", spec, config) for k in range(3)]
    assert kept == [f"up_blocks.1.resnets.{k}" for k in (0, 2, 3)]
    kept = [teacher_module(f"down_blocks.1.resnets.{k}", spec, config) for k in range(2)]
    assert kept == [f"down_blocks.1.resnets.{k}" for k in (0, 1)]


def test_a_configuration_file_with_gaps_and_marks_is_taken() -> None:
    """Old files lack arguments that came later, and every file has marks that are none."""
    old = {name: value for name, value in SD14.items() if name != "mid_block_type"}
    marked = old | {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.2.2"}
    assert student_config(marked, StudentSpec(layers_per_block=1)) == old | {"layers_per_block": 1}


def test_weights_are_cast_to_the_students_type() -> None:
    half = {name: tensor.half() for name, tensor in small().state_dict().items()}
    student = cut_student(half, KOALA, SMALL, torch.bfloat16)
    assert {each.dtype for each in student.parameters()} == {torch.bfloat16}
    assert torch.equal(student.conv_in.weight, half["conv_in.weight"].to(torch.bfloat16))


def test_adapters_and_a_guidance_embedding_stay_as_they_are() -> None:
    teacher = small()
    torch.manual_seed(1)
    config = student_config(SMALL, KOALA)
    student = UNet2DConditionModel(**config, time_cond_proj_dim=6)
    student.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    added = re.compile(r"lora_|cond_proj")
    before = {name: each.clone() for name, each in student.state_dict().items() if added.search(name)}
    copy_weights(student, teacher.state_dict(), KOALA, SMALL)
    after = student.state_dict()
    assert before
    assert all(torch.equal(after[name], each) for name, each in before.items())
    plain = cut_student(teacher.state_dict(), KOALA, SMALL).state_dict()
    for name, each in after.items():
        if name not in before:
            assert torch.equal(each, plain[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize(
    ("spec", "config", "says"),
    [
        (StudentSpec(layers_per_block=3), SDXL, "stage 0 has 2"),
        (StudentSpec(layers_per_block=(1, 1)), SDXL, r"2 numbers, and 3 are needed"),
        (StudentSpec(depth=(1, 2)), SDXL, r"depth \(1, 2\): 2 numbers, and 3 are needed"),
        (StudentSpec(depth=(1, 2, 11)), SDXL, r"depth 11 in down_blocks.2.* has 10"),
        (StudentSpec(depth=(1, 0, 5)), SDXL, "depth 0 in down_blocks.1"),
        (StudentSpec(depth=(1, (1, 2), 5)), SDXL, "say up_depth too"),
        (StudentSpec(depth=(1, (1, 2, 1), 5), up_depth=(5, 2, 1)), SDXL, "3 numbers, and 2 are needed"),
        (StudentSpec(depth=(1, 2, 6)), SD14, "3 numbers, and 4 are needed"),
        (StudentSpec(depth=(1, 1, 1, 2)), SD14, "mid block's too, and the teacher's has 1"),
        (StudentSpec(inner_stage=False, mid="drop"), SDXL, "two innermost of three or more are equally wide"),
        (StudentSpec(inner_stage=False), SD14, "Set mid to drop"),
        (StudentSpec(mid="resnets"), preset_config("koala-700m"), "mid block is None"),
        (
            StudentSpec(),
            SD14 | {"down_block_types": ["KDownBlock2D"] * 4},
            "blocks of the class KDownBlock2D",
        ),
        (StudentSpec(), SD14 | {"dual_cross_attention": True}, "dual_cross_attention"),
    ],
)
def test_a_spec_that_cannot_fit_says_why(spec: StudentSpec, config: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        student_config(config, spec)


@pytest.mark.parametrize(
    "arguments", [{"mid": "none"}, {"depth_map": "middle"}, {"layers_per_block": 0}, {"depth": (1, (2, -1))}]
)
def test_a_spec_with_unknown_words_or_numbers_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(arguments))):
        StudentSpec(**arguments)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"koala-2b.*koala-1b, koala-700m"):
        preset_spec("koala-2b")


def test_weights_of_another_network_are_refused() -> None:
    weights = small().state_dict()
    lacking = {name: tensor for name, tensor in weights.items() if name != "conv_in.bias"}
    with pytest.raises(CheckpointError, match=r"teacher: lacks 1 tensors, such as conv_in\.bias"):
        cut_student(lacking, KOALA, SMALL)
    with pytest.raises(CheckpointError, match="mine: has besides 1 tensors, such as extra"):
        cut_student(weights | {"extra": torch.zeros(1)}, KOALA, SMALL, name="mine")
    with pytest.raises(CheckpointError, match=r"teacher: its conv_in\.bias is \(9,\), not \(8,\)"):
        cut_student(weights | {"conv_in.bias": torch.zeros(9)}, KOALA, SMALL)
    with pytest.raises(CheckpointError, match="the student: has besides"):
        copy_weights(small(), weights, KOALA, SMALL)


@pytest.mark.parametrize(("value", "dtype"), [("nan", "float32"), ("-inf", "float32"), (1e5, "float16")])
def test_weights_that_are_not_finite_are_refused(value: str | float, dtype: str) -> None:
    weights = small().state_dict()
    weights["conv_in.bias"][3] = float(value)
    with pytest.raises(CheckpointError, match=rf"its conv_in\.bias holds NaN or infinity in {dtype}"):
        cut_student(weights, KOALA, SMALL, getattr(torch, dtype))
