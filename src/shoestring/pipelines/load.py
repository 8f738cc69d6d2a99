"""`shoestring.load`: one call opens a run, a pipeline folder or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import is_accelerate_available
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from shoestring.errors import CheckpointError
from shoestring.models.quiet import muted, no_bars
from shoestring.pipelines.microdit import MicroDiTPipeline
from shoestring.storage import RunFolder, read_json

_INDEX = "model_index.json"
_OURS = {"MicroDiTPipeline": MicroDiTPipeline}


def load(path_or_id: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """The pipeline in a run folder (its newest export), a pipeline folder, or a hub repository.

    Keyword arguments go to diffusers' `from_pretrained` (`dtype`, `quantization_config`, `revision`,
    ...). Reads safetensors only. Raises `CheckpointError` where there is no pipeline.
    """
    name = str(path_or_id)
    folder = Path(name)
    if folder.is_dir() and (folder / "recipe.yaml").is_file():
        folder = RunFolder(folder).pipeline
        name = str(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"{path_or_id}: this run has no pipeline yet; it is written at the first checkpoint. "
                "Let `shoestring train --resume` reach one."
            )
    index = folder / _INDEX if folder.is_dir() else _download_index(name, kwargs.get("revision"))
    if not index.is_file():
        raise CheckpointError(f"{name}: no pipeline here (no {_INDEX}). Give a run or a pipeline folder.")
    try:
        class_name = read_json(index)["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: cannot be read ({error}). Export or download it again.") from error
    pipeline_class = _OURS.get(str(class_name), DiffusionPipeline)
    kwargs.setdefault("dtype", torch.float32)
    kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())  # else diffusers warns at each part
    try:
        # diffusers writes into the tiny autoencoder's configuration what it then warns of when reading it.
        with no_bars(), muted("diffusers.configuration_utils", about="AutoencoderTiny"):
            return pipeline_class.from_pretrained(name, use_safetensors=True, **kwargs)
    except Exception as error:  # diffusers raises all kinds for files that are not what they should be
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name}: a part of the pipeline is missing or damaged ({reason}). Export or download it again."
        ) from error


def _download_index(name: str, revision: str | None) -> Path:
    try:
        return Path(hf_hub_download(name, _INDEX, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name}: neither a folder here nor a hub repository that can be read ({reason}). "
            "Give a run folder, a pipeline folder or a hub id."
        ) from error
