"""`shoestring.load`: one call opens a run, a pipeline folder or a hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import is_accelerate_available

from shoestring.data.store import split_revision
from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.hub import fetch_file, first_line
from shoestring.models.network_files import INDEX
from shoestring.models.quiet import muted, no_bars
from shoestring.pipelines.defaults import IMPORTS, SAMPLING, attach_sampling, read_sampling
from shoestring.pipelines.microdit import MicroDiTPipeline
from shoestring.pipelines.unet import UNetPipeline
from shoestring.pipelines.wuerstchen_decoder import WuerstchenDecoderPipeline
from shoestring.pipelines.wuerstchen_published import (
    PIPELINES,
    check_prior,
    combine,
    find_prior,
    is_published,
    load_published,
    missing_prior,
)
from shoestring.storage import exported, read_json

_OURS = {"MicroDiTPipeline": MicroDiTPipeline, "UNetPipeline": UNetPipeline, **PIPELINES}
_BESIDE = "beside"


def load(
    path_or_id: str | Path, *, prior: str | Path | DiffusionPipeline | None = _BESIDE, **kwargs: Any
) -> DiffusionPipeline:
    """The pipeline in a run folder (its newest export), a pipeline folder, or a hub repository.

    Keyword arguments go to diffusers' `from_pretrained` (`dtype`, `quantization_config`, `revision`,
    ...). Reads safetensors only. Raises `CheckpointError` where there is no pipeline. A stock pipeline of
    diffusers draws with the steps and guidance of the `sampling.json` beside it, where there is one.

    Published Würstchen repositories take `dtype`, `revision`, `variant`, and parts to use instead of their
    own (`decoder=...`, `prior_text_encoder=...`). Stage B and A (warp-ai/wuerstchen) are joined with Stage C,
    looked for in the folder NAME-prior, by the model card's `prior`, as the hub id NAME-prior. `prior` names
    another: a run, a folder, a hub id[@revision] or a loaded pipeline; None loads the decoder alone. With
    `prior` given, a decoder's pipeline of our own is joined likewise.
    """
    name, index = open_index(path_or_id, kwargs.get("revision"))
    kind = str(index["_class_name"])
    if "torch_dtype" in kwargs:  # as diffusers called it before
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    kwargs.setdefault("dtype", torch.float32)
    if kind != WuerstchenDecoderPipeline.__name__:
        if prior is not None and prior != _BESIDE:
            raise RecipeError(f"prior: has no effect, since {path_or_id} is a {kind}. Leave it out.")
        return _load_one(name, index, kwargs)
    if prior is None or (prior == _BESIDE and not is_published(index)):
        return _load_one(name, index, kwargs)
    return _load_joined(name, index, prior, kwargs)


def _load_one(name: str, index: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """The pipeline of one folder or repository, as its index says."""
    if is_published(index):
        return load_published(name, index, **kwargs)
    kind = str(index["_class_name"])
    numbers = None if kind in _OURS else _sampling_file(name, kwargs.get("revision"))
    sampling = None if numbers is None else read_sampling(numbers)  # before gigabytes are read
    pipeline = _load(name, kind, **kwargs)
    if sampling is not None:
        attach_sampling(pipeline, sampling)
    return pipeline


def _sampling_file(name: str, revision: str | None) -> Path | None:
    """The `sampling.json` beside a pipeline, if any."""
    if (folder := Path(name)).is_dir():
        return folder / SAMPLING if (folder / SAMPLING).is_file() else None
    try:
        return fetch_file(name, SAMPLING, revision)
    except CheckpointError:
        return None


def _load_joined(
    name: str, index: dict[str, Any], prior: str | Path | DiffusionPipeline, kwargs: dict[str, Any]
) -> DiffusionPipeline:
    """The decoder at `name` with Stage C from `prior`; keywords that begin with `prior_` are Stage C's."""
    theirs = {key.removeprefix("prior_"): kwargs.pop(key) for key in list(kwargs) if key.startswith("prior_")}
    if isinstance(prior, DiffusionPipeline):
        if theirs:
            raise RecipeError(f"prior_{next(iter(theirs))}: has no effect on a loaded prior. Leave it out.")
        return combine(name, _load_one(name, index, kwargs), prior)
    revision = None
    if prior == _BESIDE:
        prior = find_prior(name, kwargs.get("revision"))
        advice = f"{name}: {missing_prior(name)} "
    else:
        prior, revision = split_revision(str(prior))
        advice = ""
    try:  # before gigabytes of the decoder are read
        place, theirs_index = open_index(prior, revision)
    except CheckpointError as error:
        raise CheckpointError(f"{advice}({error})" if advice else str(error)) from error
    check_prior(place, str(theirs_index["_class_name"]))
    decoder = _load_one(name, index, kwargs)
    both = ("dtype", "variant")
    settings: dict[str, Any] = {name: kwargs[name] for name in both if name in kwargs}
    if revision:
        settings["revision"] = revision
    return combine(name, decoder, _load_one(place, theirs_index, settings | theirs))


def _load(name: str, kind: str, **kwargs: Any) -> DiffusionPipeline:
    pipeline_class = _OURS.get(kind, DiffusionPipeline)
    kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())  # else diffusers warns at each part
    # diffusers writes into the tiny autoencoder's configuration what it then warns of when reading it.
    with (
        no_bars(),
        muted("diffusers.configuration_utils", about="AutoencoderTiny"),
        muted(*IMPORTS),
        whole(name),
    ):
        return pipeline_class.from_pretrained(name, use_safetensors=True, **kwargs)


@contextmanager
def whole(name: str) -> Iterator[None]:
    """Within: whatever is raised over the files of the pipeline `name` becomes a `CheckpointError`."""
    try:
        yield
    except CheckpointError:  # our pipelines', of stages that do not fit together
        raise
    except Exception as error:  # diffusers raises all kinds for files that are not what they should be
        reason = shorten(first_line(error), 200, placeholder=" ...")  # some name every file there is
        raise CheckpointError(
            f"{name}: a part of the pipeline is missing or damaged ({reason}). Export or download it again."
        ) from error


def open_index(path_or_id: str | Path, revision: str | None) -> tuple[str, dict[str, Any]]:
    """(folder or hub id, its index); a run's is its newest export."""
    folder = exported(path_or_id)
    name = str(folder) if folder.is_dir() else str(path_or_id)
    index = folder / INDEX if folder.is_dir() else fetch_file(name, INDEX, revision)
    if not index.is_file() and (folder / "vqgan").is_dir():
        raise CheckpointError(
            f"{path_or_id}: is Stage A of a cascade, an autoencoder, which draws no prompts. Use it as "
            "`model.vqgan` or `data.autoencoder` in a recipe."
        )
    if not index.is_file():
        raise CheckpointError(f"{name}: no pipeline here (no {INDEX}). Give a run or a pipeline folder.")
    try:
        content = read_json(index)
        content["_class_name"]
        return name, dict(content)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: cannot be read ({error}). Export or download it again.") from error
