"""Shoestring: text-to-image diffusion on a shoestring budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoestring.data.store import Store
    from shoestring.models.microdit import MicroDiT
    from shoestring.pipelines.load import load
    from shoestring.pipelines.microdit import MicroDiTPipeline

__version__ = "0.1.0"

__all__ = ["MicroDiT", "MicroDiTPipeline", "Store", "__version__", "load"]

# Public names are imported when first asked for, so that `import shoestring` costs nothing.
_HOMES = {
    "MicroDiT": "shoestring.models.microdit",
    "MicroDiTPipeline": "shoestring.pipelines.microdit",
    "Store": "shoestring.data.store",
    "load": "shoestring.pipelines.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
