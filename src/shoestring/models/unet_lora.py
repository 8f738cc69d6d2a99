"""A LoRA made for a teacher's U-Net, remapped onto a student cut from it.

    file -> adapters by module -> those of modules the student has, under its names -> file

A LoRA adds (alpha / rank) B A to a weight W (Hu et al. 2021, arXiv 2106.09685). A student's module starts
from the teacher's module that `teacher_module` names, and has its shape: it takes the same A, B and alpha.
What the teacher's other modules were given is left out. Text encoders are shared: their part stays.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shoestring.errors import CheckpointError, OutputError
from shoestring.models.network_files import open_safetensors
from shoestring.models.unet_lora_names import (
    DOWN,
    PARTS,
    UP,
    kohya_name,
    place_of,
    weight_shapes,
    written_names,
)
from shoestring.models.unet_presets import StudentSpec
from shoestring.models.unet_students import student_config, teacher_module
from shoestring.storage import atomic_path, parse_json

__all__ = ["Adapter", "Cut", "Remapped", "adapters_in", "read_lora", "remap", "remap_lora", "write_lora"]

Cut = tuple[StudentSpec, Mapping[str, Any]]
"""What a student keeps of its teacher, and the teacher's configuration."""

_PEFT = "lora_adapter_metadata"
"""Where diffusers keeps peft's settings in a file's metadata: `unet.lora_alpha` and so on, as JSON."""

_STALE = {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}
"""Hashes of the tensors of the file that was read."""

_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoCon with a core",
    "lora_B.bias": "LoRA with biases",
    ".diff": "weights' differences",
}
_ALLOWED = "pairs lora_A / lora_B, lora.down / lora.up or lora_down / lora_up, with alphas or without"


@dataclass(frozen=True)
class Adapter:
    """What a LoRA adds to the weight of one module: (alpha / rank) up @ down.

    part    "unet", "text_encoder" or "text_encoder_2"
    module  its name there, such as `mid_block.attentions.0.proj_in`
    down    A (rank, in), for a convolution (rank, in, kernel, kernel)
    up      B (out, rank), for a convolution (out, rank, 1, 1)
    """

    part: str
    module: str
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def fits(self, weight: Sequence[int]) -> bool:
        """Whether B A has the shape of a weight (out, in) or (out, in, kernel, kernel)."""
        return (*self.up.shape[:1], *self.down.shape[1:]) == tuple(weight) and self.up.ndim == len(weight)


@dataclass(frozen=True)
class Remapped:
    """What became of a LoRA: adapters of the student, of the text encoders, modules that are gone."""

    kept: tuple[Adapter, ...]
    text: tuple[Adapter, ...]
    dropped: tuple[str, ...]


def remap_lora(source: Path, out: Path, cuts: Sequence[Cut], *, kohya: bool = False) -> Remapped:
    """Write to `out` what the LoRA in `source`, made for the teacher, is for its student.

    cuts    how the student was cut: usually once, (spec, the teacher's configuration); a student of a
            student has two, the first teacher's first
    kohya   False: diffusers' form (`unet.<module>.lora_A.weight`, ranks and alphas in the metadata) for
            `load_lora_weights` of stock pipelines. True: kohya's names, and alphas as tensors, which user
            interfaces read; diffusers reads the U-Net's too, but for alphas that differ among attention
            matrices.

    The source's metadata stays, but for hashes of its tensors. Raises `CheckpointError` for a file that is
    no LoRA of this teacher, is of another kind than pairs of A and B, is damaged, or holds nothing that the
    student has; `OutputError` where `out` exists or cannot be written.
    """
    if out.exists():
        raise OutputError(f"{out}: is there already. Choose another name, or remove it first.")
    tensors, metadata = read_lora(source)
    try:
        remapped = _through(adapters_in(tensors, metadata, cuts[0][1]), cuts)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    counts = json.dumps({"kept": len(remapped.kept), "dropped": len(remapped.dropped)})
    kept = {name: value for name, value in metadata.items() if name not in _STALE}
    both = [*remapped.kept, *remapped.text]
    several = cuts[0][1].get("addition_embed_type") == "text_time"  # the U-Net is SDXL's
    write_lora(out, both, {**kept, "shoestring.remapped": counts}, kohya=kohya, several=several)
    return remapped


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises `CheckpointError` for anything else."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Give a LoRA, FILE.safetensors.")
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: not a .safetensors file. Save the LoRA as one with the program that made it."
        )
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return tensors, file.metadata() or {}


