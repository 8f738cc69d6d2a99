"""Text encoders behind one class: `hashing` (no learned weights), any text model of transformers, and the
two of SDXL as one (sdxl_text.py).

    captions --TextEncoder.encode--> EncodedText: per caption (L_i, C) --collate--> (B, L, C) + mask (B, L)

`pad` says what a caption's states are:

    none       its real tokens only
    encoder    all of `max_tokens`, padded by the tokenizer, and run as the encoder's own users do: CLIP and
               SigLIP are not told which tokens are padding (MicroDiT), others are
    masked     the same, and every encoder is told (Würstchen, Stable Cascade)

Both paddings are for models that attend to them, without a text mask. CLIP is causal: with it they differ in
the states of the padding alone. SDXL's pair knows `encoder` alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from numpy.typing import NDArray
from torch import Tensor, nn

from shoestring.errors import RecipeError
from shoestring.models.autoencoders import weights_fingerprint
from shoestring.models.sdxl_text import (
    SdxlTextPair,
    SdxlTokenizerPair,
    check_padding,
    check_tokens,
    second_of,
)
from shoestring.models.text_files import TextFiles, token_counts, tokenizer_hash

HASHING = "hashing"
HASHINGS: dict[str, dict[str, int]] = {HASHING: {}, "hashing-context": {"width": 128, "context": 5}}
"""Arguments of the text encoders without weights, by their names."""

PADS = ("none", "encoder", "masked")
BATCH = 64  # captions encoded at once

# Words; a sign of a script that puts no spaces between words counts as a word; any other mark alone.
_TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
    r"|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+|[^\w\s]"
)


Integers = NDArray[np.int64]
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class EncodedText:
    """Encoded captions, on the CPU. `cut[i]` is how many tokens of caption i did not fit."""

    tokens: list[Tensor]  # B x (L_i, C) float32
    pooled: Tensor | None  # (B, C_pooled) float32, where the encoder gives one vector a caption
    cut: list[int]


class HashingTextEncoder(ModelMixin, ConfigMixin):
    """Each word or punctuation mark becomes a fixed random vector derived from its hash; no weights.

    Components of a vector have mean 0 and variance 1 (a sum of four hashed bytes: integers, so that every
    machine and version gets the same bits). Sinusoidal positions of a quarter of that size tell word order.

    With `context` C a token tells of its neighbours too, for networks that do not mix tokens themselves: it
    is the word's vector plus, for each of the C words before and after it, `CONTEXT_WEIGHT` times a vector of
    that word at that distance, scaled back to variance 1.
    """

    POSITION_WEIGHT = 0.25
    CONTEXT_WEIGHT = 0.7

    @register_to_config
    def __init__(
        self, width: int = 64, max_tokens: int = 64, positions: bool = True, context: int = 0
    ) -> None:
        super().__init__()
        if width < 2 or width % 2 or max_tokens < 1 or context < 0:
            raise RecipeError(
                f"hashing text encoder: width {width}, max_tokens {max_tokens}, context {context} are not "
                "possible. Use an even width, at least one token and 0 neighbours or more."
            )
        place = sinusoids(max_tokens, width) * (self.POSITION_WEIGHT if positions else 0.0)
        self.register_buffer("places", place)  # (max_tokens, width)
        self._tables = {shift: _Vectors(width, shift) for shift in range(-context, context + 1)}

    @property
    def width(self) -> int:
        return int(self.config["width"])

    @property
    def max_tokens(self) -> int:
        return int(self.config["max_tokens"])

    def forward(self, captions: Sequence[str]) -> tuple[list[Tensor], list[int]]:
        """Captions -> tokens of each (L_i, width), and how many words of each did not fit."""
        places: Tensor = self.places
        if not captions:
            return [], []
        words = [split_words(caption) for caption in captions]
        kept = [each[: self.max_tokens] for each in words]
        lengths = [len(each) for each in kept]
        flat = [word for each in kept for word in each]
        starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
        place = np.arange(len(flat)) - starts
        vectors = self._with_context(flat, place, np.repeat(lengths, lengths))
        tokens = torch.from_numpy(vectors).to(places) + places[torch.from_numpy(place)]
        parts = list(tokens.split(lengths))
        zero = places.new_zeros(1, self.width)
        return [part if len(part) else zero for part in parts], [
            len(each) - length for each, length in zip(words, lengths, strict=True)
        ]

    def _with_context(self, words: Sequence[str], place: Integers, lengths: Integers) -> Vectors:
        """The vectors (N, width) of words, each at a `place` of a caption of so many words."""
        context = int(self.config["context"])
        whole = self._tables[0].of(words)
        if not context:
            return whole
        whole = whole.copy()
        for shift in range(-context, context + 1):
            rows = np.flatnonzero((place + shift >= 0) & (place + shift < lengths))
            if shift and len(rows):
                neighbours = [words[row + shift] for row in rows.tolist()]
                whole[rows] += np.float32(self.CONTEXT_WEIGHT) * self._tables[shift].of(neighbours)
        return whole / np.float32(math.sqrt(1 + 2 * context * self.CONTEXT_WEIGHT**2))


class _Vectors:
    """The vectors of words at a distance from the token that tells of them; made when first asked for."""

    def __init__(self, width: int, shift: int) -> None:
        self.width, self.shift = width, shift
        self._ids: dict[str, int] = {}
        self._rows = np.empty((0, width), dtype=np.float32)
        self._known = 0

    def of(self, words: Sequence[str]) -> Vectors:
        """Vectors (N, width) of N words."""
        ids = self._ids
        numbers = np.fromiter((ids.setdefault(word, len(ids)) for word in words), np.int64, len(words))
        if len(ids) > len(self._rows):  # grown by doubling
            grown = np.empty((2 * len(ids), self.width), dtype=np.float32)
            grown[: self._known] = self._rows[: self._known]
            self._rows = grown
        for word, index in list(ids.items())[self._known :]:
            self._rows[index] = word_vector(f"{self.shift:+d} {word}" if self.shift else word, self.width)
        self._known = len(ids)
        vectors: Vectors = self._rows[numbers]
        return vectors


def split_words(caption: str) -> list[str]:
    """Lower-cased words and punctuation marks, in the same form however accents were typed."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", caption).lower())


