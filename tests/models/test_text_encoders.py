"""Text encoders against plain models run on one caption at a time."""

from __future__ import annotations

import copy
import hashlib
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    SiglipTextConfig,
    SiglipTextModel,
    T5Config,
    T5ForConditionalGeneration,
)

from shoestring.errors import RecipeError
from shoestring.models.text_encoders import (
    HashingTextEncoder,
    TextEncoder,
    collate,
    load_text_encoder,
    null_caption,
    sinusoids,
    split_words,
    word_vector,
)

CAPTIONS = ["w1 w2 w3", "", "w4", " ".join(["w5"] * 20)]
LIMIT = 12


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 ... w39 between a start and an end mark; at most 12 tokens."""
    words = ["<pad>", "<s>", "<unk>", *(f"w{i}" for i in range(40)), "</s>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<s>", 1), ("</s>", 43)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=LIMIT, **names)


def clip_config() -> CLIPTextConfig:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 43}
    return CLIPTextConfig(vocab_size=44, max_position_embeddings=LIMIT, projection_dim=8, **sizes, **marks)


def t5_config() -> T5Config:
    torch.manual_seed(0)
    return T5Config(
        vocab_size=44, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    CLIPTextModel(clip_config()).save_pretrained(tmp_path / "clip")
    tokenizer().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    """A whole T5, decoder and all, as published ones are."""
    T5ForConditionalGeneration(t5_config()).save_pretrained(tmp_path / "t5")
    tokenizer().save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def one_by_one(model: torch.nn.Module, captions: list[str]) -> list[torch.Tensor]:
    """The independent answer: each caption alone through the plain model, with no padding at all."""
    states = []
    for caption in captions:
        inputs = tokenizer()(caption, truncation=True, max_length=LIMIT, return_tensors="pt")
        with torch.no_grad():
            states.append(model(input_ids=inputs["input_ids"]).last_hidden_state[0])
    return states


# --- hashing ---------------------------------------------------------------------------------------------


def test_a_words_vector_comes_from_its_hash_alone() -> None:
    """Bit for bit what hashlib gives: bytes summed in fours, centred, over the sum's deviation."""
    data = hashlib.shake_128(b"circle").digest(16)
    sums = [sum(data[4 * i : 4 * i + 4]) - 510 for i in range(4)]
    expected = torch.tensor([s / (4 * (256**2 - 1) / 12) ** 0.5 for s in sums], dtype=torch.float32)
    assert torch.equal(torch.from_numpy(word_vector("circle", 4)), expected)
    assert word_vector("circle", 4).tolist() == pytest.approx(
        [-0.8322026133537292, 0.4939088821411133, 1.3396432399749756, 0.1488492488861084], rel=1e-7
    )


def test_vectors_have_unit_variance_and_are_nearly_orthogonal() -> None:
    vectors = torch.stack([torch.from_numpy(word_vector(f"word{i}", 256)) for i in range(200)])
    assert vectors.mean().abs() < 0.01
    assert vectors.var() == pytest.approx(1.0, abs=0.02)
    products = (vectors @ vectors.T / 256)[~torch.eye(200, dtype=torch.bool)]
    assert products.std() == pytest.approx(256**-0.5, rel=0.1)


def test_the_same_word_is_the_same_vector_up_to_its_place() -> None:
    encoder = load_text_encoder("hashing")
    first, second = encoder.encode(["Red circle", "circle RED"]).tokens
    place = sinusoids(2, 64) * 0.25
    torch.testing.assert_close(first - place, (second - place).flip(0))
    plain = TextEncoder(HashingTextEncoder(positions=False))
    tokens = plain.encode(["red circle", "circle red"]).tokens
    assert torch.equal(tokens[0], tokens[1].flip(0))


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A red-circle, isn't it?", ["a", "red", "-", "circle", ",", "isn", "'", "t", "it", "?"]),
        ("Cafe\u0301 CAFÉ", ["café", "café"]),
        ("赤い円", ["赤", "い", "円"]),
        ("빨간 원", ["빨간", "원"]),
        ("  \n", []),
    ],
)
def test_words_of_any_language(caption: str, words: list[str]) -> None:
    assert split_words(caption) == words


def test_hashing_counts_what_it_cuts_and_never_gives_nothing() -> None:
    encoder = load_text_encoder("hashing", max_tokens=4)
    encoded = encoder.encode(["one two three four five six", "", "one"])
    assert [len(each) for each in encoded.tokens] == [4, 1, 1]
    assert encoded.cut == [2, 0, 0]
    assert not encoded.tokens[1].any()
    assert encoder.encode([]).tokens == []


