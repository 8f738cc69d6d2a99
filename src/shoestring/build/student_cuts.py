"""What the recipe of a student's run says of its cut, and those of its teacher's before it."""

from __future__ import annotations

from pathlib import Path

from shoestring.errors import RecipeError
from shoestring.models.unet_lora import Cut
from shoestring.models.unet_presets import StudentSpec, preset_spec
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

    Raises `CheckpointError` for what is no run or no teacher, `RecipeError` for a run of another kind.
    """
    recipe = load_recipe(RunFolder.open(run).recipe)
    if not isinstance(recipe.model, StudentModel):
        raise RecipeError(
            f"{run}: a run of the kind {recipe.model.kind}, no student of a U-Net. Give one that was "
            "distilled, or say the cut: --preset koala-700m ..."
        )
    above = str(recipe.teacher)
    before = cuts_of_run(Path(above)) if teacher is None and _is_students(Path(above)) else []
    return [*before, (student_spec(recipe.model), open_teacher(teacher or above).config)]


def _is_students(path: Path) -> bool:
    recipe = RunFolder(path).recipe
    return recipe.is_file() and isinstance(load_recipe(recipe).model, StudentModel)