def word_vector(word: str, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A word's fixed vector (width,): mean 0 and variance 1, the same bits on every machine."""
    data = np.frombuffer(hashlib.shake_128(word.encode()).digest(4 * width), dtype=np.uint8)
    sums = data.reshape(width, 4).astype(np.int64).sum(axis=1) - 510  # four bytes of mean 127.5
    return (sums / math.sqrt(4 * (256**2 - 1) / 12)).astype(np.float32)


def sinusoids(length: int, width: int) -> Tensor:
    """Sine and cosine of positions at `width / 2` frequencies, unit variance: (length, width) float32."""
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return (math.sqrt(2.0) * torch.cat([angles.sin(), angles.cos()], dim=1)).float()


class TextEncoder:
    """A text model with its tokenizer: captions in, tokens out."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        pad: str = "none",
        max_tokens: int | None = None,
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        if pad not in PADS:
            raise RecipeError(f"pad {pad!r}: unknown. Use one of {', '.join(PADS)}.")
        if pad != "none" and tokenizer is None:
            raise RecipeError(f"pad {pad!r}: the hashing text encoder does not pad. Use pad 'none'.")
        if isinstance(model, SdxlTextPair):
            check_padding(pad)
            check_tokens(max_tokens, min(model.max_tokens, tokenizer.max_tokens))
        limit = _token_limit(model, tokenizer)
        if max_tokens is not None and not 1 <= max_tokens <= (limit or max_tokens):
            raise RecipeError(f"max_tokens {max_tokens}: this text encoder takes 1 to {limit or 'any'}.")
        self.model, self.tokenizer, self.pad = model, tokenizer, pad
        self.max_tokens = max_tokens or limit or 256
        self.name = name or (HASHING if tokenizer is None else type(model).__name__)
        self.revision = revision

    @property
    def padded(self) -> bool:
        """Every caption has `max_tokens` tokens, all of which count: no mask is needed."""
        return self.pad != "none"

    @property
    def width(self) -> int:
        """Components of a token."""
        if self.tokenizer is None or isinstance(self.model, SdxlTextPair):
            return int(self.model.width)  # type: ignore[arg-type]
        config: Any = self.model.config
        return int(getattr(config, "hidden_size", None) or config.d_model)

    @property
    def device(self) -> torch.device:
        device = next(iter((*self.model.parameters(), *self.model.buffers()))).device
        # Offloaded weights are nowhere between calls; the hooks that fetch them move what comes in, too.
        return torch.device("cpu") if device.type == "meta" else device

    def identity(self) -> dict[str, Any]:
        """What decides the tokens, for manifests and comparisons."""
        return {
            "id": self.name,
            "revision": self.revision,
            "class": type(self.model).__name__,
            "width": self.width,
            "max_tokens": self.max_tokens,
            "pad": self.pad,
            "tokenizer": self._tokenizer_hash(),
            "weights": weights_fingerprint(self.model),
        }

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before any is cut, by the tokenizer alone."""
        if self.tokenizer is None:
            return [len(split_words(caption)) for caption in captions]
        if isinstance(self.tokenizer, SdxlTokenizerPair):
            return self.tokenizer.lengths(captions)
        return token_counts(self.tokenizer, captions)

    def warnings(self, captions: Sequence[str]) -> list[str]:
        """A line for each caption that is longer than the encoder takes, for prompts."""
        cut = [max(0, length - self.max_tokens) for length in self.lengths(captions)]
        return [
            f"prompt too long for the text encoder: the last {count} of its tokens are ignored "
            f"(it takes {self.max_tokens}): {caption}"
            for caption, count in zip(captions, cut, strict=True)
            if count
        ]

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> EncodedText:
        """Captions -> tokens, in the order given. An empty caption has at least one token."""
        lengths = self.lengths(captions)
        cut = [max(0, length - self.max_tokens) for length in lengths]
        if self.tokenizer is None:
            whole, _ = self.model(captions)
            return EncodedText([part[: self.max_tokens].float().cpu() for part in whole], None, cut)
        tokens, pooled = [torch.empty(0)] * len(captions), [torch.empty(0)] * len(captions)
        order = sorted(range(len(captions)), key=lambda i: lengths[i])  # little padding in each batch
        has_pooled = False
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            parts, vectors = self._encode_batch([captions[i] for i in chosen])
            has_pooled = vectors is not None
            for place, i in enumerate(chosen):
                tokens[i] = parts[place]
                if vectors is not None:
                    pooled[i] = vectors[place]
        return EncodedText(tokens, torch.stack(pooled) if has_pooled else None, cut)

    def _tokenizer_hash(self) -> str | None:
        if isinstance(self.tokenizer, SdxlTokenizerPair):
            return self.tokenizer.hash()
        return None if self.tokenizer is None else tokenizer_hash(self.tokenizer)

    def _encode_batch(self, captions: list[str]) -> tuple[list[Tensor], Tensor | None]:
        if isinstance(self.tokenizer, SdxlTokenizerPair):
            ids, ids_2 = self.tokenizer.ids(captions, self.max_tokens)
            both, vectors = self.model(ids.to(self.device), ids_2.to(self.device))
            return list(both.float().cpu()), vectors.float().cpu()
        is_siglip = _is_siglip(self.model)
        inputs = self.tokenizer(
            captions,
            padding="max_length" if self.padded or is_siglip else "longest",
            truncation=True,
            max_length=self.max_tokens,
            padding_side="right",
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids, mask = inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device)
        if ids.shape[1] == 0:  # nothing but empty captions, and a tokenizer without marks of its own
            return [torch.zeros(1, self.width) for _ in captions], None
        # CLIP is causal: padding cannot reach real tokens, and most users run it without a mask. SigLIP is
        # trained on captions padded to one length without a mask, and pools the last position.
        runs_unmasked = is_siglip or (_is_clip(self.model) and self.pad == "encoder")
        unmasked = runs_unmasked and self.pad != "masked"
        output = self.model(input_ids=ids, **({} if unmasked else {"attention_mask": mask}))
        states = output.last_hidden_state.float().cpu()  # (B, L, C), after the final norm
        pooled = output.get("text_embeds")
        pooled = output.get("pooler_output") if pooled is None else pooled
        vectors = None if pooled is None else pooled.float().cpu()
        if self.padded:
            return list(states), vectors
        real = mask.bool().cpu()
        parts = [row[keep] for row, keep in zip(states, real, strict=True)]
        return [part if len(part) else states.new_zeros(1, self.width) for part in parts], vectors


def collate(tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """B x (L_i, C) -> (B, L, C) float32 padded with zeros, and the mask of real tokens (B, L) bool."""
    lengths = torch.tensor([len(each) for each in tokens])
    text = nn.utils.rnn.pad_sequence([each.float() for each in tokens], batch_first=True)
    mask = torch.arange(text.shape[1]) < lengths[:, None]
    return text, mask.to(text.device)


def null_caption(text: TextEncoder) -> EncodedText:
    """The empty caption as this encoder gives it: `tokens[0]` (L0, C), `pooled` (1, P) where it has one.

    What a dropped caption becomes for models that are guided against the empty prompt (SD 1.x and 2.x).
    SDXL's pipelines are guided against zeros of the same shapes where no negative prompt is given
    (`force_zeros_for_empty_prompt`).
    """
    return text.encode([""])


def load_text_encoder(
    path_or_id: str, *, max_tokens: int | None = None, pad: str = "none", revision: str | None = None
) -> TextEncoder:
    """`hashing` or `hashing-context`, or the text model in a local folder or hub repository, in float32.

    A pipeline's folder (`text_encoder/` and `tokenizer/`) works as well; one of SDXL's kind gives the pair,
    for `pad` "encoder" only. Reads safetensors only and runs no code from the repository. Raises
    `RecipeError` where there is no text model.
    """
    if path_or_id in HASHINGS:
        limit = {} if max_tokens is None else {"max_tokens": max_tokens}
        return TextEncoder(
            HashingTextEncoder(**HASHINGS[path_or_id], **limit).eval(), None, pad=pad, name=path_or_id
        )
    for folder in (Path(path_or_id), Path(path_or_id) / "text_encoder"):
        if _class_name(folder) == HashingTextEncoder.__name__:
            model = HashingTextEncoder.from_pretrained(folder, low_cpu_mem_usage=False).eval()
            return TextEncoder(model, None, pad=pad, max_tokens=max_tokens, name=path_or_id)
    text_model, tokenizer = _load_transformers(path_or_id, pad, revision)
    return TextEncoder(
        text_model, tokenizer, pad=pad, max_tokens=max_tokens, name=path_or_id, revision=revision
    )


def _load_transformers(path_or_id: str, pad: str, revision: str | None) -> tuple[nn.Module, Any]:
    """(model, tokenizer) at a place: one text model, or SDXL's two."""
    first = TextFiles.find(path_or_id, revision)
    second = second_of(first)
    if second is None:
        return first.model(), first.tokenizer()
    check_padding(pad)  # before gigabytes are read
    tokenizers = SdxlTokenizerPair(first.tokenizer(), second.tokenizer())
    return SdxlTextPair(first.model(), second.model()).eval(), tokenizers


def _token_limit(model: nn.Module, tokenizer: Any) -> int | None:
    """Most tokens the encoder takes: of the hashing encoder, the tokenizer, or the position table."""
    if tokenizer is None:
        return int(model.max_tokens)  # type: ignore[arg-type]
    if isinstance(model, SdxlTextPair):
        return min(model.max_tokens, int(tokenizer.max_tokens))
    config: Any = model.config
    limits = (getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None))
    return min((int(each) for each in limits if each and each < 10**6), default=None)


def _is_clip(model: nn.Module) -> bool:
    return type(model).__name__.startswith("CLIPText")


def _is_siglip(model: nn.Module) -> bool:
    return type(model).__name__.startswith("Siglip")


def _class_name(folder: Path) -> str | None:
    """The diffusers class named in a folder's config.json, if any."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("_class_name") if isinstance(config, dict) else None