def test_hashing_survives_saving_with_its_settings(tmp_path: Path) -> None:
    model = HashingTextEncoder(width=16, max_tokens=8, positions=False)
    model.save_pretrained(tmp_path / "text_encoder")
    for place in (tmp_path / "text_encoder", tmp_path):
        loaded = load_text_encoder(str(place))
        assert (loaded.width, loaded.max_tokens) == (16, 8)
        expected = TextEncoder(model).encode(["a red circle"]).tokens[0]
        assert torch.equal(loaded.encode(["a red circle"]).tokens[0], expected)


# --- transformers ----------------------------------------------------------------------------------------


def test_clip_tokens_equal_those_of_each_caption_alone(clip: Path) -> None:
    encoder = load_text_encoder(str(clip))
    encoded = encoder.encode(CAPTIONS)
    plain = CLIPTextModel.from_pretrained(clip)
    for ours, alone in zip(encoded.tokens, one_by_one(plain, CAPTIONS), strict=True):
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-4)
    assert encoded.cut == [0, 0, 0, 22 - LIMIT]
    assert encoded.pooled is not None
    assert torch.equal(encoded.pooled[0], encoded.tokens[0][-1])  # CLIP pools the end mark


def test_t5_tokens_equal_those_of_each_caption_alone(t5: Path) -> None:
    encoder = load_text_encoder(str(t5))
    assert type(encoder.model).__name__ == "T5EncoderModel"
    plain = T5ForConditionalGeneration.from_pretrained(t5).get_encoder()
    encoded = encoder.encode(CAPTIONS)
    for ours, alone in zip(encoded.tokens, one_by_one(plain, CAPTIONS), strict=True):
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-4)
    assert encoded.pooled is None


def test_order_does_not_depend_on_length(clip: Path) -> None:
    """Captions are sorted by length inside; each still gets its own tokens."""
    captions = [" ".join(["w7"] * (1 + 5 * i % 9)) for i in range(150)]  # several batches
    encoder = load_text_encoder(str(clip))
    assert [len(each) for each in encoder.encode(captions).tokens] == [3 + 5 * i % 9 for i in range(150)]


def test_pad_encoder_keeps_what_clips_own_users_feed(clip: Path) -> None:
    """All positions, padded by the tokenizer and run without a mask, as diffusers' pipelines do."""
    encoded = load_text_encoder(str(clip), pad="encoder").encode(CAPTIONS)
    inputs = tokenizer()(
        CAPTIONS, padding="max_length", truncation=True, max_length=LIMIT, return_tensors="pt"
    )
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(clip)(input_ids=inputs["input_ids"]).last_hidden_state
    assert {len(each) for each in encoded.tokens} == {LIMIT}
    torch.testing.assert_close(torch.stack(encoded.tokens), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("layers", "act", "pad"), [(2, "quick_gelu", "</s>"), (3, "gelu", "w0")])
def test_stable_diffusions_text_is_bit_for_bit_its_pipelines(
    layers: int, act: str, pad: str, tmp_path: Path
) -> None:
    """SD 1.x's CLIP padded with the end mark, 2.x's OpenCLIP with another: states after the final norm.

    2.x's second-last layer is reached by files of one layer less (23), so that it has the norm as well.
    """
    config = clip_config()
    config.num_hidden_layers, config.hidden_act = layers, act
    words = tokenizer()
    words.pad_token = pad
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=CLIPTextModel(config),
        tokenizer=words,
        unet=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path)
    encoder = load_text_encoder(str(tmp_path), pad="encoder")
    for caption in CAPTIONS:
        with torch.no_grad():
            expected, _ = pipeline.encode_prompt(caption, "cpu", 1, False)
        assert torch.equal(encoder.encode([caption]).tokens[0], expected[0])
    with torch.no_grad():
        _, expected = pipeline.encode_prompt(CAPTIONS[0], "cpu", 1, True)
    assert torch.equal(null_caption(encoder).tokens[0], expected[0])


