"""`shoestring convert-lora`: a LoRA that was made for a teacher, for the student cut from it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoestring.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from shoestring.models.unet_lora import Cut


def convert_lora(
    lora: Annotated[Path, typer.Argument(help="FILE.safetensors, diffusers' or kohya's, for the teacher.")],
    out: Annotated[Path, typer.Argument(help="A new FILE.safetensors for the student.")],
    student: Annotated[
        Path | None, typer.Option(help="The run that made the student: its recipe says the cut.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A published cut: koala-700m, bk-sdm-small, ...")] = None,
    layers_per_block: Annotated[
        str | None, typer.Option(help="As given to `compress`: 1, or one a stage: 1,2,2. [teacher's]")
    ] = None,
    depth: Annotated[str | None, typer.Option(help="As given to `compress`: 1,2,6. [teacher's]")] = None,
    mid: Annotated[
        str | None, typer.Option(help="As given to `compress`: keep, drop or resnets. [keep]")
    ] = None,
    depth_map: Annotated[str | None, typer.Option(help="bottom, interleave or top. [bottom]")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Run, pipeline, U-Net's folder, hub id or file. [the run's or preset's, else SDXL]"
        ),
    ] = None,
    kohya: Annotated[
        bool, typer.Option("--kohya", help="Write kohya's names, which ComfyUI and others read.")
    ] = False,
) -> None:
    """Give a student the LoRA of its teacher: what was added to modules that the student kept.

    Students share their teacher's text encoders; the LoRA's part for them stays as it is. A distilled student
    is not its teacher: expect a LoRA to act somewhat differently, and try other scales than 1.
    """
    given = {"preset": preset, "layers_per_block": layers_per_block, "depth": depth, "mid": mid}
    options = {name: value for name, value in (given | {"depth_map": depth_map}).items() if value is not None}
    if out.suffix != ".safetensors":
        raise RecipeError(f"{out}: must be a FILE.safetensors.")
    cuts = _cuts_of_run(student, options, teacher) if student else _cuts_said(options, teacher)

    from shoestring.models.unet_lora import remap_lora

    remapped = remap_lora(lora, out, cuts, kohya=kohya)
    total = len(remapped.kept) + len(remapped.dropped)
    typer.echo(f"{lora}: {total} modules of the U-Net, {len(remapped.text)} of the text encoders.")
    gone = Counter(
        ".".join(name.split(".")[: 1 + name.startswith(("down", "up"))]) for name in remapped.dropped
    )
    told = ", ".join(f"{count} in {block}" for block, count in sorted(gone.items()))
    typer.echo(f"{out}: {len(remapped.kept)} kept, {len(remapped.dropped)} dropped{told and f' ({told})'}.")
    use = "ComfyUI, or what else reads kohya's names," if kohya else f"load_lora_weights({str(out)!r})"
    typer.echo(f"Next: {use} with the student's pipeline.")


def _cuts_said(options: dict[str, str], teacher: str | None) -> list[Cut]:
    """The cut that the options describe, of the teacher that is given or that it is published for."""
    from shoestring.cli.compress import student_spec
    from shoestring.models.unet_presets import SDXL, preset_teacher
    from shoestring.models.unet_teachers import open_teacher

    if not options:
        raise RecipeError(
            "convert-lora: say which student: --student RUN, --preset koala-700m, or the cut as given to "
            "`compress`: --layers-per-block 1 --depth 1,2,6 ..."
        )
    preset, depth_map = options.pop("preset", None), options.pop("depth_map", None)
    spec = student_spec(preset, options, depth_map)
    if teacher is not None:
        return [(spec, open_teacher(teacher).config)]
    return [(spec, preset_teacher(preset) if preset else SDXL)]


def _cuts_of_run(run: Path, options: dict[str, str], teacher: str | None) -> list[Cut]:
    """What recipes say of the run's student; with `teacher`, of the last cut alone."""
    from shoestring.build.student_cuts import cuts_of_run
    from shoestring.storage import RunFolder

    if not RunFolder(run).recipe.is_file():
        raise CheckpointError(
            f"{run}: not a run folder (no recipe.yaml in it). Give one that `shoestring train` printed, or "
            "name the cut: --preset koala-700m ..."
        )
    for name in options:
        raise RecipeError(f"--{name.replace('_', '-')}: the recipe of {run} says it. Give one of both.")
    return cuts_of_run(run, teacher)
