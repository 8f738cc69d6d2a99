"""SDXL's pair of text encoders against `encode_prompt` of the stock pipeline that it was saved with."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from shoestring.errors import RecipeError
from shoestring.models.autoencoders import load_autoencoder
from shoestring.models.sdxl_text import SdxlTextPair, SdxlTokenizerPair
from shoestring.models.text_encoders import TextEncoder, load_text_encoder, null_caption

SHORT, LONG = "a red cat, red noise!", "noise of a very long caption " * 20
CAPTIONS = [SHORT, LONG, "", "!", "red"]
COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def stock(sdxl_folder: Path) -> StableDiffusionXLPipeline:
    """The pipeline as diffusers alone opens it."""
    return StableDiffusionXLPipeline.from_pretrained(sdxl_folder)


@pytest.fixture(scope="module")
def pair(sdxl_folder: Path) -> TextEncoder:
    return load_text_encoder(str(sdxl_folder), pad="encoder")


@pytest.fixture
def copied(sdxl_folder: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(sdxl_folder, tmp_path / "sdxl")
    return tmp_path / "sdxl"


@pytest.fixture
def cached(sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """`cached("owner/name", "v1")`: the pipeline in the hub's cache under this name and revision, offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name: str, revision: str) -> Path:
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(sdxl_folder, folder / "snapshots" / COMMIT)
        (folder / "refs").mkdir()
        (folder / "refs" / revision).write_text(COMMIT)
        return folder

    return put


def prompted(pipeline: StableDiffusionXLPipeline, caption: str) -> tuple[Tensor, Tensor]:
    """Tokens (77, C) and pooled (P,) of diffusers' own function."""
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
    return tokens[0], pooled[0]


# --- what it gives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_caption_is_bit_for_bit_what_stock_sdxl_makes_of_it(
    caption: str, pair: TextEncoder, stock: StableDiffusionXLPipeline
) -> None:
    """Both second-last layers side by side, the second's projection; cut at 77, padded with two marks."""
    encoded = pair.encode([caption])
    tokens, pooled = prompted(stock, caption)
    assert encoded.pooled is not None
    assert torch.equal(encoded.tokens[0], tokens)
    assert torch.equal(encoded.pooled[0], pooled)
    assert (tokens.shape, pooled.shape) == ((77, 16 + 24), (20,))


