"""What captions take in a store and how exact they stay: padded float16, float16, int8 token x channel.

python benchmarks/text_storage.py [--tiny] [--samples 256] [--rounds 5] [--folder /a/disk]

Every figure goes the whole way: captions -> text encoder -> `encode` -> store -> read back. Encoders are of
width 1024 and take 77 tokens. Four draw tokens with the outliers of real ones: none (normal), heavy tails, a
first token with eight channels 30 times as large (as CLIP has), four channels 20 times as large (as T5 has).
Two are CLIP and T5 text models of transformers, one layer, random weights. Captions have exactly 12 or 74
tokens.

Counted as bytes of a sample: tokens, scales, offsets, which caption a row has, the files' headers; not the
pooled vector of CLIP, which is the same in every form. Errors are 1 - cos between tokens encoded and read, of
every token; without_8_largest leaves out the 8 channels of largest values, which hide what others suffer.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts.figures import alternated, tell

from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.encoders import CaptionEncoder, Encoders, ImageEncoder
from shoestring.data.loader import Loader
from shoestring.data.rows import Row
from shoestring.data.store import Store
from shoestring.models.autoencoders import load_autoencoder
from shoestring.models.text_encoders import TextEncoder, load_text_encoder

cosine = torch.nn.functional.cosine_similarity
WIDTH, MOST = 1024, 77
PADDED = MOST * WIDTH * 2  # bytes of a caption as published: 157,696
LENGTHS = {"short": 12, "long": 74}
FORMS = {"padded float16": ("float16", True), "float16": ("float16", False), "int8": ("int8", False)}
PROFILES = ("normal", "heavy_tail", "first_token_outliers", "channel_outliers")
MODELS = ("clip", "t5")
WORDS = 500


class Drawn(torch.nn.Module):
    """A text model that draws a token for each word: the same for the same caption."""

    width, max_tokens = WIDTH, MOST

    def __init__(self, profile: str, padded: bool) -> None:
        super().__init__()
        self.profile, self.padded = profile, padded
        self.register_buffer("first", torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)))

    def forward(self, captions: Sequence[str]) -> tuple[list[torch.Tensor], list[int]]:
        return [self._tokens(caption) for caption in captions], [0] * len(captions)

    def _tokens(self, caption: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(caption.encode()))
        count = MOST if self.padded else len(caption.split())
        tokens = torch.randn(count, WIDTH, generator=generator)
        if self.profile == "heavy_tail":  # Student's t with 4 degrees of freedom
            tokens /= torch.randn(4, count, WIDTH, generator=generator).square().mean(0).sqrt()
        elif self.profile == "first_token_outliers":
            tokens[0] = self.first
            tokens[0, :8] *= 30
        elif self.profile == "channel_outliers":
            tokens[:, :4] *= 20
        return tokens


class Captioned:
    """Small pictures with captions of exactly so many words."""

    words = ("benchmark",)

    def __init__(self, count: int, length: int) -> None:
        self.num_rows, self.length = count, length

    def describe(self) -> dict[str, Any]:
        return {"kind": "benchmark", "rows": self.num_rows, "words": self.length}

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for number in range(start, min(stop, self.num_rows)):
            generator = np.random.default_rng(number)
            picture = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            caption = " ".join(f"w{word}" for word in generator.integers(0, WORDS, self.length))
            yield Row(f"{number}", picture, (caption,))


def save_model(name: str, folder: Path) -> int:
    """A text model of transformers with random weights and its tokenizer; the marks that it adds."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "<s>", "<unk>", *(f"w{number}" for number in range(WORDS)), "</s>"]
    end = len(words) - 1
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<s>", 1), ("</s>", end)] if name == "clip" else [("</s>", end)]
    single = "<s> $A </s>" if name == "clip" else "$A </s>"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MOST, **named)
    torch.manual_seed(0)
    if name == "clip":
        sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 16}
        ends = {"eos_token_id": end, "bos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": MOST}
        CLIPTextModel(
            CLIPTextConfig(vocab_size=len(words), num_hidden_layers=1, **sizes, **ends)
        ).save_pretrained(folder)
    else:
        sizes = {"d_model": WIDTH, "d_ff": 2 * WIDTH, "num_heads": 16, "d_kv": 64}
        T5EncoderModel(T5Config(vocab_size=len(words), num_layers=1, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return len(marks)


def make_store(path: Path, encoder: str | Path, form: str, source: Captioned) -> tuple[Store, TextEncoder]:
    """A store of the source in one form, and the text encoder that made it."""
    dtype, padded = FORMS[form]
    settings = EncodeSettings(sizes=(16,), text_dtype=dtype)
    if isinstance(encoder, Path):
        text = load_text_encoder(str(encoder), pad="encoder" if padded else "none")
    else:
        text = TextEncoder(Drawn(encoder, padded), name=encoder)
    image = ImageEncoder(load_autoencoder("pixels"), "pixels")
    encoders = Encoders(image, CaptionEncoder(text, dtype))
    store = encode(source, path, settings, encoders=encoders, log=lambda line: None)
    assert store is not None
    return store, text


def bytes_of(store: Store) -> float:
    """Bytes of text a sample: its column without pooled vectors, and two numbers for the caption it has."""
    pooled = 2 * (store.manifest["text_encoder"]["pooled"] or 0)
    return store.bytes_by_column()["text"] / len(store) - pooled + 2 * 8


def errors_of(store: Store, text: TextEncoder, batch: int = 64) -> dict[str, dict[str, float]]:
    """1 - cos of every token, over all channels and without the 8 largest."""
    given, kept = [], []
    for start in range(0, len(store), batch):
        rows = np.arange(start, min(start + batch, len(store)))
        given += text.encode(store.chosen_captions(rows)).tokens
        kept += store.text(rows)
    one, other = torch.cat(given), torch.cat(kept)
    rest = one.square().mean(dim=0).argsort()[:-8]
    found = {}
    for name, channels in (("error", slice(None)), ("error_without_8_largest", rest)):
        pairs = zip(one.split(4096), other.split(4096), strict=True)
        error = 1 - torch.cat([cosine(a[:, channels].double(), b[:, channels].double()) for a, b in pairs])
        percentile = error.sort().values[int(0.99 * (len(error) - 1))]
        found[name] = {"mean": error.mean(), "percentile_99": percentile, "largest": error.max()}
    return {name: {key: float(f"{value:.3g}") for key, value in each.items()} for name, each in found.items()}


def load_all(store: Store, batch: int) -> None:
    """All rows once, shuffled, through the loader and its thread."""
    for _ in Loader(store, size=16, batch_size=batch, seed=0, captions=False).batches(0, len(store)):
        pass


def measure(folder: Path, samples: int, rounds: int) -> None:
    """All encoders, lengths and forms."""
    marks = {name: save_model(name, folder / name) for name in MODELS}
    for encoder in (*PROFILES, *MODELS):
        for caption, tokens in LENGTHS.items():
            source = Captioned(samples, tokens - marks.get(encoder, 0))
            stores: dict[str, Store] = {}
            for form in FORMS:
                place = folder / f"{encoder}-{caption}-{form.replace(' ', '-')}"
                store, text = make_store(
                    place, folder / encoder if encoder in marks else encoder, form, source
                )
                stores[form] = store
                settings = {"encoder": encoder, "captions": caption, "tokens": tokens, "form": form}
                settings |= {"samples": samples}
                size = bytes_of(store)
                share = float(f"{size / PADDED:.4f}")
                tell("text_storage", "bytes_a_sample", size, "bytes", of_padded_float16=share, **settings)
                for metric, error in errors_of(store, text).items():
                    tell("text_storage", metric, error.pop("mean"), "1 - cos, mean", **error, **settings)
            if encoder == PROFILES[0]:
                works = {form: partial(load_all, each, 64) for form, each in stores.items()}
                for form, seconds in alternated(works, rounds).items():
                    settings = {
                        "captions": caption,
                        "tokens": tokens,
                        "form": form,
                        "batch": 64,
                        "threads": 1,
                    }
                    tell("text_storage", "loader", samples / seconds, "samples/s", **settings)


def main() -> None:
    """Write the stores into a temporary folder and measure them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="16 samples, one round")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; the system's temporary folder by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        samples, rounds = (16, 1) if arguments.tiny else (arguments.samples, arguments.rounds)
        measure(Path(folder), samples, rounds)


if __name__ == "__main__":
    main()