def adapters_in(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], teacher_config: Mapping[str, Any]
) -> list[Adapter]:
    """The adapters that a LoRA's tensors make up, by modules of the teacher and of its text encoders.

    A module's alpha is its tensor `alpha`, else what diffusers' metadata say, else its rank (a scale of 1).
    Raises `CheckpointError` for a tensor that is neither's, half a pair, and shapes that are not the
    teacher's.
    """
    if not tensors:
        raise CheckpointError("holds no tensors. Export the LoRA again.")
    shapes = weight_shapes(teacher_config)
    table = written_names(shapes)
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key in sorted(tensors):
        place = place_of(key, table)
        if place is None:
            raise CheckpointError(_foreign(key, teacher_config))
        own = found.setdefault((place.part, place.module), {})
        if place.role in own:
            raise CheckpointError(f"{key}: a second tensor for {place.part}.{place.module}. Remove one.")
        own[place.role] = tensors[key]
    settings = _peft_settings(metadata)
    adapters = [_adapter(*where, own, settings) for where, own in found.items()]
    for each in adapters:
        if each.part == "unet" and not each.fits(shapes[each.module]):
            raise CheckpointError(_misfit(each, shapes[each.module], "teacher"))
    return adapters


def remap(adapters: Iterable[Adapter], spec: StudentSpec, teacher_config: Mapping[str, Any]) -> Remapped:
    """The adapters under the names of the modules of the student that start from the adapted ones.

    Raises `CheckpointError` where none of the U-Net's are left, or one does not fit the student's weight.
    """
    shapes = weight_shapes(student_config(teacher_config, spec))
    students = {teacher_module(name, spec, teacher_config): name for name in shapes}
    adapters = list(adapters)
    unet = [each for each in adapters if each.part == "unet"]
    kept = tuple(replace(each, module=students[each.module]) for each in unet if each.module in students)
    if not kept:
        raise CheckpointError(
            f"none of its {len(unet)} adapted modules is in the student. Give one that adapts others too, or "
            "a student that keeps them."
            if unet
            else "it adapts text encoders alone, which students share with their teacher. Use it as it is."
        )
    for each in kept:
        if not each.fits(shapes[each.module]):
            raise CheckpointError(_misfit(each, shapes[each.module], "student"))
    return Remapped(
        kept=kept,
        text=tuple(each for each in adapters if each.part != "unet"),
        dropped=tuple(each.module for each in unet if each.module not in students),
    )


def _through(adapters: Sequence[Adapter], cuts: Sequence[Cut]) -> Remapped:
    """`remap` by one cut after the other."""
    dropped: tuple[str, ...] = ()
    for spec, teacher_config in cuts:
        step = remap(adapters, spec, teacher_config)
        adapters, dropped = [*step.kept, *step.text], dropped + step.dropped
    return Remapped(step.kept, step.text, dropped)


def write_lora(
    path: Path,
    adapters: Sequence[Adapter],
    metadata: Mapping[str, str],
    *,
    kohya: bool = False,
    several: bool = False,
) -> None:
    """Write a LoRA whole or not at all, in diffusers' form or kohya's; see `remap_lora`.

    `several` says for kohya's that the teacher has two text encoders, though one alone may be adapted.
    """
    kept = {name: value for name, value in metadata.items() if name != _PEFT} | {"format": "pt"}
    if kohya:
        tensors = _kohya_tensors(adapters, several)
    else:
        kept[_PEFT] = json.dumps(_settings_of(adapters), sort_keys=True)
        tensors = {}
        for each in adapters:
            tensors[f"{each.part}.{each.module}.lora_A.weight"] = each.down
            tensors[f"{each.part}.{each.module}.lora_B.weight"] = each.up
    with atomic_path(path) as aside:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata=kept)


