"""What the recipe of a student's run says of its cut, and those of its teacher's before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoestring.errors import RecipeError
from shoestring.models.network_files import CONFIG, read_config
from shoestring.models.unet_lora import Cut
from shoestring.models.unet_lora_names import weight_shapes
from shoestring.models.unet_presets import StudentSpec, preset_spec
from shoestring.models.unet_students import student_config
from shoestring.models.unet_teachers import open_teacher
from shoestring.recipes.architectures import StudentModel
from shoestring.recipes.load import load_recipe
from shoestring.storage import RunFolder


def student_spec(model: StudentModel) -> StudentSpec:
    """The cut that a recipe's `model` section describes."""
    if model.preset:
        return preset_spec(model.preset)
    return StudentSpec(**model.model_dump(include={"layers_per_block", "depth", "mid", "depth_map"}))


def cuts_of_run(run: Path, teacher: str | None = None) -> list[Cut]:
    """How a run's student came about: the cuts from the first teacher on, where teachers are runs' students.

    A few-step student has its own teacher's shape: what matters is how that was cut. `teacher` stands for the
    run's own, as one that moved, and ends the chain there.

    Raises `CheckpointError` for what is no run or no teacher, `RecipeError` for a run of another kind, and
    where the last cut does not make the network that the run has exported.
    """
    cuts = _cuts(run, teacher)
    file = RunFolder(run).pipeline / "unet" / CONFIG
    if file.is_file():
        made, there = _shapes(student_config(cuts[-1][1], cuts[-1][0])), _shapes(read_config(file))
        if odd := {name for name in {*made, *there} if made.get(name) != there.get(name)}:
            raise RecipeError(
                f"{run}: its U-Net is not what its recipe cuts out of {teacher or 'its teacher'} ({len(odd)} "
                f"modules differ, such as {min(odd)}). Give --teacher the network that it was distilled from."
            )
    return cuts


def _cuts(run: Path, teacher: str | None) -> list[Cut]:
    """The cuts that recipes say."""
    recipe = load_recipe(RunFolder.open(run).recipe)
    if not isinstance(recipe.model, StudentModel):
        raise RecipeError(
            f"{run}: a run of the kind {recipe.model.kind}, no student of a U-Net. Give one that was "
            "distilled, or say the cut: --preset koala-700m ..."
        )
    above = str(recipe.teacher)
    before = _cuts(Path(above), None) if teacher is None and _is_students(Path(above)) else []
    return [*before, (student_spec(recipe.model), open_teacher(teacher or above).config)]


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of each module's weight, whether the network is told the guidance scale or not."""
    return weight_shapes({**config, "time_cond_proj_dim": None})


def _is_students(path: Path) -> bool:
    recipe = RunFolder(path).recipe
    return recipe.is_file() and isinstance(load_recipe(recipe).model, StudentModel)
