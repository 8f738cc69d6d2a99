"""`shoestring compress`: a smaller network cut out of a teacher, with its weights, before any training."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from shoestring.models.network_files import NetworkFolder
    from shoestring.models.unet_presets import StudentSpec

DTYPES = ("float32", "float16", "bfloat16")


def compress(
    teacher: Annotated[
        str,
        typer.Argument(help="Run, pipeline, network's folder, hub id, or FILE.safetensors of SDXL or SD."),
    ],
    out: Annotated[Path, typer.Argument(help="A new folder for the student.")],
    preset: Annotated[str | None, typer.Option(help="A published cut: koala-700m, bk-sdm-small, ...")] = None,
    layers_per_block: Annotated[
        str | None,
        typer.Option(help="Layers in a U-Net's down blocks: 1, or one a stage: 1,2,2. [teacher's]"),
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(
            help="Transformer blocks by stage, outermost first: 1,2,6; of a transformer: 14. [teacher's]"
        ),
    ] = None,
    mid: Annotated[
        str | None, typer.Option(help="A U-Net's mid block: keep, drop or resnets. [keep]")
    ] = None,
    depth_map: Annotated[
        str | None, typer.Option(help="Which blocks stay: bottom, interleave or top. [bottom]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. [as stored]")] = None,
) -> None:
    """Cut a student out of a U-Net or a transformer: fewer layers, the teacher's weights in what stays.

    Of a pipeline the other parts are copied, so that OUT opens as TEACHER does. Distil it before use: a cut
    network makes no pictures worth looking at.
    """
    cuts = {"layers_per_block": layers_per_block, "depth": depth, "mid": mid}
    spec = student_spec(preset, {name: value for name, value in cuts.items() if value is not None}, depth_map)
    if dtype not in {None, *DTYPES}:
        raise RecipeError(f"--dtype {dtype}: unknown. Use {', '.join(DTYPES)}.")

    from shoestring.build.published import refuse_taken
    from shoestring.models.network_files import components, find_network

    refuse_taken(out)
    found = None if teacher.endswith(".safetensors") else find_network(teacher)
    parts = components(found) if found and found.in_pipeline else None  # before the long work
    _check_preset(preset, teacher, found)
    cut = _cut(teacher, found, spec, dtype)
    after = _size(cut.student.state_dict())
    if after == cut.before:
        raise RecipeError(f"{teacher}: already has the shape asked for ({after:,} parameters). Cut more.")
    if found is None or parts is None:
        _write_alone(cut, out)
        place = "the network alone"
    else:
        _write_pipeline(cut, out, found, parts)
        place = "in a copy of its pipeline"
    share = after / cut.before
    typer.echo(f"{teacher}: {cut.kind}, {cut.before:,} parameters.")
    typer.echo(f"{out}: {after:,} parameters ({share:.1%}), {place}; weights copied, nothing distilled.")
    if cut.scheduler is not None:
        told = f"`teacher: {teacher}` and this cut as its `model`, as koala-700m has"
        typer.echo(f"Next: distil it. A recipe cuts and distils in one: {told}.")


@dataclass(frozen=True)
class _Cut:
    """A student, its class, how many parameters its teacher has, and a U-Net's scheduler."""

    student: Any
    kind: str
    before: int
    scheduler: Any = None


def student_spec(preset: str | None, cuts: dict[str, str], depth_map: str | None) -> StudentSpec:
    """The cut that the options describe; raises `RecipeError` where they contradict or say nothing."""
    from shoestring.models.unet_presets import StudentSpec, preset_spec

    if preset is not None:
        for name in cuts:
            raise RecipeError(
                f"--{name.replace('_', '-')}: the preset {preset} says it already. Give one of both."
            )
        spec = preset_spec(preset)
    elif not cuts:
        raise RecipeError(
            "compress: say what to cut: --preset koala-700m, --layers-per-block 1, --depth 1,2,6 ..."
        )
    else:
        given: dict[str, Any] = {"mid": cuts["mid"]} if "mid" in cuts else {}
        given |= {name: _numbers(name, cuts[name]) for name in cuts if name != "mid"}
        if len(layers := given.get("layers_per_block", ())) == 1:
            given["layers_per_block"] = layers[0]
        spec = StudentSpec(**given)
    if depth_map is None:
        return spec
    if spec.depth is None:
        raise RecipeError(f"--depth-map {depth_map}: has no effect without a depth. Leave it out.")
    chosen: Any = depth_map  # which the spec checks
    return dataclasses.replace(spec, depth_map=chosen)


def _check_preset(preset: str | None, teacher: str, found: NetworkFolder | None) -> None:
    """Raise `RecipeError` for a preset of a transformer."""
    if preset is not None and found is not None and not (kind := found.kind()).startswith("UNet"):
        raise RecipeError(
            f"--preset {preset}: a cut of U-Nets, and the network of {teacher} is of the class {kind}. "
            "Of a transformer say --depth."
        )


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError:
        option = name.replace("_", "-")
        raise RecipeError(f"--{option} {text}: must be numbers with commas between, like 1,2,6.") from None


def _cut(teacher: str, found: NetworkFolder | None, spec: StudentSpec, dtype: str | None) -> _Cut:
    """The student of a U-Net, which alone may come from one file, or of a transformer."""
    from shoestring.models.transformer_students import cut_transformer, transformer_student_config
    from shoestring.models.unet_students import cut_student
    from shoestring.models.unet_teachers import open_teacher

    if found is None or (kind := found.kind()).startswith("UNet"):
        unet = open_teacher(teacher)
        stored = _dtype(dtype, unet.tensors)
        student: Any = cut_student(unet.tensors, spec, unet.config, stored, name=teacher)
        return _Cut(student, "UNet2DConditionModel", _size(unet.tensors), unet.scheduler)
    config = {**found.config(), "_class_name": kind}
    transformer_student_config(config, spec, name=teacher)  # before weights of another kind are looked for
    tensors = found.tensors()
    student = cut_transformer(tensors, spec, config, _dtype(dtype, tensors), name=teacher)
    return _Cut(student, kind, _size(tensors))


def _dtype(name: str | None, tensors: Mapping[str, Tensor]) -> Any:
    """The number type asked for; else the one the teacher is stored in, where it can be computed with."""
    import torch

    stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    return getattr(torch, name or (stored if stored in DTYPES else "float32"))


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _write_alone(cut: _Cut, out: Path) -> None:
    from shoestring.models.quiet import no_bars
    from shoestring.storage import atomic_path

    with no_bars(), atomic_path(out) as aside:
        cut.student.save_pretrained(aside)
        if cut.scheduler is not None:  # what the teacher predicts is not in a U-Net's own files
            cut.scheduler.save_pretrained(aside / "scheduler")


def _write_pipeline(cut: _Cut, out: Path, found: NetworkFolder, parts: list[str]) -> None:
    """The teacher's pipeline, copied file by file, with the student in the teacher's place.

    Copies and not links: what later writes into one of the folders must not change the other.
    """
    from shoestring.models.quiet import no_bars
    from shoestring.storage import atomic_path

    with no_bars(), atomic_path(out) as aside:
        aside.mkdir()
        for path in found.root.iterdir():
            if path.is_file() and path.suffix in {".json", ".py"}:  # index, our own notes, pipeline.py
                shutil.copyfile(path, aside / path.name)
        for name in parts:
            shutil.copytree(found.root / name, aside / name)
        cut.student.save_pretrained(aside / found.part)
