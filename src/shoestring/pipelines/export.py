"""Pipeline folders in a run: written whole the first time, then only the part that training changes."""

from __future__ import annotations

from pathlib import Path

from shoestring.models.quiet import no_bars
from shoestring.pipelines.microdit import MicroDiTPipeline
from shoestring.storage import atomic_path


def export(pipeline: MicroDiTPipeline, folder: Path) -> None:
    """Save `pipeline` as `folder`, or bring the folder's transformer up to date.

    Encoders are frozen, so they are written once; each write appears whole under its name or not at all.
    """
    if (folder / "model_index.json").is_file():
        with atomic_path(folder / "transformer") as aside:
            pipeline.transformer.save_pretrained(aside)
    else:
        with atomic_path(folder) as aside, no_bars():
            pipeline.save_pretrained(aside)
