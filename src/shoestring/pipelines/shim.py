"""The `pipeline.py` of an export, with which plain diffusers finds our class.

`DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)`.
"""

from __future__ import annotations

from pathlib import Path

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

# diffusers runs every pipeline.py in the same module, and refuses one that holds two pipelines.
_FORGET = 'for name in [name for name in globals() if name.endswith("Pipeline")]:\n    del globals()[name]'


def write_shim(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """Write `pipeline.py` into a saved pipeline: it holds the pipeline's class and no other."""
    kind = type(pipeline)
    lines = f"{_FORGET}\nfrom {kind.__module__} import {kind.__name__}  # noqa: F401\n"
    Path(folder, "pipeline.py").write_text(lines, encoding="utf-8")
