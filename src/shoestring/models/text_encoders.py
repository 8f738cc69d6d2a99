"""Text encoders behind one class: `hashing` (no learned weights) and any text model of transformers.

    captions --TextEncoder.encode--> EncodedText: per caption (L_i, C) --collate--> (B, L, C) + mask (B, L)

`pad` says what a caption's states are:

    none       its real tokens only
    encoder    all of `max_tokens`, padded by the tokenizer, and run as the encoder's own users do: CLIP and
               SigLIP are not told which tokens are padding (MicroDiT), others are
    masked     the same, and every encoder is told (Würstchen, Stable Cascade)

Both paddings are for models that attend to them, without a text mask. CLIP is causal: with it they differ in
the states of the padding alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from shoestring.errors import RecipeError
from shoestring.models.autoencoders import first_line, weights_fingerprint
from shoestring.models.quiet import muted, no_bars

HASHING = "hashing"
PADS = ("none", "encoder", "masked")
BATCH = 64  # captions encoded at once

# Words; a sign of a script that puts no spaces between words counts as a word; any other mark alone.
_TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
    r"|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+|[^\w\s]"
)
_SUFFICIENT = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "sentencepiece.bpe.model",
)


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
    """

    POSITION_WEIGHT = 0.25

    @register_to_config
    def __init__(self, width: int = 64, max_tokens: int = 64, positions: bool = True) -> None:
        super().__init__()
        if width < 2 or width % 2 or max_tokens < 1:
            raise RecipeError(
                f"hashing text encoder: width {width}, max_tokens {max_tokens} are not possible. "
                "Use an even width and at least one token."
            )
        place = sinusoids(max_tokens, width) * (self.POSITION_WEIGHT if positions else 0.0)
        self.register_buffer("places", place)  # (max_tokens, width)
        self._ids: dict[str, int] = {}
        self._vectors = np.empty((0, width), dtype=np.float32)
        self._known = 0

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
        ids = np.fromiter((self._id(word) for each in kept for word in each), np.int64, sum(lengths))
        starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
        place = torch.from_numpy(np.arange(len(ids)) - starts)
        tokens = torch.from_numpy(self._table()[ids]).to(places) + places[place]
        parts = list(tokens.split(lengths))
        zero = places.new_zeros(1, self.width)
        return [part if len(part) else zero for part in parts], [
            len(each) - length for each, length in zip(words, lengths, strict=True)
        ]

    def _id(self, word: str) -> int:
        return self._ids.setdefault(word, len(self._ids))

    def _table(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Vectors of all words met so far, (words, width); grown by doubling."""
        if len(self._ids) > len(self._vectors):
            grown = np.empty((2 * len(self._ids), self.width), dtype=np.float32)
            grown[: self._known] = self._vectors[: self._known]
            self._vectors = grown
        for word, index in list(self._ids.items())[self._known :]:
            self._vectors[index] = word_vector(word, self.width)
        self._known = len(self._ids)
        return self._vectors


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
        if self.tokenizer is None:
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
            "tokenizer": _tokenizer_hash(self.tokenizer),
            "weights": weights_fingerprint(self.model),
        }

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before any is cut, by the tokenizer alone."""
        if self.tokenizer is None:
            return [len(split_words(caption)) for caption in captions]
        if not captions:
            return []
        with muted("transformers.tokenization_utils_base"):  # long captions are counted, and told once
            return [len(ids) for ids in self.tokenizer(list(captions))["input_ids"]]

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

    def _encode_batch(self, captions: list[str]) -> tuple[list[Tensor], Tensor | None]:
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


def load_text_encoder(
    path_or_id: str, *, max_tokens: int | None = None, pad: str = "none", revision: str | None = None
) -> TextEncoder:
    """`hashing`, or the text model in a local folder or hub repository, in float32.

    A pipeline's folder (`text_encoder/` and `tokenizer/`) works as well. Reads safetensors only and runs no
    code from the repository. Raises `RecipeError` where there is no text model.
    """
    if path_or_id == HASHING:
        model = HashingTextEncoder(**({} if max_tokens is None else {"max_tokens": max_tokens})).eval()
        return TextEncoder(model, None, pad=pad, name=HASHING)
    for folder in (Path(path_or_id), Path(path_or_id) / "text_encoder"):
        if _class_name(folder) == HashingTextEncoder.__name__:
            model = HashingTextEncoder.from_pretrained(folder, low_cpu_mem_usage=False).eval()
            return TextEncoder(model, None, pad=pad, max_tokens=max_tokens, name=path_or_id)
    text_model, tokenizer = _load_transformers(path_or_id, revision)
    return TextEncoder(
        text_model, tokenizer, pad=pad, max_tokens=max_tokens, name=path_or_id, revision=revision
    )


def _load_transformers(path_or_id: str, revision: str | None) -> tuple[nn.Module, Any]:
    """(model, tokenizer) at a place; `text_encoder/` and `tokenizer/` are tried when the top holds none."""
    from transformers import AutoConfig

    problem: Exception | None = None
    for model_folder, tokenizer_folder in (("", ""), ("text_encoder", "tokenizer")):
        try:
            config = AutoConfig.from_pretrained(
                path_or_id, subfolder=model_folder, revision=revision, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            problem = problem or error
            continue
        model = _load_model(path_or_id, config, model_folder, revision)
        return model, _load_tokenizer(path_or_id, tokenizer_folder, revision)
    raise RecipeError(
        f"text encoder {path_or_id}: no text model there "
        f"({first_line(problem) if problem else 'no config.json'}). Give a folder with config.json, "
        "model.safetensors and a tokenizer, a pipeline's folder with "
        f"text_encoder/ and tokenizer/, a hub id such as openai/clip-vit-large-patch14, or {HASHING}."
    )


def _load_model(path_or_id: str, config: Any, subfolder: str, revision: str | None) -> nn.Module:
    try:
        with no_bars(), muted("transformers.modeling_utils"):  # the image half is left unread
            model, info = _model_class(config).from_pretrained(
                path_or_id,
                subfolder=subfolder,
                # Without a revision named, transformers passes over safetensors that the hub's own converter
                # offers beside a repository of .bin files.
                revision=revision or "main",
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"text encoder {path_or_id}: cannot be loaded ({first_line(error)}). "
            "It needs model.safetensors beside its config.json."
        ) from error
    if info["missing_keys"]:
        raise RecipeError(
            f"text encoder {path_or_id}: its file lacks {len(info['missing_keys'])} weights of "
            f"{type(model).__name__} (such as {sorted(info['missing_keys'])[0]}). Give a complete text model."
        )
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        model = model.get_encoder()
    model.requires_grad_(False)
    return model.eval()


def _model_class(config: Any) -> Any:
    """The text half of a two-part model, the encoder of T5's kin, else what transformers would pick."""
    import transformers

    if "CLIPTextModelWithProjection" in (config.architectures or ()):
        return transformers.CLIPTextModelWithProjection
    names = {
        "clip": "CLIPTextModel",
        "clip_text_model": "CLIPTextModel",
        "siglip": "SiglipTextModel",
        "siglip_text_model": "SiglipTextModel",
        "siglip2": "Siglip2TextModel",
        "siglip2_text_model": "Siglip2TextModel",
        "t5": "T5EncoderModel",
        "mt5": "MT5EncoderModel",
        "umt5": "UMT5EncoderModel",
    }
    return getattr(transformers, names.get(config.model_type, "AutoModel"))


def _load_tokenizer(path_or_id: str, subfolder: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    folder = Path(path_or_id) / subfolder
    # Where no vocabulary lies beside the model, transformers makes up an empty tokenizer without a word.
    found = not folder.is_dir() or any((folder / name).is_file() for name in _SUFFICIENT)
    try:
        if not found:
            raise OSError(f"none of {', '.join(_SUFFICIENT)} is in {folder}")
        with muted("transformers.tokenization_utils_tokenizers"):  # what it lacks is told below
            tokenizer = AutoTokenizer.from_pretrained(
                path_or_id, subfolder=subfolder, revision=revision, trust_remote_code=False
            )
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise RecipeError(f"text encoder {path_or_id}: {_why_no_tokenizer(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _why_no_tokenizer(error: Exception) -> str:
    """What to do about a tokenizer that does not load.

    T5's is often a sentencepiece file alone. Without the two packages that read one, transformers takes it
    for a file of tiktoken's and asks for that.
    """
    packages = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    missing = [name for name, module in packages.items() if not _importable(module)]
    if missing and re.search("tiktoken|sentencepiece|protobuf", str(error), re.IGNORECASE):
        return f"reading its tokenizer needs {' and '.join(missing)}: pip install {' '.join(missing)}"
    return (
        f"its tokenizer cannot be loaded ({first_line(error)}). Copy the tokenizer's files beside the model."
    )


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a parent is not there; blocked
        return False


def _token_limit(model: nn.Module, tokenizer: Any) -> int | None:
    """Most tokens the encoder takes: of the hashing encoder, the tokenizer, or the position table."""
    if tokenizer is None:
        return int(model.max_tokens)  # type: ignore[arg-type]
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


def _tokenizer_hash(tokenizer: Any) -> str | None:
    """A hash of what decides the token ids (not of padding, which calls leave in the tokenizer)."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = sorted(tokenizer.get_vocab().items())
    else:
        state = json.loads(backend.to_str())
        state.update(padding=None, truncation=None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
