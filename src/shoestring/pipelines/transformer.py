"""The network of a run, a pipeline folder or a hub repository, without the encoders beside it."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shoestring.errors import CheckpointError
from shoestring.models.hub import fetch_folder
from shoestring.models.microdit import MicroDiT
from shoestring.storage import exported, read_json


def load_transformer(path_or_id: str | Path) -> MicroDiT:
    """The network in `transformer/`, in the number type it is stored in, mapped from disk.

    Takes a run folder (its newest export), a pipeline folder, a folder that holds `transformer/` alone, or a
    hub id. Raises `CheckpointError` where there is none, a damaged one, or one of another architecture.
    """
    folder = _find(path_or_id) / "transformer"
    try:
        config = read_json(folder / "config.json")
        class_name = config.pop("_class_name")
        arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: cannot be read ({error}). Export or download it again."
        ) from error
    if class_name != MicroDiT.__name__:
        raise CheckpointError(f"{path_or_id}: its network is a {class_name}, not a {MicroDiT.__name__}.")
    state: dict[str, Tensor] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):  # one, or several with an index
            state |= load_file(file)
        return MicroDiT.around(state, arguments)
    except (OSError, SafetensorError, TypeError, CheckpointError) as error:
        raise CheckpointError(
            f"{path_or_id}: its transformer is damaged ({error}). Export or download it again."
        ) from error


def _find(path_or_id: str | Path) -> Path:
    """The folder that holds `transformer/`."""
    folder = exported(path_or_id)
    if (folder / "transformer" / "config.json").is_file():
        return folder
    if Path(path_or_id).exists():
        raise CheckpointError(
            f"{path_or_id}: no pipeline here (no model_index.json), nor a network alone "
            "(no transformer/config.json). Give a run that has a checkpoint, a pipeline folder or a hub id."
        )
    return fetch_folder(str(path_or_id), ["transformer/*"])
