"""Small encoders of the real libraries' classes, saved as published ones are, and pictures to encode."""

from __future__ import annotations

import io
import json
from itertools import product
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 30), "green": (40, 160, 60), "blue": (30, 70, 200), "yellow": (240, 210, 60)}
PLACES = ("left", "right", "top", "bottom")
SHAPES = ("circle", "square", "triangle")
CORPUS = [
    *(f"a {colour} {shape} at the {place}" for colour, shape, place in product(COLOURS, SHAPES, PLACES)),
    *(f"{noun} with {skin} skin tone" for noun in ("woman", "man") for skin in ("light", "medium", "dark")),
    "woman astronaut medium skin tone",
    "smiling face with open mouth and smiling eyes",
    "flag of the united states of america",
    "the quick brown fox jumps over the lazy dog",
]
LIMIT = 16  # tokens that the CLIP encoders take


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `clip`, `clip_files`, `clip_projection`, `t5`, `kl`, `tiny` and `dc`; not to be changed."""
    from shoestring.models.quiet import no_bars

    root = tmp_path_factory.mktemp("encoders")
    with no_bars():
        _save_clip(root)
        _save_t5(root / "t5")
        _save_autoencoders(root)
    return root


@pytest.fixture(scope="session")
def emoji(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every 60th emoji as a Parquet file; skipped where the data are absent."""
    import pyarrow.parquet as pq

    table = pq.read_table(data / "emoji" / "train.parquet")
    path = tmp_path_factory.mktemp("emoji") / "emoji.parquet"
    pq.write_table(table.take(list(range(0, len(table), 60))), path, row_group_size=16)
    return path


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 drawn shapes with metadata.jsonl: what there is where no data set is."""
    folder = tmp_path_factory.mktemp("drawings")
    lines = []
    for number, (colour, shape, place) in enumerate(product(COLOURS, SHAPES, PLACES)):
        _draw(colour, shape, place).save(folder / f"{number:02d}.png")
        texts = [f"a {colour} {shape} at the {place}", f"{place}: {shape}, {colour}"]
        lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _draw(colour: str, shape: str, place: str) -> Image.Image:
    """A shape of 128 x 128 on a slanted grey, so that no two rows are alike."""
    picture = Image.linear_gradient("L").resize((128, 128)).rotate(30).convert("RGB")
    x, y = {"left": (40, 64), "right": (88, 64), "top": (64, 40), "bottom": (64, 88)}[place]
    box = (x - 30, y - 30, x + 30, y + 30)
    draw = ImageDraw.Draw(picture)
    if shape == "circle":
        draw.ellipse(box, COLOURS[colour])
    elif shape == "square":
        draw.rectangle(box, COLOURS[colour])
    else:
        draw.polygon([(x, y - 30), (x + 30, y + 30), (x - 30, y + 30)], COLOURS[colour])
    return picture


# --- text encoders ---------------------------------------------------------------------------------------


def _save_clip(root: Path) -> None:
    """CLIP with a tokenizer.json; with vocab.json and merges.txt alone; with a projection, padded by "!".

    The byte-pair encoding is trained here on CLIP's own normalisation and splitting.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    published = CLIPTokenizer().backend_tokenizer
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    backend.normalizer, backend.pre_tokenizer = published.normalizer, published.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    learned = json.loads(backend.to_str())["model"]
    vocab = dict(learned["vocab"])
    for mark in ("<|startoftext|>", "<|endoftext|>"):
        vocab[mark] = len(vocab)
    merges = [tuple(pair) for pair in learned["merges"]]

    def tokenizer(pad: str) -> CLIPTokenizer:
        return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=LIMIT)

    words = tokenizer("<|endoftext|>")
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LIMIT,
        projection_dim=24,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(0)
    model = CLIPTextModel(config)
    for name in ("clip", "clip_files"):
        model.save_pretrained(root / name)
    words.save_pretrained(root / "clip")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (root / "clip_files" / "merges.txt").write_text("\n".join(lines) + "\n")
    (root / "clip_files" / "vocab.json").write_text(json.dumps(vocab))
    marks = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LIMIT}
    (root / "clip_files" / "tokenizer_config.json").write_text(json.dumps(marks))
    CLIPTextModelWithProjection(config).save_pretrained(root / "clip_projection")
    tokenizer("!").save_pretrained(root / "clip_projection")


def _save_t5(folder: Path) -> None:
    """T5's encoder with a sentencepiece model trained here, its only tokenizer file, as Google's have it."""
    import sentencepiece
    import torch
    from transformers import T5Config, T5EncoderModel

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=120,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    torch.manual_seed(1)
    config = T5Config(vocab_size=256, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    (folder / "spiece.model").write_bytes(model.getvalue())
    marks = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(marks))


# --- autoencoders ----------------------------------------------------------------------------------------


def _save_autoencoders(root: Path) -> None:
    """Of the published factors, 8, 8 and 32, with scaling as Stable Diffusion 3, TAESD and Sana have it."""
    import torch
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

    torch.manual_seed(2)
    AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ).save_pretrained(root / "kl")
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).save_pretrained(root / "tiny")
    channels, layers = (8, 8, 16, 16, 16, 16), (1,) * 6
    kinds = ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2
    scales = ((),) * 4 + ((5,),) * 2
    AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        scaling_factor=0.41407,
    ).save_pretrained(root / "dc")
