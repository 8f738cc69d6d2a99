"""Würstchen's networks as one autoencoder: against diffusers' networks and scheduler, and its sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated.wuerstchen import modeling_paella_vq_model, modeling_wuerstchen_diffnext
from torch import Tensor, nn

import shoestring
from shoestring.data.encoders import ImageEncoder
from shoestring.errors import CheckpointError, RecipeError, StoreError
from shoestring.models.autoencoders import as_scaling, load_autoencoder, scale_latents, weights_fingerprint
from shoestring.models.microdit import MicroDiT
from shoestring.models.semantic_compressor import SemanticCompressor
from shoestring.models.sizes import nearest_sizes
from shoestring.models.text_encoders import HashingTextEncoder
from shoestring.models.wuerstchen_autoencoder import WuerstchenAutoencoder, resolution_multiple
from shoestring.models.wuerstchen_decoder import WuerstchenDiffNeXt
from shoestring.models.wuerstchen_vqgan import PaellaVQModel
from shoestring.pipelines.microdit import MicroDiTPipeline
from shoestring.sampling.schedulers import make_scheduler

VQGAN: dict[str, Any] = {"embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 8, "scale_factor": 0.5}
DECODER: dict[str, Any] = {
    "c_r": 8,
    "c_cond": 16,
    "c_hidden": [16, 16],
    "nhead": [-1, 2],
    "blocks": [1, 2],
    "level_config": ["CT", "CTA"],
    "inject_effnet": [False, True],
    "effnet_embd": 4,
    "clip_embd": 12,
}
STAGES: list[dict[str, Any]] = [
    {"block": "fused", "expand": 1, "kernel": 3, "stride": 1, "in": 8, "out": 8, "layers": 1},
    {"block": "mbconv", "expand": 4, "kernel": 3, "stride": 2, "in": 8, "out": 16, "layers": 1},
]
COMPRESSOR: dict[str, Any] = {"c_latent": 4, "variant": STAGES, "last_channel": 16}
"""Stride 4 of three quarters: a cell of 16/3 px; Stage B wants multiples of 4 * 2 * 2 = 16 px."""


def tiny(**config: Any) -> WuerstchenAutoencoder:
    """Small networks that are awake: fresh ones are zero at their ends.

    At t = 1 they call about all of x noise, as trained ones do: what a fresh one says grows thirtyfold.
    """
    torch.manual_seed(0)
    parts = {
        "vqgan": VQGAN,
        "decoder": DECODER,
        "compressor": COMPRESSOR | config.pop("compressor", {}),
    }
    model = WuerstchenAutoencoder(**parts, **{"decode_steps": 3, **config})
    for name, parameter in model.named_parameters():
        if name.endswith(("gammas", "gamma", "beta")) or "mapper" in name:
            nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(model.decoder.clf[1].weight, std=0.1)
    nn.init.constant_(model.decoder.clf[1].bias[16:], 4.0)  # B
    return model.eval()


@pytest.fixture
def pictures() -> Tensor:
    return torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def z() -> Tensor:
    """Codes of pictures of 32 x 48 px."""
    return torch.randn(3, 4, 6, 9, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def decoded(model: WuerstchenAutoencoder, z: Tensor, **options: Any) -> Tensor:
    pictures: Tensor = model.decode(z, **options).sample
    return pictures


# --- what it computes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("null_tokens", [0, 3])
@torch.no_grad()
def test_decoding_is_that_of_diffusers_networks_and_scheduler(null_tokens: int, z: Tensor) -> None:
    """Their Stage B, run plainly at every step, and their Stage A, with our weights and noise."""
    model = tiny(null_tokens=null_tokens)
    stage_b = modeling_wuerstchen_diffnext.WuerstchenDiffNeXt(**DECODER).eval()
    stage_a = modeling_paella_vq_model.PaellaVQModel(**VQGAN).eval()
    stage_b.load_state_dict(model.decoder.state_dict())
    stage_a.load_state_dict(model.vqgan.state_dict())

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 4, 8, 12, generator=generator)
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(5)
    text = torch.zeros(3, null_tokens, 12)
    for time in scheduler.timesteps[:-1]:
        times = time.expand(3)
        noise = stage_b(x, times, z, text)
        x = scheduler.step(noise, times, x, generator=generator).prev_sample
    expected = stage_a.decode(x * 0.5).sample.clamp(0, 1) * 2 - 1

    ours = decoded(model, z, generator=torch.Generator().manual_seed(3), steps=5)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_encoding_is_the_compressor_on_pictures_in_0_1(pictures: Tensor) -> None:
    model = tiny()
    with torch.no_grad():
        z = model.encode(pictures).latent
        assert z.shape == (3, 4, 6, 9)
        assert torch.equal(z, model.compressor.compress((pictures + 1) / 2))


def test_a_picture_depends_on_its_own_code_alone(z: Tensor) -> None:
    """Without a generator: the same again, whatever lies beside it in the batch."""
    model = tiny()
    together = decoded(model, z)
    assert torch.equal(together, decoded(model, z))
    for place in range(3):
        torch.testing.assert_close(together[place : place + 1], decoded(model, z[place : place + 1]))


def test_generators_give_other_noise_one_for_all_or_one_a_picture(z: Tensor) -> None:
    model = tiny()

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    one = decoded(model, z, generator=seeded(1))
    assert torch.equal(one, decoded(model, z, generator=seeded(1)))
    assert not torch.allclose(one, decoded(model, z, generator=seeded(2)))
    each = decoded(model, z, generator=[seeded(seed) for seed in (5, 0, 7)])
    torch.testing.assert_close(each[:1], decoded(model, z[:1], generator=seeded(5)))
    torch.testing.assert_close(each[1], decoded(model, z)[1])  # without one, each is seeded 0
    with pytest.raises(ValueError, match="2 generators for 3 pictures"):
        model.decode(z, generator=[seeded(0), seeded(1)])


def test_in_bfloat16_pictures_are_nearly_the_same(pictures: Tensor) -> None:
    """Latents, times and noise stay float32."""
    model = tiny()
    with torch.no_grad():
        expected = model(pictures).sample
        found = model.to(torch.bfloat16)(pictures).sample
    assert found.isfinite().all()
    assert (found.float() - expected).abs().mean() < 0.05 * expected.std()


# --- sizes -----------------------------------------------------------------------------------------------


def published() -> WuerstchenAutoencoder:
    with torch.device("meta"):
        return WuerstchenAutoencoder(vqgan={}, decoder={}, compressor={})


def test_published_sizes_are_multiples_of_128_and_all_others_are_refused() -> None:
    """Section by section of the ladder: 1024 px are 24 cells of 42 2/3 px and 256 of 4 px."""
    model = published()
    assert model.size_multiple == 128
    assert float(model.factor) == pytest.approx(42.667, abs=1e-3)
    for size, cells in ((128, 3), (512, 12), (1024, 24), (1536, 36)):
        assert model.latent_side(size) == cells
    nearest = {576: "512 or 640", 704: "640 or 768", 832: "768 or 896", 960: "896 or 1024"}
    nearest |= {1088: "1024 or 1152", 1344: "1280 or 1408", 1000: "896 or 1024", 64: "128", 0: "128"}
    for size, near in nearest.items():
        with pytest.raises(RecipeError, match=rf"multiples of 128; nearest to {size}: {near}\.$"):
            model.check_size(1024, size)
        with pytest.raises(RecipeError, match=rf"nearest to {size}: {near}\."):
            model.check_size(size, 1024)


def test_published_ladder_has_its_published_size() -> None:
    """Stage B 1,055,365,280, Stage A 18,406,894 and compressor 20,198,000 parameters."""
    total = 1_055_365_280 + 18_406_894 + 20_198_000
    assert sum(p.numel() for p in published().parameters()) == total


@pytest.mark.parametrize("stride", [4, 16, 32])
@pytest.mark.parametrize("ratio", [0.75, 0.5, 1.0, 0.6667])
@pytest.mark.parametrize(("vq", "patch", "levels"), [(4, 2, 4), (4, 1, 2), (2, 1, 1), (8, 2, 3)])
def test_the_multiple_is_the_least_size_that_all_stages_take(
    stride: int, ratio: float, vq: int, patch: int, levels: int
) -> None:
    exact = 2 / 3 if ratio == 0.6667 else ratio

    def fits(size: int) -> bool:
        seen = size * exact
        whole = abs(seen - round(seen)) < 1e-6 and round(seen) % stride == 0
        return whole and size % (vq * patch * 2 ** (levels - 1)) == 0

    multiple = resolution_multiple(stride, ratio, vq, patch, levels)
    assert multiple == next(size for size in range(1, 4096) if fits(size))


def test_nearest_sizes_come_nearest_first() -> None:
    assert nearest_sizes(1000, 1024, 128) == [(1024, 1024), (896, 1024)]
    assert nearest_sizes(512, 256, 128) == [(512, 256)]
    assert nearest_sizes(700, 100, 128) == [(640, 128), (768, 128)]


@pytest.mark.parametrize("shape", [(3, 6), (7, 6), (0, 3)])
def test_codes_of_no_valid_size_are_refused(shape: tuple[int, int]) -> None:
    if shape == (3, 6):
        assert decoded(tiny(), torch.randn(1, 4, *shape)).shape == (1, 3, 16, 32)
        return
    with pytest.raises(RecipeError, match=r"sides must be multiples of 3 \(pictures' of 16\)"):
        tiny().decode(torch.randn(1, 4, *shape))


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_other_ratios_have_other_sizes(ratio: float) -> None:
    model = tiny(compressor={"input_ratio": ratio})
    size = model.size_multiple
    assert size == 16
    pictures = torch.rand(1, 3, size, 2 * size) * 2 - 1
    with torch.no_grad():
        z = model.encode(pictures).latent
        assert z.shape == (1, 4, size * ratio / 4, 2 * size * ratio / 4)
        assert model.decode(z).sample.shape == pictures.shape


# --- files -----------------------------------------------------------------------------------------------


def test_a_saved_autoencoder_loads_as_the_same(z: Tensor, pictures: Tensor, tmp_path: Path) -> None:
    model = tiny(null_tokens=2)
    model.set_statistics([0.5, 1.0, 1.5, 2.0], 2.0)
    model.save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    assert isinstance(loaded, WuerstchenAutoencoder)
    assert loaded.config["decode_steps"] == 3
    torch.testing.assert_close(decoded(loaded, z), decoded(model, z))
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(pictures).latent, model.encode(pictures).latent)
    scaled = scale_latents(loaded, z)
    torch.testing.assert_close(scaled, (z - torch.tensor([0.5, 1.0, 1.5, 2.0]).view(4, 1, 1)) / 2)


def test_published_scaling_is_z_plus_1_over_42(z: Tensor) -> None:
    model = tiny(compressor={"latents_mean": -1, "latents_std": 42})
    torch.testing.assert_close(scale_latents(model, z), (z + 1) / 42)
    torch.testing.assert_close(as_scaling(model).undo((z + 1) / 42), z)


def parts_of(model: WuerstchenAutoencoder) -> dict[str, Any]:
    return {"vqgan": model.vqgan, "decoder": model.decoder, "compressor": model.compressor}


def test_parts_are_shared_and_not_copied(z: Tensor, tmp_path: Path) -> None:
    model = tiny()
    model.decoder.train()
    joined = WuerstchenAutoencoder.from_parts(**parts_of(model), decode_steps=3)
    assert joined.training
    assert not joined.vqgan.training  # its norm would move
    joined.eval()
    assert joined.decoder is model.decoder
    assert all(not tensor.is_meta for tensor in joined.state_dict().values())
    assert torch.equal(decoded(joined, z), decoded(model, z))
    joined.save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    assert isinstance(loaded, WuerstchenAutoencoder)
    torch.testing.assert_close(decoded(loaded, z), decoded(model, z))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved pipeline's parts, as after Stage B."""
    for name, part in parts_of(tiny()).items():
        part.save_pretrained(tmp_path / "saved" / name)
    return tmp_path / "saved"


