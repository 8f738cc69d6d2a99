"""LoRAs remapped onto students: diffusers loads the teacher's file and ours, and the weights are equal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from shoestring.errors import CheckpointError, OutputError
from shoestring.models.unet_lora import remap, remap_lora
from shoestring.models.unet_lora_names import kohya_name, weight_shapes, written_names
from shoestring.models.unet_original import original_names
from shoestring.models.unet_students import (
    SDXL,
    StudentSpec,
    cut_student,
    preset_spec,
    student_config,
    teacher_module,
)

TEACHER: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 20,
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 + 24,
}
LIKE_SD: dict[str, Any] = {
    **{name: TEACHER[name] for name in ("sample_size", "layers_per_block", "norm_num_groups")},
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16, 16),
    "attention_head_dim": 2,
    "cross_attention_dim": 20,
}
KOALA = StudentSpec(layers_per_block=1, depth=(1, 1), mid="drop")
TOP = StudentSpec(layers_per_block=1, depth=(1, 1), depth_map="top")
TINY = StudentSpec(layers_per_block=1, mid="drop", inner_stage=False)


def unet(config: Mapping[str, Any] = TEACHER) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**config)


def student(spec: StudentSpec, config: Mapping[str, Any] = TEACHER) -> UNet2DConditionModel:
    return cut_student(unet(config).state_dict(), spec, config)


def text_encoders() -> dict[str, nn.Module]:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=9, max_position_embeddings=5, projection_dim=6, **sizes)
    torch.manual_seed(1)
    return {"text_encoder": CLIPTextModel(config), "text_encoder_2": CLIPTextModelWithProjection(config)}


def loaded(network: UNet2DConditionModel, lora: Path) -> dict[str, dict[str, Tensor]]:
    """Weights by part and module once the stock pipeline has loaded a LoRA and folded it in."""
    sdxl = network.config.addition_embed_type == "text_time"
    encoders = text_encoders()
    parts: dict[str, Any] = {"unet": network, "vae": vae(), "scheduler": EulerDiscreteScheduler()}
    if sdxl:
        pipeline = StableDiffusionXLPipeline(
            **parts, **encoders, tokenizer=None, tokenizer_2=None, add_watermarker=False
        )
    else:
        pipeline = StableDiffusionPipeline(
            **parts,
            text_encoder=encoders.pop("text_encoder"),
            tokenizer=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.load_lora_weights(lora)
    names = ["unet", "text_encoder", "text_encoder_2"] if sdxl else ["unet", "text_encoder"]
    pipeline.fuse_lora(components=names)
    pipeline.unload_lora_weights()
    return {
        name: {
            key.removesuffix(".weight").replace("text_model.", ""): value
            for key, value in getattr(pipeline, name).state_dict().items()
            if key.endswith(".weight")
        }
        for name in names
    }


def vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1)


def matrices(config: Mapping[str, Any] = TEACHER) -> dict[str, tuple[Tensor, Tensor, float]]:
    """(A, B, alpha) for every module of the U-Net; some have a rank and an alpha of their own.

    diffusers ignores an alpha of its own that kohya's file gives an attention matrix (its pattern keeps
    `.processor.` in the name), so those here, which it shall judge, share one.
    """
    generator = torch.Generator().manual_seed(2)
    made = {}
    for number, (name, shape) in enumerate(weight_shapes(config).items()):
        rank = 3 if number % 17 == 0 else 2
        kernel = (1,) * (len(shape) - 2)
        down = torch.randn(rank, *shape[1:], generator=generator)
        up = torch.randn(shape[0], rank, *kernel, generator=generator)
        made[name] = (down, up, 4.0 if number % 7 == 0 and ".attn" not in name else 1.5)
    return made


def text_matrices() -> dict[str, tuple[Tensor, Tensor, float]]:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "self_attn.q_proj": (8, 8),
        "self_attn.out_proj": (8, 8),
        "mlp.fc1": (12, 8),
        "mlp.fc2": (8, 12),
    }
    return {
        f"text_model.encoder.layers.{layer}.{name}": (
            torch.randn(2, columns, generator=generator),
            torch.randn(rows, 2, generator=generator),
            3.0,
        )
        for layer in range(2)
        for name, (rows, columns) in shapes.items()
    }


def kohya_file(path: Path, config: Mapping[str, Any] = TEACHER, *, sgm: bool, text: bool = True) -> Path:
    """A LoRA on everything, as kohya's scripts write it: SGM names for SDXL, diffusers' for SD."""
    made = matrices(config)
    names = original_names(made) if sgm else {name: name for name in made}
    tensors = {}
    for module, (down, up, alpha) in made.items():
        stem = f"lora_unet_{names[module].replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    for prefix in (("lora_te1_", "lora_te2_") if sgm else ("lora_te_",)) if text else ():
        for module, (down, up, alpha) in text_matrices().items():
            stem = prefix + module.replace(".", "_")
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata={"ss_network_dim": "4", "sshs_model_hash": "abc", "format": "pt"})
    return path


def diffusers_file(path: Path, *, metadata: bool) -> Path:
    """A LoRA written by diffusers itself, with peft's patterns of ranks and alphas or without any."""
    network = unet()
    patterns = {"rank_pattern": {"attn2.to_k": 3}, "alpha_pattern": {"attn2.to_k": 5, "conv1": 2}}
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1"]
    network.add_adapter(LoraConfig(r=2, lora_alpha=8 if metadata else 2, target_modules=targets, **patterns))
    torch.manual_seed(4)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    StableDiffusionXLPipeline.save_lora_weights(
        path.parent,
        unet_lora_layers=get_peft_model_state_dict(network),
        weight_name=path.name,
        **(_collate_lora_metadata({"unet": network}) if metadata else {}),
    )
    return path


