"""Tiny real parts of Stable Diffusion's and SDXL's pipelines: U-Nets, CLIP encoders, autoencoders."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from shoestring.models.sdxl_text import SdxlTextPair, SdxlTokenizerPair
from shoestring.models.text_encoders import HashingTextEncoder, TextEncoder
from shoestring.pipelines.unet import make_unet_pipeline
from shoestring.sampling.schedulers import make_noise_scheduler

LIMIT = 16  # tokens that the CLIP encoders take
WIDTH = 16  # of each CLIP encoder, and of hashed text
POOLED = 12
SIZE = 16  # pixels of a picture
SCHEDULE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": None,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [1, 2],
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}
"""A mid-less U-Net as KOALA-700M's in small, without added conditions."""


def unet(*, added: int | None = None, **changes: Any) -> UNet2DConditionModel:
    """That U-Net, drawn anew; `added` is the width of SDXL's pooled text."""
    torch.manual_seed(0)
    more: dict[str, Any] = {}
    if added is not None:
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": added + 6 * 8,
        }
    network = UNet2DConditionModel(**{**UNET, **more, **changes})
    for parameter in network.parameters():  # else text and its pooled state hardly matter
        if parameter.ndim > 1:
            parameter.data.mul_(1.5)
    return network.eval()


def sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    """One for both CLIP encoders."""
    return unet(added=POOLED, cross_attention_dim=2 * WIDTH, **changes)


@cache
def tokenizer() -> CLIPTokenizer:
    """CLIP's own class with a vocabulary of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz,"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LIMIT)


def clip(seed: int, kind: Any = CLIPTextModel) -> nn.Module:
    """A CLIP text model of two layers."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer()),
        max_position_embeddings=LIMIT,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=POOLED,
        bos_token_id=tokenizer().bos_token_id,
        eos_token_id=tokenizer().eos_token_id,
    )
    model: nn.Module = kind(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def sdxl_text() -> TextEncoder:
    """SDXL's pair of encoders."""
    pair = SdxlTextPair(clip(1), clip(2, CLIPTextModelWithProjection))
    return TextEncoder(pair.eval(), SdxlTokenizerPair(tokenizer(), tokenizer()), pad="encoder")


def clip_text(**settings: Any) -> TextEncoder:
    """Stable Diffusion's encoder, padded as its pipeline does."""
    return TextEncoder(clip(1), tokenizer(), **{"pad": "encoder", **settings})


def hashed_text() -> TextEncoder:
    """Hashed words: neither weights, padding nor pooled text."""
    return TextEncoder(HashingTextEncoder(width=WIDTH, max_tokens=12))


def kl(**changes: Any) -> AutoencoderKL:
    """An AutoencoderKL of factor 2."""
    torch.manual_seed(3)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=0.13025,
        **changes,
    )
    return network.eval()


def tiny(**changes: Any) -> AutoencoderTiny:
    """An AutoencoderTiny of factor 2."""
    torch.manual_seed(4)
    sizes: dict[str, Any] = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
    return AutoencoderTiny(**{**sizes, **changes}).eval()


def sdxl_pipeline() -> Any:
    """A student of a tiny SDXL as it is exported: stock parts, 3 steps, guidance 3.5."""
    text = sdxl_text()
    return make_unet_pipeline(
        sdxl_unet(),
        text=text,
        vae=kl(),
        scheduler=make_noise_scheduler("euler", SCHEDULE, prediction="epsilon"),
        null="zeros",
        steps=3,
        guidance=3.5,
        size=SIZE,
        max_tokens=text.max_tokens,
        pad=text.pad,
    )
