"""Pipeline folders in a run: written whole the first time, then only the parts that training changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from shoestring.models.network_files import INDEX
from shoestring.models.quiet import no_bars
from shoestring.pipelines.defaults import write_sampling
from shoestring.storage import atomic_path


def export(pipeline: DiffusionPipeline, folder: Path, changing: Sequence[str] = ()) -> None:
    """Save `pipeline` as `folder`, or bring the components named in `changing` up to date.

    The others are frozen, so they are written once. The folder appears whole under its name or not at all:
    components that belong together never come from two moments of a run.
    """
    with no_bars():
        if not (folder / INDEX).is_file():
            with atomic_path(folder) as aside:
                pipeline.save_pretrained(aside)
                write_sampling(pipeline, aside)
        elif len(changing) == 1:
            with atomic_path(folder / changing[0]) as aside:
                getattr(pipeline, changing[0]).save_pretrained(aside)
        else:
            with atomic_path(folder) as aside:
                shutil.copytree(folder, aside, copy_function=_link, ignore=shutil.ignore_patterns(*changing))
                for name in changing:
                    getattr(pipeline, name).save_pretrained(aside / name)


def _link(source: str, target: str) -> str:
    """The same file under another name where the disk can do that; else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
