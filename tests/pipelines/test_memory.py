"""Memory plans: sizes as text, arithmetic on published shapes, published peaks, what a budget chooses."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from shoestring.errors import CheckpointError, RecipeError
from shoestring.pipelines import memory
from shoestring.pipelines.live_memory import forward_peak
from shoestring.pipelines.memory import FACTOR, FIXED, MemoryPlan, parse_size, plan_memory
from shoestring.pipelines.memory_parts import (
    INT8_DTYPE,
    NETWORKS,
    Parts,
    count_values,
    decode_live,
    memory_table,
    read_parts,
    sdxl_parts,
    set_tile,
    stored_values,
    unet_bytes,
)
from tests.pipelines import stock_parts as parts
from tests.pipelines.test_unet import scenes, sdxl, stable_diffusion

GIB = 2**30


@cache
def shapes(name: str, tiny: bool = False) -> Parts:
    return sdxl_parts(NETWORKS[name](), tiny=tiny)


@cache
def plan(name: str, budget: str, device: str = "cuda", tiny: bool = False, batch: int = 1) -> MemoryPlan:
    return plan_memory(shapes(name, tiny), parse_size(budget), device=device, batch=batch)


# Sizes as text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * GIB),
        ("800MiB", 800 * 2**20),
        ("4GB", 4 * 10**9),
        ("1.5 gib", 3 * GIB // 2),
        ("512KiB", 2**19),
        ("1TiB", 2**40),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "4", "4G", "GiB", "-1GiB", "0GiB", "1e3MiB", "4GiBs", "inf GiB", "4 Gi"]
)
def test_other_sizes_are_refused_and_the_form_is_told(text: str) -> None:
    with pytest.raises(RecipeError, match="such as 4GiB"):
        parse_size(text)


# Arithmetic


def test_the_table_counts_published_weights_and_tells_what_saves_most() -> None:
    values = {"sdxl": 2_567_463_684, "koala-1b": 1_161_184_324, "koala-700m": 782_822_724}
    for row in memory_table():
        assert row["unet"] == 2 * values[row["network"]]
        assert row["text"] == 2 * (123_060_480 + 694_659_840)
        assert row["vae"] == 2 * 83_653_863
        assert row["plain"] > row["staged_full"] >= row["staged_tiled"] >= row["int8"]
        assert row["decode_full_live"] > 3 * max(row["decode_tiled_live"], row["decode_tiny_live"])


PUBLISHED = [  # GB on an RTX 4090 in float16, batch 1: sdxl-koala, asset/latency_memory_labels_anno_wide.png
    ("koala-700m", 1024, 8.3),
    ("koala-700m", 512, 4.9),
    ("koala-1b", 1024, 9.1),
    ("koala-1b", 512, 5.7),
    ("sdxl", 1024, 11.9),
    ("sdxl", 512, 8.5),
]


@pytest.mark.parametrize(("name", "size", "peak"), PUBLISHED)
def test_plain_pipelines_take_what_was_published(name: str, size: int, peak: float) -> None:
    """Two of these six fix the two numbers for a GPU; four are foretold."""
    drawn = shapes(name)
    weights = sum(each.values for each in drawn.text) + count_values(drawn.unet) + count_values(drawn.vae)
    live = decode_live(drawn.vae, 1, (size, size), torch.float16)
    assert (FIXED["cuda"] + 2 * weights + FACTOR["cuda"] * live) / 1e9 == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("tiny", [False, True])
def test_tiles_are_counted_as_they_are_decoded(tiny: bool) -> None:
    """One tile and what the others gave, against a run of all of them on shapes."""
    vae = copy.deepcopy(shapes("koala-700m", tiny).vae).half()
    counted = decode_live(vae, 1, (768, 768), torch.float16, 512)
    set_tile(vae, 512)
    latents = torch.empty(1, 4, 96, 96, dtype=torch.float16, device="meta")
    assert counted == pytest.approx(forward_peak(vae, latents, method="decode"), rel=0.05)


def test_text_states_are_counted_as_clip_makes_them() -> None:
    """The rule for text against a run of SDXL's larger encoder on shapes."""
    large = shapes("sdxl").text[1]
    config = CLIPTextConfig(
        hidden_size=large.width,
        intermediate_size=4 * large.width,
        num_hidden_layers=large.layers,
        num_attention_heads=20,
        projection_dim=1280,
    )
    with torch.device("meta"):
        encoder = CLIPTextModelWithProjection(config).half().eval()
        ids = torch.zeros(2, 77, dtype=torch.long)
    assert sum(each.numel() for each in encoder.parameters()) == large.values
    counted = forward_peak(encoder, ids, output_hidden_states=True)
    assert large.live(2, torch.float16) == pytest.approx(counted, rel=0.05)


