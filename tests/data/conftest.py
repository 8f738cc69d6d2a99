"""Small captioned pictures in every form a source may have, and small stores of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.rows import Row
from shoestring.data.store import Store


def picture(number: int, width: int = 40, height: int = 40) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture that differs everywhere from those of other numbers."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(number: int, width: int = 40, height: int = 40) -> bytes:
    """The same as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture(number, width, height)).save(buffer, "PNG")
    return buffer.getvalue()


class ListSource:
    """Rows from a list: the smallest source there can be; counts how often each is read."""

    def __init__(self, rows: list[Row], name: str = "list", counted: bool = True) -> None:
        self.all, self.words, self.name = rows, [name], name
        self.num_rows = len(rows) if counted else None
        self.reads: list[int] = []

    def describe(self) -> dict[str, Any]:
        return {"kind": "list", "path": self.name, "files": [row.key for row in self.all]}

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for number in range(start, min(stop, len(self.all))):
            self.reads.append(number)
            yield self.all[number]
        if stop > len(self.all):
            self.num_rows = len(self.all)


def make_rows(count: int, size: int = 16) -> list[Row]:
    """Rows whose picture, key and captions (1, 2 or 3 of them) are known from their number."""
    captions = [tuple(f"caption {part} of {n}" for part in range(1 + n % 3)) for n in range(count)]
    return [Row(f"row{n}", picture(n, size, size), captions[n]) for n in range(count)]


@pytest.fixture
def pictures() -> Callable[..., np.ndarray[Any, np.dtype[np.uint8]]]:
    return picture


@pytest.fixture
def pngs() -> Callable[..., bytes]:
    return png


@pytest.fixture
def rows() -> Callable[..., list[Row]]:
    return make_rows


@pytest.fixture
def list_source() -> type[ListSource]:
    return ListSource


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """Encode rows into a store: `make_store(rows, name="store", **settings)`."""

    def make(rows: list[Row], name: str = "store", **settings: Any) -> Store:
        given = {"sizes": (16,), "chunk_rows": 10, **settings}
        store = encode(ListSource(rows), tmp_path / name, EncodeSettings(**given), log=lambda line: None)
        assert store is not None
        return store

    return make


@pytest.fixture(scope="session")
def chunked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 26 chunks of 8 rows (the last has 3) with 31 held out; not to be changed."""
    path = tmp_path_factory.mktemp("chunked") / "store"
    settings = EncodeSettings(sizes=(16,), chunk_rows=8, held_out=31)
    assert encode(ListSource(make_rows(203)), path, settings, log=lambda line: None) is not None
    return path


@pytest.fixture
def kl_folder(tmp_path: Path) -> Path:
    """A tiny AutoencoderKL with a scaling and a shift, saved."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    two = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.25,
        **two,
    )
    model.save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A tiny CLIP text model of at most 8 tokens with a word tokenizer, saved."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["<pad>", "<s>", "<unk>", "caption", "of", *map(str, range(60)), "</s>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<s>", 1), ("</s>", len(words) - 1)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=8, **names)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(
        vocab_size=len(words), max_position_embeddings=8, eos_token_id=len(words) - 1, pad_token_id=0, **sizes
    )
    CLIPTextModel(config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"
