"""SDXL's two text encoders as one: CLIP ViT-L and OpenCLIP ViT-bigG, joined by channel.

    captions --SdxlTokenizerPair--> ids (B, 77) of each --SdxlTextPair--> tokens (B, 77, 768 + 1280)
                                                                    `---> pooled (B, 1280)

A token is the last layer's input in both encoders (`hidden_states[-2]`), without the final norm; `pooled` is
the second encoder's projected end mark. Neither encoder is told of padding, and the U-Net attends to all 77
positions, so the pair knows one padding: `encoder`. Each tokenizer pads with a mark of its own: the end mark,
and "!". Source: SDXL (arXiv 2307.01952, section 2.1); `encode_prompt` of diffusers' pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.errors import RecipeError
from shoestring.models.text_files import TextFiles, token_counts, tokenizer_hash
from shoestring.storage import fingerprint


class SdxlTextPair(nn.Module):
    """A `CLIPTextModel` and a `CLIPTextModelWithProjection` that read the same captions."""

    def __init__(self, text_encoder: nn.Module, text_encoder_2: nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2

    @property
    def width(self) -> int:
        """Components of a token: both encoders' together."""
        return sum(int(config.hidden_size) for config in self._configs)

    @property
    def max_tokens(self) -> int:
        """Positions that both encoders have."""
        return min(int(config.max_position_embeddings) for config in self._configs)

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (B, L) of the first and of the second tokenizer -> tokens (B, L, C1 + C2), pooled (B, P)."""
        first = self.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder_2(input_ids=ids_2, output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds

    @property
    def _configs(self) -> tuple[Any, Any]:
        return self.text_encoder.config, self.text_encoder_2.config


class SdxlTokenizerPair:
    """The tokenizers of both encoders."""

    def __init__(self, tokenizer: Any, tokenizer_2: Any) -> None:
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2

    @property
    def max_tokens(self) -> int:
        """Positions that captions are padded and cut to."""
        return min(int(each.model_max_length) for each in self._both)

    def ids(self, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Captions -> ids (B, max_tokens) of each tokenizer, padded with its own mark or cut."""
        first, second = (
            each(
                list(captions),
                padding="max_length",
                truncation=True,
                max_length=max_tokens,
                padding_side="right",
                return_tensors="pt",
            )["input_ids"]
            for each in self._both
        )
        return first, second

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before any is cut, by the tokenizer that makes more of it."""
        counts = (token_counts(each, captions) for each in self._both)
        return [max(both) for both in zip(*counts, strict=True)]

    def hash(self) -> str:
        """A hash of what decides the ids of both, their padding included: its states are read."""
        return fingerprint([[tokenizer_hash(each), int(each.pad_token_id)] for each in self._both])[:16]

    @property
    def _both(self) -> tuple[Any, Any]:
        return self.tokenizer, self.tokenizer_2


def second_of(first: TextFiles) -> TextFiles | None:
    """The second text encoder of an SDXL pipeline, given the first; None where that is another pipeline.

    Told by the classes: SDXL's first has no projection and its second has one. (Of SD3's both have, FLUX's
    second is a T5.)
    """
    if first.model_folder != "text_encoder" or first.config.model_type != "clip_text_model":
        return None
    if "CLIPTextModelWithProjection" in (first.config.architectures or ()):
        return None
    second = first.beside("text_encoder_2", "tokenizer_2")
    if second is None or "CLIPTextModelWithProjection" not in (second.config.architectures or ()):
        return None
    return second


def check_padding(pad: str) -> None:
    """Raise `RecipeError` for another padding than `encoder`."""
    if pad != "encoder":
        raise RecipeError(
            f"pad {pad!r}: SDXL attends to all positions of its text, padding included. Use pad 'encoder'."
        )


def check_tokens(max_tokens: int | None, limit: int) -> None:
    """Raise `RecipeError` for another number of tokens than SDXL's pipelines encode."""
    if max_tokens not in (None, limit):
        raise RecipeError(
            f"max_tokens {max_tokens}: SDXL's text has always {limit} positions. Leave max_tokens out."
        )