def test_8_bit_weights_take_what_is_counted() -> None:
    """Against the bytes of a U-Net that torchao has quantised."""
    quantization = pytest.importorskip("torchao.quantization")
    unet = parts.sdxl_unet(block_out_channels=(32, 64)).to(INT8_DTYPE)
    counted = unet_bytes(unet, INT8_DTYPE, int8=True)
    quantization.quantize_(unet, quantization.Int8WeightOnlyConfig())
    taken = 0
    for weight in unet.state_dict().values():
        inside = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]] if hasattr(
            weight, "__tensor_flatten__"
        ) else [weight]  # fmt: skip
        taken += sum(each.numel() * each.element_size() for each in inside)
    assert counted == taken < unet_bytes(unet, INT8_DTYPE)


@pytest.mark.parametrize("make", [sdxl, stable_diffusion, scenes])
def test_headers_and_configurations_tell_all_of_a_folder(make: Any, tmp_path: Path) -> None:
    """The plan's counts are those of the loaded networks, and shapes on meta are those of the files."""
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    found = read_parts(tmp_path)
    text = [part for name, part in pipeline.components.items() if name.startswith("text_encoder")]
    assert [each.values for each in found.text] == [count_values(each) for each in text]
    assert count_values(found.unet) == count_values(pipeline.unet) == stored_values(tmp_path / "unet")
    assert count_values(found.vae) == count_values(pipeline.vae)
    assert all(each.is_meta for each in (*found.unet.parameters(), *found.vae.parameters()))
    assert found.size() == parts.SIZE or make is scenes


def test_of_several_variants_one_is_counted(tmp_path: Path) -> None:
    unet = parts.unet()
    unet.save_pretrained(tmp_path)
    unet.save_pretrained(tmp_path, variant="fp16")
    whole = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert stored_values(tmp_path) == sum(each.numel() for each in whole.values())


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08" + bytes(20))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        stored_values(tmp_path)


# What a budget chooses


def test_1024_px_in_4_gib() -> None:
    """The claim of the docs: KOALA-700M in float16, its decode in tiles, within 4 GiB."""
    chosen = plan("koala-700m", "4GiB")
    assert chosen.peak < 3 * GIB
    assert chosen.denoise.dtype == torch.float16
    assert not chosen.denoise.int8
    assert chosen.decode.tile == 512


def test_more_memory_never_chooses_less() -> None:
    """Whole decode where it fits, then tiles; float16 where it fits, then 8 bits; budgets hold."""
    tiles, widths = [], []
    for budget in ("8GiB", "4GiB", "2GiB"):
        chosen = plan("koala-700m", budget)
        assert chosen.peak <= parse_size(budget)
        tiles.append(chosen.decode.tile or 10**6)
        widths.append(1 if chosen.denoise.int8 else 2)
    assert tiles == sorted(tiles, reverse=True)
    assert tiles[0] == 10**6
    assert widths == [2, 2, 1]


def test_fewer_pictures_at_once_come_before_8_bits() -> None:
    chosen = plan("koala-700m", "3GiB", tiny=True, batch=4)
    assert 1 <= chosen.denoise.batch < 4
    assert not chosen.denoise.int8
    assert chosen.text.batch == chosen.denoise.batch


def test_a_tiny_decoder_needs_no_tiles() -> None:
    assert plan("koala-700m", "3GiB", tiny=True).decode.tile is None
    assert plan("koala-700m", "3GiB", tiny=True).decode.tiny


def test_text_goes_to_the_cpu_where_a_gpu_cannot_hold_it() -> None:
    chosen = plan_memory(shapes("koala-700m", True), parse_size("1.7GiB"), device="cuda", size=(512, 512))
    assert chosen.text.device == "cpu"
    assert chosen.denoise.device == chosen.decode.device == "cuda"
    assert "text encoders on the cpu (float32)" in str(chosen)