def old_file(path: Path) -> Path:
    """diffusers' older names: attention processors' for attention, `lora.down` for the rest."""
    tensors = {}
    for module, (down, up, _) in matrices().items():
        if ".attn" in module:
            stem = module.replace(".to_", ".processor.to_").removesuffix(".0") + "_lora"
        else:
            stem = f"{module}.lora"
        tensors |= {f"unet.{stem}.down.weight": down, f"unet.{stem}.up.weight": up}
    save_file(tensors, path)
    return path


@cache
def teacher_with(lora: bytes, sd: bool) -> dict[str, dict[str, Tensor]]:
    """`loaded` for the teacher; of files that several tests share, once."""
    with NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(lora)
        file.flush()
        return loaded(unet(LIKE_SD if sd else TEACHER), Path(file.name))


def assert_student_equals_teacher(
    lora: Path, out: Path, spec: StudentSpec, config: Mapping[str, Any]
) -> None:
    """Folded in by diffusers, both files give the same weights, and they are not the plain ones."""
    theirs, ours = teacher_with(lora.read_bytes(), config is LIKE_SD), loaded(student(spec, config), out)
    plain = student(spec, config).state_dict()
    changed = 0
    for module, weight in ours["unet"].items():
        assert torch.equal(weight, theirs["unet"][teacher_module(module, spec, config)]), module
        changed += not torch.equal(weight, plain[f"{module}.weight"])
    assert changed > 20
    for part in theirs.keys() - {"unet"}:
        assert theirs[part].keys() == ours[part].keys()
        assert all(torch.equal(ours[part][name], value) for name, value in theirs[part].items())


# --- against diffusers' own loading ----------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "kohya"), [(KOALA, False), (TOP, True)], ids=["to diffusers", "to kohya"])
def test_sdxl_lora_of_kohya(tmp_path: Path, spec: StudentSpec, kohya: bool) -> None:
    """Every module of the U-Net under its SGM name, both text encoders, several ranks and alphas.

    diffusers reads the names of the teacher's file by rules of its own, and both forms of ours.
    """
    lora = kohya_file(tmp_path / "lora.safetensors", sgm=True)
    remapped = remap_lora(lora, tmp_path / "out.safetensors", [(spec, TEACHER)], kohya=kohya)
    assert len(remapped.kept) == len(weight_shapes(student_config(TEACHER, spec)))
    assert len(remapped.kept) + len(remapped.dropped) == len(weight_shapes(TEACHER))
    assert len(remapped.text) == 2 * len(text_matrices())
    assert_student_equals_teacher(lora, tmp_path / "out.safetensors", spec, TEACHER)


def test_sd_lora_of_kohya(tmp_path: Path) -> None:
    """diffusers' names with underscores; the student has one stage less, so that up blocks move too."""
    lora = kohya_file(tmp_path / "lora.safetensors", LIKE_SD, sgm=False)
    remap_lora(lora, tmp_path / "out.safetensors", [(TINY, LIKE_SD)])
    assert_student_equals_teacher(lora, tmp_path / "out.safetensors", TINY, LIKE_SD)


