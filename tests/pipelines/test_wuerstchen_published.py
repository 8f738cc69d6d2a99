"""Published Würstchen repositories open again and give diffusers' own pictures.

Folders are made as the hub has them: diffusers' deprecated classes, small, saved by themselves; indexes and
text encoders as of 2023.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    DiffusionPipeline,
    StableCascadeDecoderPipeline,
    StableCascadeUNet,
)
from diffusers.pipelines.deprecated import wuerstchen as theirs
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import shoestring
from shoestring.errors import CheckpointError, RecipeError, UserError
from shoestring.models import wuerstchen_decoder, wuerstchen_prior, wuerstchen_vqgan
from shoestring.pipelines.wuerstchen import WuerstchenCombinedPipeline
from shoestring.pipelines.wuerstchen_decoder import WuerstchenDecoderPipeline
from shoestring.pipelines.wuerstchen_prior import WuerstchenPriorPipeline
from shoestring.pipelines.wuerstchen_published import load_vqgan

LETTERS = "!abcdefghijklmnopqrstuvwxyz'."
LIMIT = 12
PROMPT = "a red fox."


def randomly(network: nn.Module, seed: int = 0) -> Any:
    """Random numbers in every tensor; signals keep their size. diffusers' own start would be far off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.ndim in (2, 4) and len(tensor) > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.1, generator=generator)
    return network.eval()


def tokenizer() -> CLIPTokenizer:
    """CLIP's own, with a vocabulary of letters."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LIMIT)


def text_encoder(kind: Any, width: int, **config: Any) -> Any:
    words = tokenizer()
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    return randomly(
        kind(CLIPTextConfig(vocab_size=len(words), max_position_embeddings=LIMIT, **sizes, **marks, **config))
    )


def gently(network: Any, last: nn.Conv2d, bias: float = 0.0) -> Any:
    """The network with small outputs: a denoiser that does not amplify rounding, pictures around grey."""
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.fill_(bias)
    return network


def make_prior() -> Any:
    prior = randomly(WuerstchenPrior(c_in=4, c=16, c_cond=16, c_r=8, depth=2, nhead=2))
    return gently(prior, prior.out[1])


def make_decoder() -> Any:
    decoder = randomly(
        WuerstchenDiffNeXt(
            c_r=8,
            c_cond=16,
            c_hidden=[8, 16],
            nhead=[-1, 2],
            blocks=[1, 2],
            level_config=["CT", "CTA"],
            inject_effnet=[False, True],
            effnet_embd=4,
            clip_embd=12,
        )
    )
    return gently(decoder, decoder.clf[1])


def make_vqgan() -> Any:
    vqgan = randomly(theirs.PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=16))
    return gently(vqgan, vqgan.out_block[0], bias=0.5)


def make_pipelines() -> tuple[Any, Any]:
    """diffusers' pipelines of Stage B and A, and of Stage C, in memory."""
    decoder = theirs.WuerstchenDecoderPipeline(
        tokenizer(), text_encoder(CLIPTextModel, 12), make_decoder(), DDPMWuerstchenScheduler(), make_vqgan()
    )
    prior = theirs.WuerstchenPriorPipeline(
        tokenizer(), text_encoder(CLIPTextModel, 16), make_prior(), DDPMWuerstchenScheduler()
    )
    for pipeline in (decoder, prior):
        pipeline.set_progress_bar_config(disable=True)
    return decoder, prior


def as_published(folder: Path) -> None:
    """Turn what diffusers saves today into what the hub has: library names, CLIP's prefix, the version."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index["_diffusers_version"] = "0.21.0.dev0"
    for part, class_name in (
        ("decoder", "WuerstchenDiffNeXt"),
        ("vqgan", "PaellaVQModel"),
        ("prior", "WuerstchenPrior"),
    ):
        if index.get(part, ["", ""])[1] == class_name:
            index[part] = ["wuerstchen", class_name]
    index["tokenizer"] = ["transformers", "CLIPTokenizerFast"]
    path.write_text(json.dumps(index))
    weights = folder / "text_encoder/model.safetensors"
    state = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(weights).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(LIMIT)[None]
    if "Projection" not in index["text_encoder"][1]:
        save_file(state, weights, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder with copies `wuerstchen` and `wuerstchen-prior`, and diffusers' pipelines of the same."""
    root = tmp_path_factory.mktemp("world")
    decoder, prior = make_pipelines()
    for name, pipeline in (("wuerstchen", decoder), ("wuerstchen-prior", prior)):
        pipeline.save_pretrained(root / name)
        as_published(root / name)
    return root, decoder, prior