def test_a_cpu_draws_in_float32_where_it_fits_and_in_bfloat16_where_not() -> None:
    assert plan("koala-700m", "8GiB", "cpu", True).denoise.dtype == torch.float32
    assert plan("koala-700m", "3GiB", "cpu", True).denoise.dtype == torch.bfloat16
    assert plan("koala-700m", "3GiB", "cpu", True).text.dtype == torch.bfloat16


def test_an_autoencoder_that_overflows_in_float16_decodes_in_float32() -> None:
    drawn = shapes("koala-700m")
    vae: Any = copy.deepcopy(drawn.vae)
    vae.register_to_config(force_upcast=True)
    chosen = plan_memory(replace(drawn, vae=vae), 64 * GIB, device="cuda")
    assert chosen.decode.dtype == torch.float32
    assert chosen.decode.peak > plan("koala-700m", "64GiB").decode.peak


def test_guidance_takes_twice_the_rows() -> None:
    one, two = (plan_memory(shapes("koala-700m", True), 64 * GIB, guided=guided) for guided in (False, True))
    weights = FIXED["cpu"] + unet_bytes(shapes("koala-700m").unet, torch.float32)
    assert two.denoise.peak - weights == pytest.approx(2 * (one.denoise.peak - weights), rel=0.1)


def test_of_several_gpus_the_chosen_one_draws() -> None:
    """Its stages name it, and take what they take of any."""
    second, any_gpu = (plan("koala-700m", "4GiB", device, tiny=True) for device in ("cuda:1", "cuda"))
    assert {second.text.device, second.denoise.device, second.decode.device} == {"cuda:1"}
    assert second.peak == any_gpu.peak
    assert "px in 4.00 GiB on cuda:1" in str(second)


def test_a_plan_says_itself_in_two_lines() -> None:
    lines = str(plan("koala-700m", "4GiB")).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("1024 x 1024 px in 4.00 GiB on cuda: expected peak 2.4")
    assert "U-Net 2.4" in lines[1]
    assert "(float16, tiles of 512 px)" in lines[1]


# Too little


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_too_little_memory_tells_what_would_do(device: str) -> None:
    """One line; the least it names is enough, and a hundredth less is not."""
    with pytest.raises(RecipeError, match=r"1024 x 1024 px on c.* at the least") as caught:
        plan("koala-700m", "1GiB", device, tiny=True)
    message = str(caught.value)
    assert "\n" not in message
    least = message.split("Give at least ")[1].split("GiB")[0]
    assert plan("koala-700m", f"{least}GiB", device, tiny=True).denoise.batch == 1
    with pytest.raises(RecipeError, match="at the least"):
        plan("koala-700m", f"{float(least) - 0.02}GiB", device, tiny=True)


def test_too_little_for_decoding_names_the_tiny_decoder() -> None:
    """A small U-Net before SDXL's autoencoder."""
    drawn = Parts("StableDiffusionPipeline", (), parts.unet(sample_size=128), shapes("sdxl").vae)
    drawn.unet.to("meta")
    with pytest.raises(RecipeError, match=r"for decoding.*--tiny-decoder.*smaller picture \(512 x 512 px"):
        plan_memory(drawn, 500 * 2**20, device="cuda")


def test_a_budget_below_every_plan_is_said_in_its_own_unit_with_what_lowers_the_least_alone() -> None:
    """What the process itself takes is no smaller with another decoder or picture."""
    unet, vae = (network.to("meta") for network in (parts.unet(sample_size=8), parts.kl()))
    drawn = Parts("StableDiffusionPipeline", (), unet, vae)
    with pytest.raises(RecipeError, match=r"^--memory 1\.00 KiB: .*Give at least 0\.6\dGiB\.$"):
        plan_memory(drawn, 2**10)


def test_without_the_packages_8_bits_are_not_planned_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "has_int8", lambda: False)
    with pytest.raises(RecipeError, match=r'8-bit weights \(pip install "shoestring\[int8\]"\)'):
        plan_memory(shapes("koala-700m", True), 2 * GIB, device="cuda")
    with pytest.raises(RecipeError, match=r"shoestring\[int8\]"):
        memory.require_int8()


def test_sides_that_do_not_fit_the_autoencoder_are_refused() -> None:
    with pytest.raises(RecipeError, match="multiples of 8"):
        plan_memory(shapes("koala-700m"), 64 * GIB, size=(1000, 1001))


def test_other_pipelines_have_no_plan(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "MicroDiTPipeline"}')
    with pytest.raises(RecipeError, match="is a MicroDiTPipeline"):
        read_parts(tmp_path)