@pytest.mark.parametrize("metadata", [False, True], ids=["alpha is rank", "alphas in metadata"])
def test_lora_that_diffusers_wrote(tmp_path: Path, metadata: bool) -> None:
    lora = diffusers_file(tmp_path / "lora.safetensors", metadata=metadata)
    remap_lora(lora, tmp_path / "out.safetensors", [(KOALA, TEACHER)])
    assert_student_equals_teacher(lora, tmp_path / "out.safetensors", KOALA, TEACHER)


def test_lora_of_older_diffusers(tmp_path: Path) -> None:
    lora = old_file(tmp_path / "lora.safetensors")
    remap_lora(lora, tmp_path / "out.safetensors", [(KOALA, TEACHER)])
    assert_student_equals_teacher(lora, tmp_path / "out.safetensors", KOALA, TEACHER)


def test_merged_weights_are_those_of_the_formula(tmp_path: Path) -> None:
    """W + (alpha / rank) B A for every module, and the tensors of the file are the teacher's own.

    Here an attention matrix has an alpha of its own as well.
    """
    lora = kohya_file(tmp_path / "lora.safetensors", sgm=True)
    own = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    tensors = load_file(lora)
    tensors["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0.alpha"] = torch.tensor(7.0)
    save_file(tensors, lora)
    remapped = remap_lora(lora, tmp_path / "out.safetensors", [(KOALA, TEACHER)])
    merged = loaded(student(KOALA), tmp_path / "out.safetensors")["unet"]
    made = matrices()
    written = load_file(tmp_path / "out.safetensors")
    plain = unet().state_dict()
    for adapter in remapped.kept:
        source = teacher_module(adapter.module, KOALA, TEACHER)
        down, up, alpha = made[source]
        assert torch.equal(written[f"unet.{adapter.module}.lora_A.weight"], down)
        assert torch.equal(written[f"unet.{adapter.module}.lora_B.weight"], up)
        alpha = 7.0 if source == own else alpha
        assert adapter.alpha == alpha
        added = (up.flatten(1) @ down.flatten(1)).view(merged[adapter.module].shape) * (alpha / len(down))
        expected = plain[f"{source}.weight"] + added
        if down.ndim == 2:
            assert torch.equal(merged[adapter.module], expected)
        else:  # peft multiplies kernels by a convolution
            torch.testing.assert_close(merged[adapter.module], expected, rtol=1e-5, atol=1e-5)


def test_remapped_onto_the_teacher_itself_nothing_is_lost(tmp_path: Path) -> None:
    lora = kohya_file(tmp_path / "lora.safetensors", sgm=True)
    remapped = remap_lora(lora, tmp_path / "out.safetensors", [(StudentSpec(), TEACHER)])
    assert remapped.dropped == ()
    assert_student_equals_teacher(lora, tmp_path / "out.safetensors", StudentSpec(), TEACHER)


def test_a_remapped_file_can_be_remapped_again(tmp_path: Path) -> None:
    """Ours is one more diffusers file: its ranks and alphas are read back, and kohya's form too."""
    lora = kohya_file(tmp_path / "lora.safetensors", sgm=True)
    remap_lora(lora, tmp_path / "once.safetensors", [(StudentSpec(), TEACHER)])
    remap_lora(
        tmp_path / "once.safetensors", tmp_path / "kohya.safetensors", [(StudentSpec(), TEACHER)], kohya=True
    )
    remap_lora(tmp_path / "kohya.safetensors", tmp_path / "twice.safetensors", [(StudentSpec(), TEACHER)])
    once, twice = load_file(tmp_path / "once.safetensors"), load_file(tmp_path / "twice.safetensors")
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert metadata_of(tmp_path / "once.safetensors") == metadata_of(tmp_path / "twice.safetensors")


def test_a_student_of_a_student_takes_both_cuts(tmp_path: Path) -> None:
    """Depth first and layers then is the same as both at once."""
    lora = kohya_file(tmp_path / "lora.safetensors", sgm=True)
    depth = StudentSpec(depth=(1, 1), depth_map="top")
    cuts = [(depth, TEACHER), (StudentSpec(layers_per_block=1), student_config(TEACHER, depth))]
    twice = remap_lora(lora, tmp_path / "twice.safetensors", cuts)
    once = remap_lora(lora, tmp_path / "once.safetensors", [(TOP, TEACHER)])
    assert len(twice.dropped) == len(once.dropped)
    assert {each.module: each.down.tolist() for each in twice.kept} == {
        each.module: each.down.tolist() for each in once.kept
    }


