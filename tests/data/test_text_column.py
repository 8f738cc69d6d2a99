"""Int8 text: within its error bound of the tokens encoded, half the bytes, and calibrated once for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoestring.data import begun as begun_module
from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.encoders import CaptionEncoder, Encoders, ImageEncoder
from shoestring.data.loader import Loader
from shoestring.data.rows import Row
from shoestring.data.shards import read_shard
from shoestring.data.store import Store
from shoestring.data.text_column import calibrate, combined, error_of, pack, unpack
from shoestring.errors import ShoestringError, StoreError
from shoestring.models.text_encoders import TextEncoder, load_text_encoder
from shoestring.storage import read_json

MakeStore = Callable[..., Store]
MakeRows = Callable[..., list[Row]]
PADDED = 77 * 1024 * 2  # bytes of a caption as published: every position, float16


def profile(name: str, count: int, width: int = 1024) -> torch.Tensor:
    """Tokens with the outliers that text encoders have (every 12th token begins a caption)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(count, width, generator=generator)
    if name == "heavy":  # Student's t with 4 degrees of freedom: normal over the root of a mean square
        squares = torch.randn(4, count, width, generator=generator).square().mean(0)
        tokens = tokens / squares.sqrt()
    elif name == "clip-like":
        tokens[::12] = tokens[0]
        tokens[::12, :8] *= 30
    elif name == "t5-like":
        tokens[:, :4] *= 20
    return tokens


# --- one token -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gauss", "heavy", "clip-like", "t5-like"])
def test_int8_is_within_half_a_step_of_every_value(name: str) -> None:
    """The bound that rounding gives, element by element: half of scale x channel."""
    tokens = profile(name, 480, 256)
    channels = torch.tensor(calibrate(tokens[:120]))
    stored = pack(tokens, channels)
    assert stored["tokens"].dtype == np.int8
    kept = unpack(stored["tokens"], stored["scales"], channels)
    half_step = 0.5 * torch.from_numpy(stored["scales"])[:, None] * channels
    assert ((kept - tokens).abs() <= half_step * 1.0001).all()


@pytest.mark.parametrize(
    ("name", "mean", "largest"),
    [("gauss", 5e-5, 2e-4), ("heavy", 3e-4, 2e-2), ("clip-like", 6e-5, 3e-4), ("t5-like", 6e-5, 5e-4)],
)
def test_cosine_errors_are_those_measured_by_another_formula(name: str, mean: float, largest: float) -> None:
    """With and without the 8 largest channels, on tokens that calibration has not seen."""
    tokens = profile(name, 400)
    channels = torch.tensor(calibrate(tokens[:200]))
    seen = tokens[200:]
    stored = pack(seen, channels)
    error = error_of(seen, stored, channels)
    kept = unpack(stored["tokens"], stored["scales"], channels).double()
    told = torch.nn.functional.cosine_similarity(seen.double(), kept, dim=1)
    assert error["mean"] == pytest.approx(float(1 - told.mean()), rel=1e-2)
    assert error["largest"] == pytest.approx(float(1 - told.min()), rel=1e-2)
    few = seen.square().mean(0).argsort()[:-8]
    rest = torch.nn.functional.cosine_similarity(seen[:, few].double(), kept[:, few], dim=1)
    assert error["without_large"]["mean"] == pytest.approx(float(1 - rest.mean()), rel=1e-2)
    assert error["mean"] < mean
    assert error["without_large"]["mean"] < mean
    assert error["without_large"]["largest"] < largest
    assert error["tokens"] == 200


def test_channel_scales_are_what_spares_the_other_channels() -> None:
    """Without them four large channels cost the others fifty times the error."""
    tokens = profile("t5-like", 400)
    scaled, plain = torch.tensor(calibrate(tokens)), torch.ones(1024)
    errors = [error_of(tokens, pack(tokens, each), each)["without_large"]["mean"] for each in (scaled, plain)]
    assert errors[1] > 50 * errors[0]


