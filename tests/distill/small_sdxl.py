"""A small SDXL of stock parts: a U-Net with random weights, both CLIPs, a VAE, and batches to train on."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from shoestring.interfaces import Batch

SIDE, TEXT, POOLED, LIMIT = 8, 20, 12, 12
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIG: dict[str, Any] = {
    "sample_size": SIDE,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "cross_attention_dim": TEXT,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": POOLED + 6 * 4,
    "norm_num_groups": 4,
}


def make_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**{**CONFIG, **changes})


def make_batch(count: int = 4, first: int = 0) -> Batch:
    """Images (count, 4, 8, 8) and SDXL's conditions; an image's numbers depend on its position alone."""
    index = torch.arange(first, first + count)

    def rows(stream: int, *shape: int) -> Tensor:
        seeds = [1000 * stream + number for number in index.tolist()]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    return Batch(
        index=index,
        latents=rows(1, 4, SIDE, SIDE),
        text=rows(2, LIMIT, TEXT),
        text_mask=None,
        extra={
            "pooled": rows(3, POOLED),
            "size_crop": torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]]).repeat(count, 1),
        },
    )


def given(batch: Batch) -> dict[str, Any]:
    """A batch's conditions as the U-Net takes them, written out."""
    added = {"text_embeds": batch.extra["pooled"], "time_ids": batch.extra["size_crop"].float()}
    return {"encoder_hidden_states": batch.text, "added_cond_kwargs": added}


def make_pipeline(unet: UNet2DConditionModel, scheduler: Any) -> StableDiffusionXLPipeline:
    """The stock pipeline at a VAE scale of 1: latents are as large as pictures."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    words = {piece: number for number, piece in enumerate(pieces)}
    tokenizers = [CLIPTokenizer(vocab=words, merges=[], model_max_length=LIMIT) for _ in range(2)]

    def text(kind: Any, width: int) -> Any:
        sizes = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        marks = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
        config = CLIPTextConfig(
            vocab_size=len(words),
            max_position_embeddings=LIMIT,
            hidden_size=width,
            projection_dim=POOLED,
            **sizes,
            **marks,
        )
        return kind(config).eval()

    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipeline = StableDiffusionXLPipeline(
            vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=SIDE).eval(),
            text_encoder=text(CLIPTextModel, 8),
            text_encoder_2=text(CLIPTextModelWithProjection, TEXT - 8),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=unet,
            scheduler=scheduler,
            add_watermarker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