def test_rank_stabilised_loras_keep_their_scale(tmp_path: Path) -> None:
    """peft: alpha / sqrt(rank)."""
    tensors = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.randn(4, 16)}
    tensors["unet.mid_block.attentions.0.proj_in.lora_B.weight"] = torch.randn(16, 4)
    settings = {
        "unet.r": 4,
        "unet.lora_alpha": 3,
        "unet.use_rslora": True,
        "unet.target_modules": ["proj_in"],
    }
    save_file(
        tensors, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)}
    )
    (adapter,) = remap_lora(
        tmp_path / "lora.safetensors", tmp_path / "out.safetensors", [(StudentSpec(), TEACHER)]
    ).kept
    assert adapter.alpha / adapter.rank == 3 / math.sqrt(4)


# --- names and counts ------------------------------------------------------------------------------------


@cache
def sdxl_modules() -> dict[str, tuple[int, ...]]:
    return weight_shapes(SDXL)


FIRST = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("written", "module"),
    [
        ("input_blocks_4_1_transformer_blocks_0_attn1_to_q", f"down_blocks.1.attentions.0.{FIRST}"),
        ("input_blocks_8_1_transformer_blocks_0_attn1_to_q", f"down_blocks.2.attentions.1.{FIRST}"),
        ("output_blocks_5_1_transformer_blocks_0_attn1_to_q", f"up_blocks.1.attentions.2.{FIRST}"),
        ("middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
        ("middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_4_0_skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_8_0_in_layers_2", "up_blocks.2.resnets.2.conv1"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        ("mid_block_attentions_0_proj_in", "mid_block.attentions.0.proj_in"),
    ],
)
def test_names_in_files_for_sdxl(written: str, module: str) -> None:
    assert written_names(sdxl_modules())[written] == module


@pytest.mark.parametrize(("preset", "kept"), [("koala-1b", 314), ("koala-700m", 222)])
def test_a_usual_sdxl_lora_on_koala(tmp_path: Path, preset: str, kept: int) -> None:
    """722 modules as kohya's scripts count them: 70 transformer blocks of 10, and 11 pairs of projections."""
    inside = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
    chosen = {name: shape for name, shape in sdxl_modules().items() if name.endswith(inside)}
    assert len(chosen) == 722
    numbered = original_names(sdxl_modules())
    tensors = {}
    for name, (rows, columns) in chosen.items():
        stem = f"lora_unet_{numbered[name].replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": torch.zeros(1, columns, dtype=torch.float16)}
        tensors |= {f"{stem}.lora_up.weight": torch.zeros(rows, 1, dtype=torch.float16)}
    save_file(tensors, tmp_path / "lora.safetensors")
    remapped = remap_lora(
        tmp_path / "lora.safetensors", tmp_path / "out.safetensors", [(preset_spec(preset), SDXL)]
    )
    assert (len(remapped.kept), len(remapped.dropped)) == (kept, 722 - kept)
    assert {each.down.dtype for each in remapped.kept} == {torch.float16}


def test_kohya_numbers_text_encoders_only_where_there_are_two() -> None:
    module = "encoder.layers.0.mlp.fc1"
    assert kohya_name("text_encoder", module, several=False).startswith("lora_te_text_model_encoder")
    assert kohya_name("text_encoder", f"text_model.{module}", several=True).startswith(
        "lora_te1_text_model_e"
    )
    assert kohya_name("text_encoder_2", "text_projection", several=True) == "lora_te2_text_projection"


