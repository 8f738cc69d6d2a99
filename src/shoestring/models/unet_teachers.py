"""U-Nets that others trained, as teachers: configuration, noise schedule, and weights read when asked for.

a run's pipeline/, a pipeline, a U-Net's folder, a hub id   config.json + safetensors (whole or sharded)
FILE.safetensors, OWNER/NAME/FILE.safetensors on the hub    SDXL, SD 1.x or 2.x in one file
             |
          Teacher: .config  .tensors (one read from disk each time)  .scheduler  .identity
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn

from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.hub import first_line
from shoestring.models.network_files import (
    CONFIG,
    LazyTensors,
    NetworkFolder,
    damaged,
    download_file,
    find_network,
    open_safetensors,
)
from shoestring.models.quiet import muted
from shoestring.models.unet_original import find_unet
from shoestring.models.unet_students import arguments
from shoestring.storage import fingerprint

STABLE_DIFFUSION_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
"""Of SD 1.x, 2.x and SDXL alike: what is taken where a U-Net comes without a scheduler."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What `objectives/noise.py`, a neighbour in its row, knows too."""

_SAMPLED = 64
"""Values at the start of each tensor that a fingerprint reads: any training changes some of them."""


@dataclass(frozen=True)
class Teacher:
    """A U-Net to learn from: `config` (arguments), `tensors` by diffusers' names, its noise `scheduler`."""

    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    scheduler: DDPMScheduler

    @cached_property
    def identity(self) -> str:
        """Fingerprint of configuration, schedule, and each tensor's name, shape, type and first values."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(tensor.flatten()[:_SAMPLED].contiguous().view(torch.uint8).numpy().tobytes())
        schedule = {name: self.scheduler.config.get(name) for name in sorted(STABLE_DIFFUSION_SCHEDULE)}
        return fingerprint({"config": self.config, "schedule": schedule, "tensors": digest.hexdigest()})


def open_teacher(path_or_id: str | Path, *, revision: str | None = None) -> Teacher:
    """The U-Net in a run (its newest export), a pipeline, a folder of its own, on the hub, or in one file.

    Of the hub only what is needed is downloaded. One file is SDXL, SD 1.x or SD 2.x, whole or the U-Net
    alone, in the original layout or diffusers'. The schedule is that of the pipeline around the U-Net; else
    Stable Diffusion's, predicting epsilon unless the file says v. SDXL-Lightning's file for one step, which
    predicts the sample and does not say so, is to be given as a pipeline with its scheduler.

    Raises `CheckpointError` where there is no U-Net (saying what there is), or one whose weights are absent,
    damaged or not safetensors, or whose schedule is not one of betas.
    """
    path = Path(path_or_id)
    if path.suffix == ".safetensors":
        return _from_file(path if path.is_file() else download_file(str(path_or_id), revision))
    found = find_network(path_or_id, ["unet"], revision=revision)
    if (kind := found.kind()) != UNet2DConditionModel.__name__:
        raise CheckpointError(
            f"{path_or_id}: its network is of the class {kind}, not {UNet2DConditionModel.__name__}. Give a "
            "U-Net of the Stable Diffusion kind."
        )
    config = _buildable(found)
    schedule = found.scheduler() or STABLE_DIFFUSION_SCHEDULE
    return Teacher(config, found.tensors(), _scheduler(schedule, str(path_or_id)))


def load_unet(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
    revision: str | None = None,
) -> UNet2DConditionModel:
    """The teacher's network in `dtype`, to look at and not to train: eval, no gradients.

    `int8` keeps the weights of its linear layers as 8-bit numbers with a scale a row (torchao, weight-only).
    Where the file has the same number type, weights stay mapped from it until they are moved. Raises as
    `open_teacher` does, and `RecipeError` for `int8` without torchao.
    """
    teacher = open_teacher(path_or_id, revision=revision)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**teacher.config)
    _check_tensors(unet.state_dict(), teacher.tensors, str(path_or_id))
    unet.load_state_dict({name: tensor.to(dtype) for name, tensor in teacher.tensors.items()}, assign=True)
    unet.eval().requires_grad_(False)
    if int8:
        _quantize(unet)
    return unet


def _buildable(found: NetworkFolder) -> dict[str, Any]:
    """The arguments in its configuration, where diffusers builds a U-Net of them; no memory is taken."""
    config = arguments(found.config())
    try:
        with torch.device("meta"):
            UNet2DConditionModel(**config)
    except Exception as error:  # diffusers checks some of them; the others fail wherever they are used
        raise CheckpointError(
            f"{found.path / CONFIG}: no U-Net can be built of it ({first_line(error)}). Export or download "
            "it again."
        ) from error
    return config


def _quantize(unet: nn.Module) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise RecipeError(
            'teacher in int8: needs torchao, which is not installed. pip install "shoestring[int8]"'
        ) from error
    quantize_(unet, Int8WeightOnlyConfig())


def _from_file(path: Path) -> Teacher:
    """The U-Net of a whole Stable Diffusion, or alone, in one file."""
    file = open_safetensors(path)
    try:
        found = find_unet(
            list(file.keys()), lambda name: tuple(file.get_slice(name).get_shape()), file.get_tensor
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except SafetensorError as error:
        raise damaged(path, error) from error
    tensors = LazyTensors({name: (path, there) for name, there in found.names.items()})
    return Teacher(found.config, tensors, _scheduler(STABLE_DIFFUSION_SCHEDULE | found.schedule, str(path)))


def _scheduler(config: Mapping[str, Any], given: str) -> DDPMScheduler:
    """The noise schedule a repository was trained on, whichever sampler its scheduler is."""
    kind, prediction = config.get("_class_name", "scheduler"), config.get("prediction_type", "epsilon")
    if "beta_start" not in config and config.get("trained_betas") is None:
        raise CheckpointError(
            f"{given}: its {kind} has no betas, so the noise it learned is not known here. "
            "Give a U-Net of the Stable Diffusion kind."
        )
    if prediction not in PREDICTIONS or "sigma_data" in config:
        raise CheckpointError(
            f"{given}: its {kind} predicts {prediction!r} on another family of noise. "
            f"Give a U-Net that predicts {', '.join(PREDICTIONS)} on a table of betas."
        )
    with muted("diffusers.configuration_utils"):
        scheduler: DDPMScheduler = DDPMScheduler.from_config({"clip_sample": False, **config})
    return scheduler


def _check_tensors(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise `CheckpointError` unless the weights have the configuration's names and shapes."""
    odd = own.keys() ^ given.keys() or {name for name in own if own[name].shape != given[name].shape}
    if odd:
        raise CheckpointError(
            f"{what}: {len(odd)} tensors do not fit its configuration, such as {min(odd)}. "
            "Export or download it again."
        )
