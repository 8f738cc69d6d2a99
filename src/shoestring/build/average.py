"""Weights of finished runs: read by part, and averaged into a new pipeline.

The published Stage C is such an average, half and half, of two runs (arXiv 2306.00637, appendix E).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shoestring.errors import CheckpointError
from shoestring.models.hub import fetch_folder
from shoestring.models.network_files import INDEX
from shoestring.models.wuerstchen_vqgan import PaellaVQModel
from shoestring.storage import atomic_path, exported, read_json

LATENTS = ("latents_of", "latents_mean", "latents_std", "decoder_latents_of")
"""Settings of a pipeline by which its networks mean other latents by the same numbers."""

INDIFFERENT = {
    *("_diffusers_version", "_name_or_path", "default_steps", "default_guidance", "decoder_steps"),
    *("sample_size", "pos_interp_scale", "scale_factor"),
}
"""Settings that may differ between runs whose weights are averaged; the first run's are kept."""

NAMES = {"prior": ("prior", "prior_prior")}
"""Where else a part may lie in a pipeline."""


def read_part(path_or_id: str, name: str) -> dict[str, Tensor]:
    """The weights of a part (a subfolder) of a run, a pipeline folder or a hub repository.

    Raises `CheckpointError` where there is none or its file is damaged.
    """
    folder = _folder(path_or_id, name)
    for each in NAMES.get(name, (name,)):
        if files := sorted((folder / each).glob("*.safetensors")):
            return _read(files)
    raise CheckpointError(
        f"{path_or_id}: has no {name} (no {folder / name}/*.safetensors). Give a run that has."
    )


def begin_with(network: nn.Module, path_or_id: str, name: str) -> None:
    """Start from a part of what another run exported; raises `CheckpointError` for another network."""
    state: dict[str, Tensor] = read_part(path_or_id, name)
    wanted = network.state_dict()
    odd = sorted(
        key
        for key in {*state, *wanted}
        if key not in state or key not in wanted or state[key].shape != wanted[key].shape
    )
    if odd:
        raise CheckpointError(
            f"init {path_or_id}: its {name} is not the recipe's: {odd[0]} differs (and {len(odd) - 1} more). "
            "Use the `model` section that it was trained with."
        )
    network.load_state_dict(state)


def average(runs: Sequence[str], out: Path, weights: Sequence[float] | None = None) -> list[str]:
    """Write the first run's pipeline into `out`, with the weights of its parts averaged over all runs.

    Only parts in which runs differ; `weights` (one a run, adding up to 1) are equal by default.
    Returns the names of the averaged parts. Raises `CheckpointError` where runs are not of one kind.
    """
    shares = list(weights or [1 / len(runs)] * len(runs))
    folders = [_folder(run, "") for run in runs]
    if len(runs) < 2 or len(shares) != len(runs) or abs(sum(shares) - 1) > 1e-6:
        raise CheckpointError(
            f"weights {shares} for {len(runs)} runs: give two runs or more, and a weight for each, 1 in all."
        )
    _check_settings(runs, folders, Path(INDEX))
    averaged = []
    with atomic_path(out) as aside:
        shutil.copytree(folders[0], aside)
        for file in sorted(aside.rglob("*.safetensors")):
            name = file.relative_to(aside)
            states = [_read([folder / name]) if (folder / name).is_file() else None for folder in folders]
            first = _read([folders[0] / name])
            for run, state in zip(runs, states, strict=True):
                if state is None or {k: t.shape for k, t in state.items()} != {
                    k: t.shape for k, t in first.items()
                }:
                    raise CheckpointError(
                        f"{run}: its {name.parent} is not the same network as that of {runs[0]}."
                    )
            known = [state for state in states if state is not None]
            if all(torch.equal(first[key], state[key]) for state in known[1:] for key in first):
                continue
            _check_settings(runs, folders, name.parent / "config.json")
            save_file({key: _mean([state[key] for state in known], shares) for key in first}, file)
            averaged.append(name.parent.as_posix())
        if "vqgan" in averaged:  # its scale follows from its last norm
            vqgan = PaellaVQModel.from_pretrained(
                aside / "vqgan", use_safetensors=True, low_cpu_mem_usage=False
            )
            vqgan.settle_scale()
            vqgan.save_config(aside / "vqgan")
    return averaged


def _check_settings(runs: Sequence[str], folders: Sequence[Path], file: Path) -> None:
    """Raise `CheckpointError` where runs have settings by which equal shapes mean other things."""
    first, *others = (read_json(path) if (path := folder / file).is_file() else None for folder in folders)
    for run, other in zip(runs[1:], others, strict=True):
        if first is None or other is None:
            continue
        keys = sorted({*first, *other} - INDIFFERENT)
        if odd := [key for key in keys if first.get(key) != other.get(key)]:
            what = "of other latents" if odd[0] in LATENTS else f"{odd[0]} differs"
            raise CheckpointError(
                f"{run}: not to be averaged with {runs[0]}: {what} ({file}). "
                "Average runs of one recipe on one store."
            )


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean, in float32; whole numbers (counts of batches) are the first one's."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    total = sum(share * tensor.float() for share, tensor in zip(shares, tensors, strict=True))
    assert isinstance(total, Tensor), "there is at least one"
    return total.to(tensors[0].dtype)


def _folder(path_or_id: str, name: str) -> Path:
    folder = exported(path_or_id)
    if folder.is_dir():
        return folder
    patterns = [f"{each}/*" for each in NAMES.get(name, (name,))] if name else None
    return fetch_folder(path_or_id, patterns)


def _read(files: Sequence[Path]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: is damaged ({error}). Export or download it again.") from error
    return state
