"""Prompts as what a network sees: encoded, repeated for each picture, conditional above unconditional."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shoestring.models.text_encoders import TextEncoder, collate

Text = tuple[Tensor, Tensor | None]
"""States (B, L, C), and which of them are real tokens (B, L); None: all are."""

logger = logging.getLogger(__name__)


def encode_prompts(encoder: TextEncoder, prompts: Sequence[str]) -> Text:
    """Prompts as text on the CPU, with no mask where the encoder pads; tells of those that are cut."""
    return encode_pooled(encoder, prompts)[0]


def encode_pooled(encoder: TextEncoder, prompts: Sequence[str]) -> tuple[Text, Tensor | None]:
    """The same, and the pooled text (B, P) where the encoder gives one."""
    for line in encoder.warnings(list(dict.fromkeys(prompts))):
        logger.warning(line)
    encoded = encoder.encode(prompts)
    states, mask = collate(encoded.tokens)
    return (states, None if encoder.padded else mask), encoded.pooled


def repeat_text(text: Text, count: int, device: torch.device) -> Text:
    """Each row `count` times in a row, on the device."""
    states, mask = text
    return repeat(states, count, device), None if mask is None else repeat(mask, count, device)


def repeat(tensor: Tensor, count: int, device: torch.device) -> Tensor:
    """Each row `count` times in a row, on the device."""
    if count < 1:
        raise ValueError(f"num_images_per_prompt {count}: must be at least 1.")
    return tensor.to(device).repeat_interleave(count, dim=0)


def stack_text(first: Text, second: Text) -> Text:
    """Two texts with their masks one above the other, the shorter padded with tokens that do not count."""
    length = max(first[0].shape[1], second[0].shape[1])
    texts, masks = [], []
    for text, mask in (first, second):
        missing = length - text.shape[1]
        if mask is None and (missing or first[1] is not None or second[1] is not None):
            mask = text.new_ones(text.shape[:2], dtype=torch.bool)
        texts.append(nn.functional.pad(text, (0, 0, 0, missing)))
        masks.append(None if mask is None else nn.functional.pad(mask.bool(), (0, missing)))
    stacked = torch.cat(texts)
    if masks[0] is None or masks[1] is None:
        return stacked, None
    return stacked, torch.cat([masks[0], masks[1]])