def test_a_pipeline_folder_with_the_three_parts_opens(folder: Path, z: Tensor, tmp_path: Path) -> None:
    """Itself, as a store's autoencoder, and as the export of a run."""
    expected = decoded(tiny(), z)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("{}")
    with pytest.raises(RecipeError, match="has exported no pipeline"):
        load_autoencoder(str(tmp_path / "run"))
    shutil.copytree(folder, tmp_path / "run" / "pipeline")
    for place in (folder, tmp_path / "run"):
        model = load_autoencoder(str(place))
        assert isinstance(model, WuerstchenAutoencoder)
        assert not any(p.requires_grad for p in model.parameters())
        torch.testing.assert_close(decoded(model, z, steps=3), expected)
    assert WuerstchenAutoencoder.from_folder(folder, decode_steps=7).config["decode_steps"] == 7


@pytest.mark.parametrize(
    ("index", "steps"),
    [({}, 12), ({"default_steps": 7}, 7), ({"default_steps": 60, "decoder_steps": 5}, 5)],
    ids=["published", "decoder", "combined"],
)
def test_steps_are_those_of_the_pipeline(index: dict[str, int], steps: int, folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Any", **index}))
    model: Any = load_autoencoder(str(folder))
    assert model.config["decode_steps"] == steps


def _without_compressor(folder: Path) -> None:
    shutil.rmtree(folder / "compressor")


def _without_decoder(folder: Path) -> None:
    shutil.rmtree(folder / "decoder")


def _cascade(folder: Path) -> None:
    config = json.loads((folder / "decoder" / "config.json").read_text())
    (folder / "decoder" / "config.json").write_text(json.dumps(config | {"_class_name": "StableCascadeUNet"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _without_compressor,
            r"no compressor/.*model_v2_stage_b\.pt of dome272/wuerstchen.*shoestring convert",
        ),
        (
            _without_decoder,
            r"no decoder/config\.json, which a Würstchen autoencoder needs beside vqgan/, comp",
        ),
        (_cascade, "decoder/ holds a StableCascadeUNet; a WuerstchenDiffNeXt is wanted"),
    ],
)
def test_a_folder_that_lacks_a_part_says_which(
    change: Callable[[Path], None], message: str, folder: Path
) -> None:
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        load_autoencoder(str(folder))


def test_stages_of_different_trainings_are_refused() -> None:
    vqgan, decoder = PaellaVQModel(**VQGAN), WuerstchenDiffNeXt(**DECODER)
    with pytest.raises(RecipeError, match=r"takes codes of 4 channels; the compressor's have 5"):
        WuerstchenAutoencoder.from_parts(vqgan, decoder, SemanticCompressor(**COMPRESSOR | {"c_latent": 5}))
    with pytest.raises(RecipeError, match=r"makes latents of 4 channels; the vqgan's have 3"):
        WuerstchenAutoencoder.from_parts(
            PaellaVQModel(**VQGAN, latent_channels=3), decoder, SemanticCompressor(**COMPRESSOR)
        )
    with pytest.raises(RecipeError, match="decode_steps 0"):
        tiny(decode_steps=0)


# --- behind a store and a pipeline -----------------------------------------------------------------------


def test_a_store_knows_its_cells_and_refuses_other_sizes() -> None:
    encoder = ImageEncoder(tiny(), "tiny")
    assert encoder.shapes([32, 48]) == {"32": [4, 6, 6], "48": [4, 9, 9]}
    assert json.loads(json.dumps(encoder.identity()))["spatial_factor"] == pytest.approx(16 / 3)
    with pytest.raises(
        StoreError, match="size 40: this autoencoder needs multiples of 16; nearest: 32 or 48"
    ):
        encoder.shapes([32, 40])


@pytest.fixture
def microdit() -> MicroDiTPipeline:
    torch.manual_seed(0)
    network = MicroDiT(
        sample_size=6,
        in_channels=4,
        patch_size=2,
        caption_channels=16,
        hidden_size=16,
        depth=1,
        head_dim=8,
        multiple_of=8,
        mixer_depth=1,
        mixer_size=16,
    )
    pipeline = MicroDiTPipeline(
        transformer=network.eval(),
        vae=tiny(),
        text_encoder=HashingTextEncoder(width=16, max_tokens=12),
        scheduler=make_scheduler("edm_heun", prediction="edm", sigma_data=0.5),
        default_steps=2,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_microdit_makes_pictures_through_it(microdit: MicroDiTPipeline, tmp_path: Path) -> None:
    """Cells of 16/3 px in patches of two: its own size is 32 px, and both sides go in steps of 32."""
    assert microdit.size_multiple == 32

    def draw(pipeline: Any, **size: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        images: Tensor = pipeline("a red circle", generator=generator, output_type="pt", **size).images
        return images

    made = draw(microdit)
    assert made.shape == (1, 3, 32, 32)
    assert draw(microdit, height=64, width=32).shape == (1, 3, 64, 32)
    with pytest.raises(ValueError, match="multiples of 32; nearest: 32 x 64"):
        microdit("a red circle", height=33, width=60)
    microdit.save_pretrained(tmp_path)
    loaded = shoestring.load(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert weights_fingerprint(loaded.vae) == weights_fingerprint(microdit.vae)
    torch.testing.assert_close(draw(loaded), made)