@pytest.fixture
def here(world: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder to change, as the current one."""
    shutil.copytree(world[0], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


SIZE = {"height": 128, "width": 256}


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embeddings(prior: Any) -> np.ndarray[Any, Any]:
    made = quiet(prior)(
        PROMPT, **SIZE, num_inference_steps=2, guidance_scale=3.0, negative_prompt="bad", generator=seeded()
    )
    return np.asarray(made.image_embeddings)


def pictures(decoder: Any, codes: torch.Tensor) -> np.ndarray[Any, Any]:
    made = quiet(decoder)(codes, PROMPT, num_inference_steps=2, generator=seeded(), output_type="np")
    return np.asarray(made.images)


def whole(decoder: Any, prior: Any) -> np.ndarray[Any, Any]:
    """A picture by diffusers' two pipelines, one after the other, with one generator."""
    generator = seeded()
    codes = prior(
        PROMPT, **SIZE, num_inference_steps=2, guidance_scale=3.0, generator=generator
    ).image_embeddings
    return np.asarray(
        decoder(codes, PROMPT, num_inference_steps=2, generator=generator, output_type="np").images
    )


def by_cascade(pipeline: Any) -> np.ndarray[Any, Any]:
    made = quiet(pipeline)(
        PROMPT,
        **SIZE,
        prior_num_inference_steps=2,
        prior_guidance_scale=3.0,
        num_inference_steps=2,
        generator=seeded(),
        output_type="np",
    )
    return np.asarray(made.images)


# --- they open -------------------------------------------------------------------------------------------


def test_diffusers_itself_opens_neither_copy(here: Path) -> None:
    """Why this exists; the day it fails, diffusers has mended its loading."""
    for name in ("wuerstchen", "wuerstchen-prior"):
        with pytest.raises(ValueError, match="wuerstchen is not one of the libraries"):
            DiffusionPipeline.from_pretrained(name)


def test_a_copy_with_its_prior_beside_it_draws_diffusers_picture(world: Any, here: Path) -> None:
    _, decoder, prior = world
    pipeline = shoestring.load("wuerstchen")
    assert type(pipeline) is WuerstchenCombinedPipeline
    assert {type(pipeline.decoder), type(pipeline.vqgan), type(pipeline.prior_prior)} == {
        wuerstchen_decoder.WuerstchenDiffNeXt,
        wuerstchen_vqgan.PaellaVQModel,
        wuerstchen_prior.WuerstchenPrior,
    }
    expected = whole(decoder, prior)
    assert expected.std() > 0.05
    np.testing.assert_allclose(by_cascade(pipeline), expected, atol=2e-5)


def test_the_prior_alone_gives_diffusers_embeddings(world: Any, here: Path) -> None:
    pipeline = shoestring.load("wuerstchen-prior")
    assert type(pipeline) is WuerstchenPriorPipeline
    expected = embeddings(world[2])
    assert expected.shape == (1, 4, 3, 6)
    np.testing.assert_allclose(embeddings(pipeline), expected, atol=1e-5 * np.abs(expected).max())


def test_the_decoder_alone_draws_diffusers_picture(world: Any, here: Path) -> None:
    pipeline = shoestring.load("wuerstchen", prior=None)
    assert type(pipeline) is WuerstchenDecoderPipeline
    codes = torch.randn(1, 4, 3, 6, generator=seeded())
    np.testing.assert_allclose(pictures(pipeline, codes), pictures(world[1], codes), atol=2e-5)


def test_what_diffusers_saves_today_opens_too(world: Any, tmp_path: Path) -> None:
    """It writes ["diffusers", "WuerstchenPrior"], which it cannot load; the combined pipeline among them."""
    _, decoder, prior = world
    names = {f"prior_{name}": part for name, part in prior.components.items()}
    combined = theirs.WuerstchenCombinedPipeline(**decoder.components, **names)
    for name, pipeline in (("combined", combined), ("prior", prior), ("decoder", decoder)):
        pipeline.save_pretrained(tmp_path / name)
    index = json.loads((tmp_path / "combined/model_index.json").read_text())
    assert index["prior_prior"] == ["diffusers", "WuerstchenPrior"]
    expected = whole(decoder, prior)
    np.testing.assert_allclose(by_cascade(shoestring.load(tmp_path / "combined")), expected, atol=2e-5)
    joined = shoestring.load(tmp_path / "decoder", prior=tmp_path / "prior")
    np.testing.assert_allclose(by_cascade(joined), expected, atol=2e-5)


def test_a_hub_id_finds_both_repositories(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cache as the hub's client leaves it; nothing is downloaded."""
    for name in ("wuerstchen", "wuerstchen-prior"):
        folder = here / f"hub/models--warp-ai--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("0" * 40)
        shutil.copytree(name, folder / "snapshots" / ("0" * 40))
        shutil.rmtree(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    pipeline = shoestring.load("warp-ai/wuerstchen")
    assert type(pipeline) is WuerstchenCombinedPipeline
    assert pipeline.config._name_or_path == "warp-ai/wuerstchen"


# --- where the prior comes from --------------------------------------------------------------------------


def test_the_model_card_names_the_prior_where_none_lies_beside(here: Path) -> None:
    Path("wuerstchen-prior").rename("elsewhere")
    Path("wuerstchen/README.md").write_text(
        f"---\nlicense: mit\nprior:\n- {here / 'elsewhere'}\n---\n# Text\n"
    )
    assert type(shoestring.load("wuerstchen")) is WuerstchenCombinedPipeline


@pytest.mark.parametrize("kind", ["folder", "pipeline", "ours"])
def test_a_prior_can_be_given(kind: str, here: Path) -> None:
    """A published folder, a pipeline in memory, one that we saved: the next stage of a fine-tuning."""
    Path("wuerstchen-prior").rename("elsewhere")
    prior: Any = "elsewhere"
    if kind != "folder":
        prior = shoestring.load("elsewhere")
        with torch.no_grad():
            prior.prior.projection.bias.add_(1)
    if kind == "ours":
        prior.save_pretrained("tuned")
        prior = "tuned"
    pipeline = shoestring.load("wuerstchen", prior=prior)
    stored = load_file("elsewhere/prior/diffusion_pytorch_model.safetensors")["projection.bias"]
    assert torch.equal(pipeline.prior_prior.projection.bias, stored + (kind != "folder"))


def test_settings_of_a_prior_of_ours_come_along_but_not_its_classs_defaults(here: Path) -> None:
    prior = shoestring.load("wuerstchen-prior")
    assert shoestring.load("wuerstchen", prior=prior).config.default_guidance == 4.0
    tuned = WuerstchenPriorPipeline(
        **{name: part for name, part in prior.components.items() if name != "previewer"},
        latents_mean=0.5,
        latents_std=2.0,
        default_guidance=6.0,
    )
    config = shoestring.load("wuerstchen", prior=tuned).config
    assert (config.latents_mean, config.latents_std, config.default_guidance) == (0.5, 2.0, 6.0)


# --- keywords --------------------------------------------------------------------------------------------


def test_the_number_type_is_float32_unless_asked_for(here: Path) -> None:
    def types(**words: Any) -> set[torch.dtype]:
        parts = shoestring.load("wuerstchen", **words).components.values()
        return {part.dtype for part in parts if isinstance(part, nn.Module)}

    assert types() == {torch.float32}
    assert types(dtype=torch.bfloat16) == {torch.bfloat16}
    assert types(torch_dtype=torch.float16) == {torch.float16}


def test_a_variants_files_are_read_when_asked_for(here: Path) -> None:
    plain = by_cascade(shoestring.load("wuerstchen"))
    for name in ("wuerstchen", "wuerstchen-prior"):
        as_variant(name, "fp16")
    np.testing.assert_array_equal(by_cascade(shoestring.load("wuerstchen", variant="fp16")), plain)


def test_parts_can_be_replaced_and_text_left_out_of_stage_b(here: Path) -> None:
    """The base and fine-tuned priors are published as bare networks: they go into the usual pipeline."""
    other = wuerstchen_prior.WuerstchenPrior.from_pretrained("wuerstchen-prior", subfolder="prior")
    pipeline = shoestring.load("wuerstchen", prior_prior=other, text_encoder=None, tokenizer=None)
    assert pipeline.prior_prior is other
    assert pipeline.text_encoder is None
    assert by_cascade(pipeline).shape == (1, 128, 256, 3)


# --- Stable Cascade --------------------------------------------------------------------------------------


@pytest.fixture
def cascade(tmp_path: Path) -> Any:
    """diffusers' pipeline of Stable Cascade's Stage B with Stage A, and a copy as the hub has it."""
    unet = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        patch_size=2,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(0, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        clip_text_pooled_in_channels=12,
        effnet_in_channels=4,
        pixel_mapper_in_channels=3,
        dropout=(0.1, 0.1),
        timestep_conditioning_type=("sca",),
    )
    text = text_encoder(CLIPTextModelWithProjection, 12, projection_dim=12)
    pipeline = StableCascadeDecoderPipeline(
        randomly(unet), tokenizer(), text, DDPMWuerstchenScheduler(), make_vqgan()
    )
    pipeline.save_pretrained(tmp_path / "stable-cascade")
    as_published(tmp_path / "stable-cascade")
    return quiet(pipeline)


def test_stable_cascade_opens_with_our_stage_a_and_draws_diffusers_picture(
    cascade: Any, tmp_path: Path
) -> None:
    pipeline = shoestring.load(tmp_path / "stable-cascade")
    assert type(pipeline) is StableCascadeDecoderPipeline
    assert type(pipeline.vqgan) is wuerstchen_vqgan.PaellaVQModel
    codes = torch.randn(1, 4, 3, 3, generator=seeded())
    np.testing.assert_allclose(pictures(pipeline, codes), pictures(cascade, codes), atol=2e-5)


@pytest.mark.parametrize(
    "place", ["stable-cascade", "stable-cascade/vqgan", "stage_a.pt", "stage_a.safetensors"]
)
@torch.no_grad()
def test_stage_a_is_read_from_every_place_that_holds_it(place: str, cascade: Any, tmp_path: Path) -> None:
    state = dict(cascade.vqgan.state_dict())
    state["vquantizer.codebook.weight"] = state.pop("vquantizer.embedding.weight")
    torch.save({"state_dict": state, "iter": 500_000}, tmp_path / "stage_a.pt")
    save_file(state, tmp_path / "stage_a.safetensors")
    vqgan = load_vqgan(tmp_path / place)
    x = torch.rand(1, 3, 16, 24, generator=seeded())
    torch.testing.assert_close(vqgan.encode(x).latents, cascade.vqgan.encode(x).latents, atol=1e-5, rtol=1e-5)
    assert vqgan.config.scale_factor == 0.3764
    assert not vqgan.training


# --- mistakes --------------------------------------------------------------------------------------------


def edit(path: str, **changes: Any) -> Callable[[], None]:
    def change() -> None:
        content = json.loads(Path(path).read_text())
        Path(path).write_text(json.dumps(content | changes))

    return change


def drop(path: str, name: str) -> Callable[[], None]:
    def change() -> None:
        state = load_file(path)
        del state[name]
        save_file(state, path, metadata={"format": "pt"})

    return change


def cut(path: str) -> Callable[[], None]:
    def change() -> None:
        Path(path).write_bytes(Path(path).read_bytes()[:-100])

    return change


def as_variant(folder: str, variant: str) -> None:
    """Give every file of weights in a repository the name of a variant."""
    for file in Path(folder).glob("*/*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))


def pickled() -> None:
    torch.save({}, "wuerstchen/decoder/diffusion_pytorch_model.bin")
    Path("wuerstchen/decoder/diffusion_pytorch_model.safetensors").unlink()


def swapped() -> None:
    shutil.rmtree("wuerstchen/decoder")
    shutil.copytree("wuerstchen-prior/prior", "wuerstchen/decoder")


def other_codes() -> None:
    WuerstchenPrior(c_in=6, c=16, c_cond=16, c_r=8, depth=1, nhead=2).save_pretrained(
        "wuerstchen-prior/prior"
    )


@pytest.mark.parametrize(
    ("change", "words", "told"),
    [
        (
            lambda: shutil.rmtree("wuerstchen-prior"),
            {},
            "wuerstchen: holds Stage B and A; there is no Stage C. Download warp-ai/wuerstchen-prior to wu",
        ),
        (
            lambda: Path("wuerstchen-prior/model_index.json").unlink(),
            {},
            "wuerstchen: holds Stage B and A; there is no Stage C. Download warp-ai/wuerstchen-prior to wu",
        ),
        (
            cut("wuerstchen/text_encoder/model.safetensors"),
            {},
            "wuerstchen: its text_encoder is missing or damaged (Error while deserializing header",
        ),
        (
            lambda: Path("wuerstchen/decoder/config.json").write_text("[]"),
            {},
            "wuerstchen: its decoder is missing or damaged (",
        ),
        (
            edit("wuerstchen/decoder/config.json", nhead=[-1, 3]),
            {},
            "wuerstchen: its decoder is missing or damaged (Attention of width 16 cannot have 3 heads",
        ),
        (
            lambda: Path("wuerstchen/tokenizer/tokenizer.json").unlink(),
            {},
            "wuerstchen: its tokenizer is missing or damaged (no vocabulary)",
        ),
        (
            lambda: as_variant("wuerstchen", "fp16"),
            {},
            "wuerstchen: its decoder is there as fp16 alone. Give load(..., variant='fp16').",
        ),
        (
            lambda: None,
            {"variant": "fp16"},
            "wuerstchen: has no files of the variant 'fp16'. Leave it out.",
        ),
        (lambda: None, {"prior": "nowhere"}, "nowhere: neither a folder here nor a hub repository"),
        (
            lambda: None,
            {"prior": "wuerstchen"},
            "prior wuerstchen: is a WuerstchenDecoderPipeline. Give a Wuer",
        ),
        (
            edit("wuerstchen-prior/model_index.json", _class_name="StableCascadePriorPipeline"),
            {},
            "-prior: is a StableCascadePriorPipeline (Würstchen v3), whose codes v2's Stage B does not know.",
        ),
        (swapped, {}, "wuerstchen: its decoder is a WuerstchenPrior, where a WuerstchenDiffNeXt belongs."),
        (other_codes, {}, "wuerstchen: prior_prior makes codes of 6 channels, decoder takes 4"),
        (
            lambda: shutil.copytree(
                "wuerstchen-prior/text_encoder", "wuerstchen/text_encoder", dirs_exist_ok=True
            ),
            {},
            "wuerstchen: the text_encoder makes tokens 16 wide, the decoder takes 12. They are not",
        ),
        (
            lambda: shutil.rmtree("wuerstchen/vqgan"),
            {},
            "wuerstchen: has no vqgan/. Download the whole repository.",
        ),
        (pickled, {}, "wuerstchen: its decoder is missing or damaged ("),
        (
            drop("wuerstchen/decoder/diffusion_pytorch_model.safetensors", "clf.1.bias"),
            {},
            "wuerstchen: its decoder is missing or damaged (",
        ),
        (
            drop("wuerstchen/text_encoder/model.safetensors", "text_model.final_layer_norm.bias"),
            {},
            "wuerstchen: its text_encoder is missing or damaged (",
        ),
        (
            edit("wuerstchen/model_index.json", decoder=["wuerstchen", "Paella"]),
            {},
            "wuerstchen: its decoder is a Paella, which is not known here.",
        ),
        (
            edit("wuerstchen/model_index.json", _class_name="WuerstchenGeneratorPipeline"),
            {},
            "wuerstchen: its index names WuerstchenGeneratorPipeline. Known: WuerstchenPriorPipeline, ",
        ),
        (
            lambda: None,
            {"device_map": "auto"},
            "device_map: no keyword for a published Würstchen. Use prior, dtype",
        ),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(
    change: Callable[[], None], words: dict[str, Any], told: str, here: Path
) -> None:
    change()
    with pytest.raises(UserError) as error:
        shoestring.load("wuerstchen", **words)
    message = str(error.value)
    assert told in message, message
    assert "\n" not in message


def test_a_prior_is_refused_where_it_would_do_nothing_or_is_none(here: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^prior: has no effect, since wuerstchen-prior is a WuerstchenPrior"
    ):
        shoestring.load("wuerstchen-prior", prior="wuerstchen-prior")
    prior = shoestring.load("wuerstchen-prior")
    with pytest.raises(RecipeError, match=r"^prior_tokenizer: has no effect on a loaded prior"):
        shoestring.load("wuerstchen", prior=prior, prior_tokenizer=None)
    with pytest.raises(CheckpointError, match=r"^prior given: is a WuerstchenDecoderPipeline\. Give a Wuer"):
        shoestring.load("wuerstchen", prior=shoestring.load("wuerstchen", prior=None))


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("wuerstchen-prior", r"^wuerstchen-prior: no Stage A there \("),
        ("wuerstchen/decoder", r"^wuerstchen/decoder: no Stage A there \(it holds a WuerstchenDiffNeXt\)"),
        ("unnamed", r"^unnamed: no Stage A there \(its config.json names no class\)"),
        (
            "prior.pt",
            r"^prior\.pt: holds Stage C \(prior\), where Stage A \(VQGAN\) is wanted: vqgan_f4_v1_500k",
        ),
        ("other.pt", r"^other\.pt: holds no stage of Würstchen, where Stage A"),
        ("none.pt", r"^none\.pt: no such file"),
    ],
)
def test_a_place_without_stage_a_is_told_with_what_it_holds(place: str, told: str, here: Path) -> None:
    torch.save({"state_dict": make_prior().state_dict()}, "prior.pt")
    torch.save({"weight": torch.zeros(2)}, "other.pt")
    for folder in ("unnamed", "unnamed/vqgan"):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=told):
        load_vqgan(place)