@pytest.mark.parametrize(("added", "prefix"), [(None, "te"), ("text_time", "te1")])
def test_kohyas_first_text_encoder_of_sdxl_keeps_its_number_without_the_second(
    tmp_path: Path, added: str | None, prefix: str
) -> None:
    save_file(GOOD | TEXT, tmp_path / "lora.safetensors")
    teacher = TEACHER | {"addition_embed_type": added}
    remap_lora(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", [(KOALA, teacher)], kohya=True)
    text = {name for name in load_file(tmp_path / "out.safetensors") if name.startswith("lora_te")}
    assert {name.split("_")[1] for name in text} == {prefix}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_metadata_stay_but_for_hashes_of_other_tensors(tmp_path: Path) -> None:
    lora = kohya_file(tmp_path / "lora.safetensors", sgm=True, text=False)
    remapped = remap_lora(lora, tmp_path / "out.safetensors", [(KOALA, TEACHER)])
    written = metadata_of(tmp_path / "out.safetensors")
    assert written["ss_network_dim"] == "4"
    assert "sshs_model_hash" not in written
    counts = {"kept": len(remapped.kept), "dropped": len(remapped.dropped)}
    assert json.loads(written["shoestring.remapped"]) == counts


# --- what is refused -------------------------------------------------------------------------------------


def pair(stem: str, *, rows: int = 16, columns: int = 16, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{stem}.lora_A.weight": torch.ones(rank, columns),
        f"{stem}.lora_B.weight": torch.ones(rows, rank),
    }


GOOD = pair("unet.down_blocks.1.attentions.0.proj_in")
TEXT = pair("text_encoder.text_model.encoder.layers.0.mlp.fc1")


MID = "lora_unet_middle_block_1_proj_in"
DOT_MID = "unet.mid_block.attentions.0.proj_in"
HALF = {f"{DOT_MID}.lora_A.weight": torch.ones(2, 16)}
REFUSED = [
    (GOOD | pair("transformer.single_blocks.0.proj"), r"transformer\.single_blocks\.0.*8-16 wide"),
    (GOOD | pair("unet.down_blocks.0.attentions.0.proj_in"), r"0\.attentions\.0.*Give a LoRA made for it"),
    (GOOD | {"lora_unet_input_blocks_99_1_proj_in.alpha": torch.ones(())}, "input_blocks_99"),
    (GOOD | {f"{MID}.hada_w1_a": torch.ones(2, 2)}, r"hada_w1_a: is of a LoHa"),
    (GOOD | {f"{MID}.lokr_w1": torch.ones(2, 2)}, "LoKr"),
    (GOOD | {f"{MID}.dora_scale": torch.ones(2)}, "DoRA"),
    (GOOD | pair("text_encoder.vision_model.proj"), "vision_model"),
    (GOOD | HALF, r"up \(lora_B\) matrix is missing"),
    (GOOD | pair("lora_unet_input_blocks_4_1_proj_in"), "a second tensor for unet.down_blocks.1"),
    (HALF | {f"{DOT_MID}.lora_B.weight": torch.ones(16, 3)}, "no pair of A"),
    (pair("unet.down_blocks.1.attentions.0.proj_in", columns=15), r"\(2, 15\).*weight \(16, 16\)"),
    (pair("unet.conv_in", rows=8), r"do not make up the teacher's weight \(8, 4, 3, 3\)"),
    (pair(DOT_MID), "none of its 1 adapted modules is in the student. Give one"),
    (TEXT, "text encoders alone"),
    ({}, "holds no tensors"),
]


@pytest.mark.parametrize(("tensors", "words"), REFUSED)
def test_what_is_no_lora_of_this_teacher_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], words: str
) -> None:
    """One line that names the file and the first such tensor; nothing is written."""
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=words) as refused:
        remap_lora(path, tmp_path / "out.safetensors", [(KOALA, TEACHER)])
    assert str(refused.value).startswith(f"{path}: ")
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10\x00")
    torch.save({}, tmp_path / "lora.pt")
    for name, words in (("damaged.safetensors", "not a whole"), ("lora.pt", "not a .saf"), ("no", "no such")):
        with pytest.raises(CheckpointError, match=words):
            remap_lora(tmp_path / name, out, [(KOALA, TEACHER)])
    save_file(GOOD, tmp_path / "bad.safetensors", metadata={"lora_adapter_metadata": "["})
    with pytest.raises(CheckpointError, match="lora_adapter_metadata: not a JSON object"):
        remap_lora(tmp_path / "bad.safetensors", out, [(KOALA, TEACHER)])


def test_an_existing_file_stays(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "lora.safetensors")
    (tmp_path / "out.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        remap_lora(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", [(KOALA, TEACHER)])
    assert (tmp_path / "out.safetensors").read_text() == "mine"


def test_adapters_must_fit_the_student(tmp_path: Path) -> None:
    """Another configuration than the file was read for is found out by the shapes."""
    adapters = remap_lora(
        kohya_file(tmp_path / "lora.safetensors", sgm=True),
        tmp_path / "o.safetensors",
        [(StudentSpec(), TEACHER)],
    ).kept
    wider = {**TEACHER, "cross_attention_dim": 24}
    with pytest.raises(CheckpointError, match="do not make up the student's weight"):
        remap(adapters, KOALA, wider)