def test_many_captions_at_once_come_in_their_order(
    pair: TextEncoder, stock: StableDiffusionXLPipeline
) -> None:
    captions = [f"{'red ' * (7 * number % 30)}noise {number}" for number in range(70)] + CAPTIONS
    encoded = pair.encode(captions)
    assert encoded.pooled is not None
    for place in (0, 33, 69, *range(70, 75)):
        tokens, pooled = prompted(stock, captions[place])
        torch.testing.assert_close(encoded.tokens[place], tokens, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(encoded.pooled[place], pooled, atol=1e-5, rtol=1e-4)


def test_each_tokenizer_pads_with_its_own_mark(pair: TextEncoder, stock: StableDiffusionXLPipeline) -> None:
    ids, ids_2 = pair.tokenizer.ids(["red"], 77)
    end = len(stock.tokenizer) - 1
    assert ids[0, 3:].tolist() == [end] * 74
    assert ids_2[0, 3:].tolist() == [0] * 74
    assert torch.equal(ids[0, :3], ids_2[0, :3])


def test_the_null_caption_is_what_stock_sdxl_guides_against_for_an_empty_negative_prompt(
    pair: TextEncoder, stock: StableDiffusionXLPipeline
) -> None:
    with torch.no_grad():
        _, tokens, _, pooled = stock.encode_prompt(SHORT, negative_prompt="")
    null = null_caption(pair)
    assert null.pooled is not None
    assert torch.equal(null.tokens[0], tokens[0])
    assert torch.equal(null.pooled, pooled)


def test_the_pair_says_of_itself_what_other_text_encoders_do(pair: TextEncoder) -> None:
    assert (pair.width, pair.max_tokens, pair.pad, pair.padded) == (40, 77, "encoder", True)
    assert isinstance(pair.model, SdxlTextPair)
    assert not any(parameter.requires_grad for parameter in pair.model.parameters())
    assert not pair.model.training
    lengths = pair.lengths(CAPTIONS)
    assert lengths[2:] == [2, 3, 3]
    assert pair.encode(CAPTIONS).cut == [max(0, length - 77) for length in lengths]
    assert pair.lengths([]) == []
    (line,) = pair.warnings(CAPTIONS)
    assert f"the last {lengths[1] - 77} of its tokens are ignored (it takes 77): noise of" in line
    nothing = pair.encode([])
    assert (nothing.tokens, nothing.cut) == ([], [])


def test_identity_covers_both_networks_and_both_tokenizers(
    pair: TextEncoder, stock: StableDiffusionXLPipeline
) -> None:
    def identity(first: Any = stock.tokenizer, second: Any = stock.tokenizer_2) -> dict[str, Any]:
        networks = SdxlTextPair(stock.text_encoder, stock.text_encoder_2)
        return TextEncoder(networks, SdxlTokenizerPair(first, second), pad="encoder").identity()

    pair.encode(CAPTIONS)  # leaves nothing behind
    was = identity()
    assert pair.identity() == was | {"id": pair.name}
    assert (was["class"], was["width"], was["max_tokens"], was["pad"]) == ("SdxlTextPair", 40, 77, "encoder")
    another = copy.deepcopy(stock.tokenizer)
    another.add_tokens(["new"])
    tokenizers = [identity(another), identity(second=another), identity(second=stock.tokenizer)]
    assert (
        len({was["tokenizer"], *(each["tokenizer"] for each in tokenizers)}) == 4
    )  # the last: other padding
    for network in (stock.text_encoder, stock.text_encoder_2):
        for turned in (True, False):
            with torch.no_grad():
                next(iter(network.parameters())).neg_()
            assert (identity()["weights"] != was["weights"]) == turned


def test_networks_at_hand_make_the_same_pair(pair: TextEncoder, stock: StableDiffusionXLPipeline) -> None:
    """As a pipeline does that holds them as components."""
    tokenizers = SdxlTokenizerPair(stock.tokenizer, stock.tokenizer_2)
    ours = TextEncoder(SdxlTextPair(stock.text_encoder, stock.text_encoder_2), tokenizers, pad="encoder")
    assert torch.equal(ours.encode([SHORT]).tokens[0], pair.encode([SHORT]).tokens[0])
    assert ours.identity() == pair.identity() | {"id": "SdxlTextPair"}


# --- where it is found -----------------------------------------------------------------------------------


def test_half_precision_files_are_taken_where_there_are_no_others(copied: Path, tmp_path: Path) -> None:
    """Text encoders and VAE, in float32 from then on: as the same numbers in files of the plain name give."""
    half = StableDiffusionXLPipeline.from_pretrained(copied, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / "fp16", variant="fp16")
    half.save_pretrained(tmp_path / "plain")
    assert sorted(path.name for path in (tmp_path / "fp16").rglob("*.safetensors")) == [
        *["diffusion_pytorch_model.fp16.safetensors"] * 2,
        *["model.fp16.safetensors"] * 2,
    ]
    ours, plain = (load_text_encoder(str(tmp_path / name), pad="encoder") for name in ("fp16", "plain"))
    assert torch.equal(ours.encode([SHORT]).tokens[0], plain.encode([SHORT]).tokens[0])
    assert {each.dtype for each in ours.model.parameters()} == {torch.float32}
    vae, expected = (load_autoencoder(str(tmp_path / name)) for name in ("fp16", "plain"))
    assert {each.dtype for each in vae.parameters()} == {torch.float32}
    assert all(map(torch.equal, vae.parameters(), expected.parameters()))


def test_a_hub_id_with_a_revision_gives_the_pair(
    cached: Callable[[str, str], Path], pair: TextEncoder
) -> None:
    cached("someone/xl", "v1")
    ours = load_text_encoder("someone/xl", pad="encoder", revision="v1")
    assert torch.equal(ours.encode([SHORT]).tokens[0], pair.encode([SHORT]).tokens[0])
    assert ours.identity() == pair.identity() | {"id": "someone/xl", "revision": "v1"}
    assert type(load_autoencoder("someone/xl", revision="v1")).__name__ == "AutoencoderKL"
    with pytest.raises(RecipeError, match="text encoder someone/xl: no text model there"):
        load_text_encoder("someone/xl", pad="encoder", revision="v2")


def test_a_hub_id_of_half_precision_files_alone_gives_the_pair(
    cached: Callable[[str, str], Path], pair: TextEncoder
) -> None:
    folder = cached("someone/half", "main")
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    ours = load_text_encoder("someone/half", pad="encoder")
    assert ours.identity()["weights"] == pair.identity()["weights"]
    assert type(load_autoencoder("someone/half")).__name__ == "AutoencoderKL"


def test_half_a_cached_pipeline_is_not_taken_for_a_whole_other_one(
    cached: Callable[[str, str], Path],
) -> None:
    """Offline, a second encoder that was not fetched is told apart from one that the hub does not have."""
    folder = cached("someone/half", "main")
    shutil.rmtree(folder / "snapshots" / COMMIT / "text_encoder_2")
    with pytest.raises(RecipeError, match=r"someone/half: whether there is a text_encoder_2/ cannot be told"):
        load_text_encoder("someone/half", pad="encoder")
    missing = folder / ".no_exist" / COMMIT / "text_encoder_2"
    missing.mkdir(parents=True)
    (missing / "config.json").touch()
    assert load_text_encoder("someone/half", pad="encoder").width == 16


def test_other_pipelines_of_two_encoders_are_not_taken_for_sdxl(copied: Path) -> None:
    """FLUX's second is a T5; SD3's first has a projection; either way the first is taken alone, as ever."""
    shutil.rmtree(copied / "text_encoder_2")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=200, **sizes)).save_pretrained(copied / "text_encoder_2")
    assert load_text_encoder(str(copied)).width == 16