def test_pad_masked_tells_clip_its_padding_and_keeps_all_states(clip: Path) -> None:
    """As Würstchen and Stable Cascade ran it; against pad encoder only the padding's states change."""
    encoded = load_text_encoder(str(clip), pad="masked").encode(CAPTIONS)
    inputs = tokenizer()(
        CAPTIONS, padding="max_length", truncation=True, max_length=LIMIT, return_tensors="pt"
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(clip)(input_ids=ids, attention_mask=mask)
    ours = torch.stack(encoded.tokens)
    torch.testing.assert_close(ours, expected.last_hidden_state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoded.pooled, expected.pooler_output, atol=1e-5, rtol=1e-4)
    untold = torch.stack(load_text_encoder(str(clip), pad="encoder").encode(CAPTIONS).tokens)
    real = mask.bool()
    torch.testing.assert_close(ours[real], untold[real], atol=1e-5, rtol=1e-4)
    assert ((ours - untold)[~real].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("kind", ["t5", "siglip"])
def test_pad_masked_tells_every_encoder_its_padding(kind: str, t5: Path, tmp_path: Path) -> None:
    """Real tokens do not see padding, though both encoders look ahead; the padding's states are kept."""
    if kind == "siglip":
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        config = SiglipTextConfig(
            vocab_size=44, max_position_embeddings=LIMIT, num_attention_heads=2, **sizes
        )
        plain = SiglipTextModel(config).eval()
        plain.save_pretrained(tmp_path / kind)
        tokenizer().save_pretrained(tmp_path / kind)
    else:
        plain = T5ForConditionalGeneration.from_pretrained(t5).get_encoder()
    encoded = load_text_encoder(str(tmp_path / kind), pad="masked").encode(CAPTIONS)
    assert {len(each) for each in encoded.tokens} == {LIMIT}
    for ours, alone in zip(encoded.tokens, one_by_one(plain, CAPTIONS), strict=True):
        torch.testing.assert_close(ours[: len(alone)], alone, atol=1e-5, rtol=1e-4)


def test_the_text_half_of_a_whole_clip_is_found(tmp_path: Path) -> None:
    vision = {"image_size": 32, "patch_size": 16, "num_hidden_layers": 1, "hidden_size": 16}
    vision |= {"intermediate_size": 32, "num_attention_heads": 2}
    whole = CLIPModel(
        CLIPConfig(text_config=clip_config().to_dict(), vision_config=vision, projection_dim=8)
    ).eval()
    whole.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    encoder = load_text_encoder(str(tmp_path))
    ids = tokenizer()("w1 w2", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = whole.text_model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(encoder.encode(["w1 w2"]).tokens[0], expected)


def test_a_pipelines_folder_and_a_projection(tmp_path: Path) -> None:
    CLIPTextModelWithProjection(clip_config()).save_pretrained(tmp_path / "text_encoder")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    encoder = load_text_encoder(str(tmp_path))
    encoded = encoder.encode(["w1"])
    assert type(encoder.model) is CLIPTextModelWithProjection
    assert encoded.pooled is not None
    assert (encoder.width, encoded.pooled.shape) == (16, (1, 8))


def test_siglip_runs_on_captions_padded_to_one_length_without_a_mask(tmp_path: Path) -> None:
    """As it is trained, and pools the last position: nothing may depend on what it is encoded beside."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipTextConfig(vocab_size=44, max_position_embeddings=LIMIT, **sizes)
    plain = SiglipTextModel(config).eval()
    plain.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    encoder = load_text_encoder(str(tmp_path))
    alone, beside = encoder.encode(["w1 w2"]), encoder.encode(["w1 w2", "w3 w4 w5 w6"])
    inputs = tokenizer()("w1 w2", padding="max_length", max_length=LIMIT, return_tensors="pt")
    with torch.no_grad():
        expected = plain(input_ids=inputs["input_ids"])
    for encoded in (alone, beside):
        assert encoded.pooled is not None
        torch.testing.assert_close(encoded.tokens[0], expected.last_hidden_state[0, :4], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(encoded.pooled[0], expected.pooler_output[0], atol=1e-5, rtol=1e-4)


def test_any_other_text_model_works(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2Model(GPT2Config(vocab_size=44, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(
        tmp_path
    )
    words = tokenizer()
    words.pad_token = None
    words.save_pretrained(tmp_path)
    encoder = load_text_encoder(str(tmp_path))
    expected = one_by_one(GPT2Model.from_pretrained(tmp_path), CAPTIONS[:1])[0]
    torch.testing.assert_close(encoder.encode(CAPTIONS[:1]).tokens[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["hashing", "clip"])
def test_tokens_are_counted_without_running_the_model(name: str, clip: Path) -> None:
    encoder = load_text_encoder(name if name == "hashing" else str(clip), max_tokens=4)
    encoded = encoder.encode(CAPTIONS)
    assert [max(0, length - 4) for length in encoder.lengths(CAPTIONS)] == encoded.cut
    encoder.model.forward = None  # type: ignore[assignment]
    (line,) = encoder.warnings([CAPTIONS[2], CAPTIONS[3]])
    assert f"the last {encoded.cut[3]} of its tokens are ignored (it takes 4): w5 w5" in line
    assert encoder.lengths([]) == []


def test_an_encoder_whose_weights_are_offloaded_between_calls_is_given_what_it_can_read(clip: Path) -> None:
    """As accelerate does: the weights are on no device, and a call fetches them."""
    encoder = load_text_encoder(str(clip))
    expected = encoder.encode(CAPTIONS).tokens
    fetched = copy.deepcopy(encoder.model)
    encoder.model.to("meta").forward = fetched.forward  # type: ignore[method-assign]
    assert all(map(torch.equal, encoder.encode(CAPTIONS).tokens, expected))


def test_identity_does_not_change_with_use_and_tells_weights_apart(clip: Path, tmp_path: Path) -> None:
    encoder = load_text_encoder(str(clip), max_tokens=8)
    before = encoder.identity()
    encoder.encode(CAPTIONS)  # leaves padding and truncation set in the tokenizer
    assert encoder.identity() == before
    assert (before["max_tokens"], before["pad"], before["width"]) == (8, "none", 16)
    with torch.no_grad():
        next(encoder.model.parameters()).flatten()[0] += 1
    assert encoder.identity()["weights"] != before["weights"]


def test_collate_pads_with_zeros() -> None:
    parts = [torch.ones(2, 3), torch.ones(4, 3)]
    text, mask = collate(parts)
    assert text.shape == (2, 4, 3)
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    assert text.sum(-1).tolist() == [[3, 3, 0, 0], [3, 3, 3, 3]]


# --- what cannot be used ---------------------------------------------------------------------------------


def test_a_model_without_its_tokenizer_is_refused(t5: Path) -> None:
    """transformers would make up a tokenizer without a vocabulary."""
    (t5 / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=r"tokenizer cannot be loaded.*Copy the tokenizer's files"):
        load_text_encoder(str(t5))


@pytest.mark.parametrize(
    ("blocked", "packages"),
    [("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")],
)
def test_a_sentencepiece_tokenizer_says_what_to_install(
    blocked: str, packages: str, t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask for tiktoken."""
    (t5 / "tokenizer.json").unlink()
    (t5 / "spiece.model").write_bytes(b"a model that nothing here can read")
    (t5 / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    monkeypatch.setitem(sys.modules, blocked, None)
    with pytest.raises(RecipeError, match=f"reading its tokenizer needs {packages}: pip install {packages}"):
        load_text_encoder(str(t5))


def test_a_model_that_lacks_weights_is_refused(clip: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(clip / "model.safetensors")
    weights.pop(next(name for name in weights if "final_layer_norm" in name))
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="lacks 1 weights"):
        load_text_encoder(str(clip))


def test_wrong_limits_and_pads_are_refused(clip: Path) -> None:
    with pytest.raises(RecipeError, match="max_tokens 99: this text encoder takes 1 to 12"):
        load_text_encoder(str(clip), max_tokens=99)
    with pytest.raises(RecipeError, match="pad 'left': unknown"):
        load_text_encoder(str(clip), pad="left")
    for pad in ("encoder", "masked"):
        with pytest.raises(RecipeError, match=f"pad '{pad}': the hashing text encoder does not pad"):
            load_text_encoder("hashing", pad=pad)


@pytest.mark.parametrize("name", ["./nowhere", "nobody/nothing-of-the-kind", "hashing2"])
def test_a_missing_text_encoder_says_what_may_be_given(name: str) -> None:
    with pytest.raises(RecipeError, match=r"Give a folder .* or hashing"):
        load_text_encoder(name)


def test_no_code_of_a_repository_is_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself, transformers asks on the console, and runs it for a `y`."""
    written = tmp_path / "written"
    (tmp_path / "evil.py").write_text(
        f"open({str(written)!r}, 'w')\n"
        "from transformers import PretrainedConfig\n"
        "class Evil(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}')
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    with pytest.raises(RecipeError, match="no text model there"):
        load_text_encoder(str(tmp_path))
    assert not written.exists()
