"""Text models of transformers with their tokenizers, read from a folder or a hub repository.

Reads safetensors only (`model.fp16.safetensors` where there is no other) and runs no code from a repository.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from torch import nn

from shoestring.errors import RecipeError
from shoestring.models.autoencoders import refuse_single_file
from shoestring.models.hub import first_line
from shoestring.models.quiet import muted, no_bars

_SUFFICIENT = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class TextFiles:
    """A text model's configuration, and where it and its tokenizer lie within `place`."""

    place: str
    revision: str | None
    config: Any  # of transformers
    model_folder: str = ""
    tokenizer_folder: str = ""

    @classmethod
    def find(cls, place: str, revision: str | None) -> TextFiles:
        """The text model at the top of a folder or repository, else the one in its `text_encoder/`.

        Raises `RecipeError` where there is none.
        """
        refuse_single_file("text encoder", place)
        problem: Exception | None = None
        for folders in (("", ""), ("text_encoder", "tokenizer")):
            try:
                return cls(place, revision, _read_config(place, folders[0], revision), *folders)
            except (OSError, ValueError, KeyError) as error:
                problem = problem or error
        raise RecipeError(
            f"text encoder {place}: no text model there "
            f"({first_line(problem) if problem else 'no config.json'}). Give a folder with config.json, "
            "model.safetensors and a tokenizer, a pipeline's folder with "
            "text_encoder/ and tokenizer/, a hub id such as openai/clip-vit-large-patch14, or hashing."
        )

    def beside(self, model_folder: str, tokenizer_folder: str) -> TextFiles | None:
        """Another text model of the same place; None where its folder holds no `config.json`."""
        try:
            if not _has_config(self.place, model_folder, self.revision):
                return None
            config = _read_config(self.place, model_folder, self.revision)
        except (OSError, ValueError, KeyError) as error:
            raise RecipeError(
                f"text encoder {self.place}: whether there is a {model_folder}/ cannot be told "
                f"({first_line(error)}). Reach the hub once, or give a local folder."
            ) from error
        return TextFiles(self.place, self.revision, config, model_folder, tokenizer_folder)

    def model(self) -> nn.Module:
        """The network in float32, for use alone; of a model in two parts the text encoder."""
        try:
            with no_bars(), muted("transformers.modeling_utils"):  # the image half is left unread
                model, info = self._read_weights()
        except (OSError, ValueError, RuntimeError) as error:
            raise RecipeError(
                f"text encoder {self.place}: cannot be loaded ({first_line(error)}). "
                "It needs model.safetensors (or model.fp16.safetensors) beside its config.json."
            ) from error
        if info["missing_keys"]:
            raise RecipeError(
                f"text encoder {self.place}: its file lacks {len(info['missing_keys'])} weights of "
                f"{type(model).__name__} (such as {sorted(info['missing_keys'])[0]}). "
                "Give a complete text model."
            )
        if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
            model = model.get_encoder()
        model.requires_grad_(False)
        network: nn.Module = model.eval()
        return network

    def _read_weights(self) -> tuple[Any, dict[str, Any]]:
        model, info = _model_class(self.config).from_pretrained(
            self.place,
            subfolder=self.model_folder,
            # Without a revision named, transformers passes over safetensors that the hub's own converter
            # offers beside a repository of .bin files.
            revision=self.revision or "main",
            variant=self._variant(),
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
        return model, info

    def _variant(self) -> str | None:
        """`fp16` where weights are in files of that name alone.

        Found out beforehand: transformers, not finding the plain ones, asks the hub's converter for them.
        """
        from transformers.utils import has_file

        def has(name: str) -> bool:
            path = f"{self.model_folder}/{name}" if self.model_folder else name
            return bool(has_file(self.place, path, revision=self.revision))

        if not has("model.fp16.safetensors"):
            return None
        return None if has("model.safetensors") or has("model.safetensors.index.json") else "fp16"

    def tokenizer(self) -> Any:
        """The tokenizer, with a padding mark."""
        from transformers import AutoTokenizer, PreTrainedConfig

        folder, is_local = Path(self.place) / self.tokenizer_folder, Path(self.place).is_dir()
        # Where no vocabulary lies beside the model, transformers makes up an empty tokenizer without a word.
        found = not is_local or any((folder / name).is_file() for name in _SUFFICIENT)
        # A pipeline's `tokenizer/` has no config.json. Unless told, transformers asks the hub for one, and
        # stops where it is offline.
        config = None if is_local or not self.tokenizer_folder else PreTrainedConfig()
        try:
            if not found:
                raise OSError(f"none of {', '.join(_SUFFICIENT)} is in {folder}")
            with muted("transformers.tokenization_utils_tokenizers"):  # what it lacks is told below
                tokenizer = AutoTokenizer.from_pretrained(
                    self.place,
                    subfolder=self.tokenizer_folder,
                    revision=self.revision,
                    config=config,
                    trust_remote_code=False,
                )
        except (OSError, ValueError, ImportError, TypeError) as error:
            raise RecipeError(f"text encoder {self.place}: {_why_no_tokenizer(error)}") from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


def token_counts(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption with its marks, before any is cut."""
    if not captions:
        return []
    with muted("transformers.tokenization_utils_base"):  # long captions are counted, and told once
        return [len(ids) for ids in tokenizer(list(captions))["input_ids"]]


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what decides the token ids (not of padding, which calls leave in the tokenizer)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = sorted(tokenizer.get_vocab().items())
    else:
        state = json.loads(backend.to_str())
        state.update(padding=None, truncation=None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


def _read_config(place: str, folder: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(place, subfolder=folder, revision=revision, trust_remote_code=False)


def _has_config(place: str, folder: str, revision: str | None) -> bool:
    """Whether `folder/config.json` is there; raises `OSError` where the hub cannot be asked."""
    from transformers.utils import cached_file

    if Path(place).is_dir():
        return (Path(place) / folder / "config.json").is_file()
    # Offline, what was once found missing counts as missing: transformers would report no connection.
    if try_to_load_from_cache(place, f"{folder}/config.json", revision=revision) is _CACHED_NO_EXIST:
        return False
    return cached_file(place, "config.json", subfolder=folder, revision=revision) is not None


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