def _adapter(
    part: str, module: str, own: Mapping[str, Tensor], settings: Mapping[str, Any] | None
) -> Adapter:
    """Put the tensors found for one module together."""
    if DOWN not in own or UP not in own:
        missing = "down (lora_A)" if DOWN not in own else "up (lora_B)"
        raise CheckpointError(f"{part}.{module}: its {missing} matrix is missing. Export the LoRA again.")
    down, up = own[DOWN], own[UP]
    pair = down.ndim == up.ndim and down.ndim in {2, 4} and down.shape[0] == up.shape[1]
    if not pair or up.shape[2:].numel() != 1:
        raise CheckpointError(
            f"{part}.{module}: {tuple(down.shape)} and {tuple(up.shape)} are no pair of A (rank, in) and "
            "B (out, rank). Export the LoRA again."
        )
    alpha = float(own["alpha"]) if "alpha" in own else _peft_alpha(settings, part, module, down.shape[0])
    return Adapter(part, module, down, up, alpha)


def _peft_settings(metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
    if _PEFT not in metadata:
        return None
    try:
        settings = parse_json(metadata[_PEFT])
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise CheckpointError(f"metadata {_PEFT}: not a JSON object. Export the LoRA again.")
    return settings


def _peft_alpha(settings: Mapping[str, Any] | None, part: str, module: str, rank: int) -> float:
    """A module's alpha by peft's rules: the first pattern that ends its name, else that of all."""
    if settings is None or f"{part}.lora_alpha" not in settings:
        return float(rank)
    patterns: Mapping[str, float] = settings.get(f"{part}.alpha_pattern") or {}
    matching = (value for name, value in patterns.items() if re.match(rf"(.*\.)?({name})$", module))
    alpha = float(next(matching, settings[f"{part}.lora_alpha"]))
    # rank-stabilised LoRA (arXiv 2312.03732) scales by alpha / sqrt(rank)
    return alpha * math.sqrt(rank) if settings.get(f"{part}.use_rslora") else alpha


def _settings_of(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """peft's settings for each part, as diffusers writes them: those of most modules, and the exceptions."""
    settings: dict[str, Any] = {}
    for part in PARTS:
        # some versions of CLIP's classes have `text_model.` in front; peft matches ends of names
        own = {each.module.removeprefix("text_model."): each for each in adapters if each.part == part}
        if not own:
            continue
        rank = Counter(each.rank for each in own.values()).most_common(1)[0][0]
        alpha = Counter(each.alpha for each in own.values()).most_common(1)[0][0]
        settings |= {
            f"{part}.r": rank,
            f"{part}.rank_pattern": {name: each.rank for name, each in own.items() if each.rank != rank},
            f"{part}.lora_alpha": alpha,
            f"{part}.alpha_pattern": {name: each.alpha for name, each in own.items() if each.alpha != alpha},
            f"{part}.target_modules": sorted(own),
        }
    return settings


def _kohya_tensors(adapters: Sequence[Adapter], several: bool) -> dict[str, Tensor]:
    several = several or any(each.part == "text_encoder_2" for each in adapters)
    tensors = {}
    for each in adapters:
        name = kohya_name(each.part, each.module, several=several)
        tensors[f"{name}.lora_down.weight"] = each.down
        tensors[f"{name}.lora_up.weight"] = each.up
        tensors[f"{name}.alpha"] = torch.tensor(each.alpha)
    return tensors


def _misfit(adapter: Adapter, weight: Sequence[int], whose: str) -> str:
    down, up = tuple(adapter.down.shape), tuple(adapter.up.shape)
    return (
        f"{adapter.part}.{adapter.module}: A {down} and B {up} do not make up the {whose}'s weight "
        f"{tuple(weight)}. The LoRA was made for another network."
    )


def _foreign(key: str, teacher_config: Mapping[str, Any]) -> str:
    for word, kind in _OTHER_KINDS.items():
        if word in key:
            return f"{key}: is of a {kind}, which cannot be remapped. Give a LoRA of {_ALLOWED}."
    widths = "-".join(str(width) for width in teacher_config.get("block_out_channels", ()))
    return (
        f"{key}: is no part of a LoRA on this teacher (a U-Net {widths} wide) or its text encoders. "
        f"Give a LoRA made for it: {_ALLOWED}."
    )