def test_sd3s_two_projections_are_not_taken_for_sdxl(copied: Path) -> None:
    shutil.rmtree(copied / "text_encoder")
    second = CLIPTextModelWithProjection.from_pretrained(copied / "text_encoder_2")
    second.save_pretrained(copied / "text_encoder")
    assert type(load_text_encoder(str(copied)).model) is CLIPTextModelWithProjection


# --- what cannot be used ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["none", "masked"])
def test_another_padding_is_refused_before_weights_are_read(pad: str, copied: Path) -> None:
    for path in copied.rglob("model.safetensors"):
        path.unlink()
    message = f"pad '{pad}': SDXL attends to all positions of its text, padding included. Use pad 'encoder'."
    with pytest.raises(RecipeError, match=f"^{message}$"):
        load_text_encoder(str(copied), pad=pad)


def test_another_number_of_tokens_is_refused(sdxl_folder: Path) -> None:
    assert load_text_encoder(str(sdxl_folder), pad="encoder", max_tokens=77).max_tokens == 77
    for tokens in (40, 78):
        with pytest.raises(RecipeError, match=f"max_tokens {tokens}: SDXL's text has always 77 positions"):
            load_text_encoder(str(sdxl_folder), pad="encoder", max_tokens=tokens)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("tokenizer_2", "its tokenizer cannot be loaded .*tokenizer_2"),
        ("text_encoder_2/model.safetensors", r"cannot be loaded .*needs model.safetensors \(or model.fp16"),
    ],
)
def test_a_pair_with_a_part_missing_says_what(lost: str, message: str, copied: Path) -> None:
    path = copied / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(RecipeError, match=message):
        load_text_encoder(str(copied), pad="encoder")


def test_a_single_file_says_how_to_make_a_folder_of_it(copied: Path) -> None:
    file = str(copied / "vae" / "diffusion_pytorch_model.safetensors")
    message = r"is a single file\. Make a folder .*from_single_file\(FILE\)\.save_pretrained\(FOLDER\)"
    with pytest.raises(RecipeError, match=f"text encoder .*{message}"):
        load_text_encoder(file, pad="encoder")
    with pytest.raises(RecipeError, match=f"autoencoder .*{message}"):
        load_autoencoder(file)