def test_zero_tokens_are_exact_and_tiny_or_huge_ones_are_not_lost() -> None:
    tokens = torch.stack([torch.zeros(16), torch.full((16,), 1e-30), torch.full((16,), 3e30)])
    channels = torch.ones(16)
    stored = pack(tokens, channels)
    kept = unpack(stored["tokens"], stored["scales"], channels)
    assert torch.equal(kept[0], tokens[0])
    torch.testing.assert_close(kept, tokens, rtol=1e-6, atol=0)
    assert error_of(tokens[:1], {name: each[:1] for name, each in stored.items()}, channels)["tokens"] == 0


def test_a_channel_silent_in_calibration_may_speak_later() -> None:
    """It costs the others no more than it would at a hundredth of their size."""
    tokens = profile("gauss", 200, 64)
    silent = tokens.clone()
    silent[:, 3] = 0
    channels = torch.tensor(calibrate(silent))
    assert channels[3] == pytest.approx(0.01 * float(channels.mean()), rel=0.05)
    assert calibrate(torch.zeros(5, 3)) == [1.0] * 3
    assert calibrate(torch.zeros(0, 2)) == [1.0] * 2


@pytest.mark.parametrize("channels", [None, torch.ones(2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(channels: torch.Tensor | None, value: float) -> None:
    with pytest.raises(OverflowError):
        pack(torch.tensor([[1.0, value]]), channels)


def test_float16_alone_has_a_range() -> None:
    tokens = torch.tensor([[1.0, 1e6]])
    with pytest.raises(OverflowError, match="float16's range"):
        pack(tokens, None)
    stored = pack(tokens, torch.tensor([1.0, 1e6]))
    assert stored["tokens"].tolist() == [[127, 127]]


def test_errors_of_parts_combine_to_the_errors_of_the_whole() -> None:
    tokens = profile("gauss", 300, 64)
    stored = pack(tokens, None)
    parts = [
        error_of(tokens[a:b], {"tokens": stored["tokens"][a:b]}, None) for a, b in ((0, 100), (100, 300))
    ]
    whole, told = error_of(tokens, stored, None), combined(parts)
    assert told["tokens"] == whole["tokens"] == 300
    assert told["mean"] == pytest.approx(whole["mean"], rel=0.02)
    assert told["largest"] == whole["largest"]
    assert combined([])["tokens"] == 0


# --- a store ---------------------------------------------------------------------------------------------


def test_an_int8_store_gives_the_encoders_tokens(
    make_store: MakeStore, rows: MakeRows, clip_folder: Path
) -> None:
    """Against the encoder itself: every caption of every row, alone and padded, and through the loader."""
    given = rows(23)
    store = make_store(given, text_encoder=str(clip_folder), text_dtype="int8")
    encoder = load_text_encoder(str(clip_folder))
    channels = torch.tensor(store.manifest["text_channels"])
    every, choice = np.arange(23), np.linspace(0, 0.99, 23)
    captions = store.chosen_captions(every, choice)
    exact = encoder.encode(captions)
    for ours, theirs in zip(store.text(every, choice), exact.tokens, strict=True):
        step = (theirs / channels).abs().amax(1, keepdim=True) / 127 * channels
        assert ((ours - theirs).abs() <= 0.5001 * step).all()
    text, mask = store.padded_text(every, choice)
    for row, tokens in enumerate(store.text(every, choice)):
        assert torch.equal(text[row][mask[row]], tokens)
        assert not text[row][~mask[row]].any()
    assert exact.pooled is not None
    torch.testing.assert_close(store.pooled(every, choice), exact.pooled, atol=2e-3, rtol=2e-3)
    batch = Loader(store, size=16, batch_size=8, seed=0).batch(0, 8)
    assert batch.text.dtype == torch.float32
    assert batch.text_mask is not None
    assert read_shard(store.path / "columns/text/00000.safetensors")["tokens"].dtype == np.int8


def test_padding_by_the_encoder_is_stored_as_int8_as_well(
    make_store: MakeStore, rows: MakeRows, clip_folder: Path
) -> None:
    store = make_store(rows(4), text_encoder=str(clip_folder), text_dtype="int8", pad="encoder")
    exact = load_text_encoder(str(clip_folder), pad="encoder").encode(store.chosen_captions(np.arange(4)))
    text, mask = store.padded_text(np.arange(4))
    assert mask.all()
    assert text.shape == (4, 8, 16)
    error = 1 - torch.nn.functional.cosine_similarity(text, torch.stack(exact.tokens), dim=-1)
    assert error.max() < 1e-3
    assert Loader(store, size=16, batch_size=4, seed=0).batch(0, 4).text_mask is None


def test_the_manifest_tells_tokens_and_error(make_store: MakeStore, rows: MakeRows) -> None:
    """Unique captions of each chunk and their tokens, counted by hand from what lies on disk."""
    for dtype, least, most in (("float16", 1e-9, 1e-6), ("int8", 1e-6, 1e-4)):
        store = make_store(rows(25), name=dtype, text_dtype=dtype)
        figures = store.manifest["text_measured"]
        shards = [read_shard(path) for path in sorted((store.path / "columns/text").iterdir())]
        assert figures["captions"] == sum(len(shard["offsets"]) - 1 for shard in shards)
        assert figures["tokens"] == sum(len(shard["tokens"]) for shard in shards) > 150
        assert least < figures["error"]["mean"] < most
        assert figures["error"]["mean"] <= figures["error"]["largest"] < 1e-3


@pytest.mark.parametrize(("tokens", "float16", "int8"), [(12, 1 / 6, 1 / 12), (74, 1.0, 1 / 2)])
@pytest.mark.parametrize("model", ["clip", "t5"])
def test_bytes_and_error_beside_published_padding(
    model: str, tokens: int, float16: float, int8: float, rows: MakeRows, list_source: Any, tmp_path: Path
) -> None:
    """Real text models of width 1024, short and long captions: everything that text takes in a store."""
    folder, marks = wide_model(model, tmp_path / model)
    draw = np.random.default_rng(0)
    captions = [" ".join(f"w{word}" for word in draw.integers(0, 300, tokens - marks)) for _ in range(16)]
    given = [Row(row.key, row.image, (text,)) for row, text in zip(rows(16), captions, strict=True)]
    for dtype, share, error in (("float16", float16, 1e-7), ("int8", int8, 1e-3)):
        settings = EncodeSettings(sizes=(16,), text_encoder=str(folder), text_dtype=dtype)
        store = encode(list_source(given), tmp_path / dtype, settings, log=lambda line: None)
        assert store is not None
        kept = store.text(np.arange(16))
        assert {len(each) for each in kept} == {tokens}
        table = 16 + 8 / 16  # which captions a row has: an offset and a number
        pooled = 2048 if model == "clip" else 0  # CLIP's single vector, the same in every form
        assert store.bytes_by_column()["text"] / 16 - pooled + table < share * PADDED
        exact = torch.cat(load_text_encoder(str(folder)).encode(captions).tokens).double()
        few = exact.square().mean(0).argsort()[:-8]
        for channels in (slice(None), few):
            one, other = exact[:, channels], torch.cat(kept).double()[:, channels]
            assert (1 - torch.nn.functional.cosine_similarity(one, other, dim=1)).max() < error


def wide_model(name: str, folder: Path) -> tuple[Path, int]:
    """One layer of CLIP or T5 with random weights, width 1024, 77 tokens; marks around a caption."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = ["<pad>", "<s>", "<unk>", *(f"w{number}" for number in range(300)), "</s>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<s>", 1), ("</s>", len(words) - 1)] if name == "clip" else [("</s>", len(words) - 1)]
    single = "<s> $A </s>" if name == "clip" else "$A </s>"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=77, **named).save_pretrained(folder)
    if name == "clip":
        sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 16}
        ends = {"eos_token_id": len(words) - 1, "bos_token_id": 1, "pad_token_id": 0}
        CLIPTextModel(
            CLIPTextConfig(vocab_size=len(words), num_hidden_layers=1, **sizes, **ends)
        ).save_pretrained(folder)
    else:
        sizes = {"d_model": 1024, "d_ff": 1024, "num_heads": 16, "d_kv": 64}
        T5EncoderModel(T5Config(vocab_size=len(words), num_layers=1, **sizes)).save_pretrained(folder)
    return folder, len(marks)


class Broken(torch.nn.Module):
    """A text model whose tokens are not numbers, or too large."""

    width, max_tokens = 4, 8

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(value))

    def forward(self, captions: list[str]) -> tuple[list[torch.Tensor], list[int]]:
        return [torch.ones(2, 4) * self.value for _ in captions], [0] * len(captions)


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e6), ("int8", float("nan"))])
def test_tokens_that_cannot_be_stored_are_an_error(
    dtype: str, value: float, rows: MakeRows, list_source: Any, tmp_path: Path
) -> None:
    text = CaptionEncoder(TextEncoder(Broken(value)), dtype)
    encoders = Encoders(ImageEncoder.load("pixels"), text)
    settings = EncodeSettings(sizes=(16,), text_dtype=dtype)
    with pytest.raises(ShoestringError, match="text encoder hashing: gave tokens"):
        encode(list_source(rows(3)), tmp_path / "s", settings, encoders=encoders)


def test_an_unknown_form_is_refused(rows: MakeRows, list_source: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"text_dtype 'int4': unknown\. Use one of float16, int8"):
        encode(list_source(rows(3)), tmp_path / "s", EncodeSettings(sizes=(16,), text_dtype="int4"))


# --- calibration -----------------------------------------------------------------------------------------


def test_all_workers_and_resumed_runs_use_the_numbers_of_the_first(
    rows: MakeRows, list_source: Any, tmp_path: Path
) -> None:
    """Calibrated once, on the first captions; whoever comes later reads no row for it."""
    given, settings = rows(40), EncodeSettings(sizes=(16,), chunk_rows=10, text_dtype="int8")
    first, second = list_source(given), list_source(given)
    encode(first, tmp_path / "s", settings, worker=(1, 2), log=lambda line: None)
    begun = (tmp_path / "s/begun.json").read_bytes()
    assert first.reads == [*range(40), *range(10, 20), *range(30, 40)]
    encode(second, tmp_path / "s", settings, worker=(0, 2), log=lambda line: None)
    assert second.reads == [*range(10), *range(20, 30)]
    assert (tmp_path / "s/begun.json").read_bytes() == begun
    encode(list_source(given), tmp_path / "one", settings, log=lambda line: None)
    for column in ("text", "rows", "latents-16"):
        for path in sorted((tmp_path / "one/columns" / column).iterdir()):
            assert path.read_bytes() == (tmp_path / "s/columns" / column / path.name).read_bytes()


def test_of_two_that_begin_at_once_one_wins(
    rows: MakeRows, list_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other finds a store begun while it calibrated, and takes over its numbers, not its own."""
    given, settings = rows(20), EncodeSettings(sizes=(16,), chunk_rows=10, text_dtype="int8")
    plain = begun_module.captions_of_source

    def overtaken(source: Any) -> list[str]:
        monkeypatch.setattr("shoestring.data.encode.captions_of_source", plain)
        encode(list_source(given), tmp_path / "s", settings, worker=(1, 2), log=lambda line: None)
        return ["captions that give other numbers"]

    monkeypatch.setattr("shoestring.data.encode.captions_of_source", overtaken)
    store = encode(list_source(given), tmp_path / "s", settings, worker=(0, 2), log=lambda line: None)
    assert store is not None
    encode(list_source(given), tmp_path / "alone", settings, log=lambda line: None)
    assert store.manifest["text_channels"] == read_json(tmp_path / "alone/begun.json")["text_channels"]
    for path in sorted((tmp_path / "alone/columns/text").iterdir()):
        assert path.read_bytes() == (store.path / "columns/text" / path.name).read_bytes()
    assert not [path.name for path in store.path.iterdir() if path.name.startswith(".")]


def test_without_hard_links_two_calibrations_cannot_mix_unseen(
    rows: MakeRows, list_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last to begin wins there; the other's chunks are then found to be foreign, with their cure."""
    given, settings = rows(20), EncodeSettings(sizes=(16,), chunk_rows=10, text_dtype="int8")

    def refuse(*names: Any) -> None:
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr("os.link", refuse)
    encode(list_source(given), tmp_path / "s", settings, worker=(0, 2), log=lambda line: None)
    (tmp_path / "s/begun.json").unlink()
    monkeypatch.setattr("shoestring.data.encode.captions_of_source", lambda source: ["one"])
    with pytest.raises(StoreError, match=r"text/00000.*made by other encoders.*rm .*chunks/00000\.json"):
        encode(list_source(given), tmp_path / "s", settings, worker=(1, 2), log=lambda line: None)
