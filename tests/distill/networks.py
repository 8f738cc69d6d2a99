"""Small teachers of SDXL's and of Stable Diffusion 1's make, their students, and batches for them."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from shoestring.distill.objective import DistillationObjective
from shoestring.distill.taps import tap_pairs
from shoestring.interfaces import Batch
from shoestring.models.unet_presets import SD14, SDXL, StudentSpec
from shoestring.models.unet_students import cut_student
from shoestring.objectives.noise import Conditioning, NoiseSchedule

SMALL_SDXL: dict[str, Any] = SDXL | {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "transformer_layers_per_block": [1, 1, 3],
    "attention_head_dim": [1, 2, 2],
    "cross_attention_dim": 12,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
    "norm_num_groups": 4,
}
SMALL_SD14: dict[str, Any] = SD14 | {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16, 16),
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
KOALA_1B = StudentSpec(layers_per_block=1, depth=(1, 1, 2))
KOALA_700M = StudentSpec(layers_per_block=1, depth=(1, 1, 2), mid="drop")
KOALA_TAPS = ("self_attention", "outer_blocks")
SCHEDULE = NoiseSchedule.from_config(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)


def make_teacher(config: dict[str, Any] = SMALL_SDXL) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**config)


def make_student(
    spec: StudentSpec = KOALA_1B, config: dict[str, Any] = SMALL_SDXL, *, shaken: float = 0.02
) -> UNet2DConditionModel:
    """Cut from `make_teacher`'s, each weight moved a little, so that no two features are alike by chance."""
    student = copy.deepcopy(_cut(spec, json.dumps(config)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in student.parameters():
            weight += shaken * torch.randn(weight.shape, generator=generator)
    return student


@cache
def _cut(spec: StudentSpec, config: str) -> UNet2DConditionModel:
    return cut_student(make_teacher(json.loads(config)).state_dict(), spec, json.loads(config))


def make_batch(count: int = 3, first: int = 0, size: int = 8) -> Batch:
    """Images (count, 4, size, size), text of 5 tokens (12 wide), pooled text (10 wide), sizes and crops."""
    index = torch.arange(first, first + count)

    def rows(*shape: int, stream: int) -> torch.Tensor:
        one = [
            torch.randn(shape, generator=torch.Generator().manual_seed(1000 * stream + int(i))) for i in index
        ]
        return torch.stack(one)

    sizes = torch.tensor([[64, 96, 0, 16, 64, 64]]).repeat(count, 1) + index[:, None]
    return Batch(
        index=index,
        latents=rows(4, size, size, stream=1),
        text=rows(5, 12, stream=2),
        text_mask=None,
        extra={"pooled": rows(10, stream=3), "size_crop": sizes},
    )


def make_objective(
    student: UNet2DConditionModel | None = None,
    teacher: UNet2DConditionModel | None = None,
    *,
    spec: StudentSpec = KOALA_1B,
    config: dict[str, Any] = SMALL_SDXL,
    taps: tuple[str, ...] = KOALA_TAPS,
    caption_drop: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> DistillationObjective:
    student = student or make_student(spec, config)
    pairs = tap_pairs(dict(student.config), config, spec, taps)
    return DistillationObjective(
        student,
        teacher or make_teacher(config),
        SCHEDULE,
        Conditioning(config, caption_drop=caption_drop, seed=seed),
        pairs,
        seed=seed,
        **options,
    )
