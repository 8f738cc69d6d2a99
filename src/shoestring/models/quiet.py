"""What transformers and diffusers print while models load, save and tokenize, kept off the console.

All of it is expected, or ours to say in words that tell the user what to do. Errors come through, and so do
the hub's download bars: a download is worth watching, reading a file for a second is not.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from torch import nn


@contextmanager
def muted(logger: str, about: str = "") -> Iterator[None]:
    """Errors only from one logger, or from its messages that contain `about`."""

    def wanted(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or about not in record.getMessage()

    target = logging.getLogger(logger)
    target.addFilter(wanted)  # a changed level would make transformers log more, not less
    try:
        yield
    finally:
        target.removeFilter(wanted)


def cast(network: nn.Module, *where: Any) -> Any:
    """`network.to(...)`: diffusers warns of modules to keep in float32 even where a network has none."""
    with muted("diffusers.models.modeling_utils", about="should be kept in float32"):
        return network.to(*where)


@contextmanager
def no_bars() -> Iterator[None]:
    """No progress bars while weights are read and written, and no libraries' notes to one another."""
    from transformers.utils import logging as transformers_logging

    ours = [each for each in (diffusers_logging, transformers_logging) if each.is_progress_bar_enabled()]
    downloads = not are_progress_bars_disabled()
    for library in ours:
        library.disable_progress_bar()
    _show_downloads(downloads)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(diffusers|huggingface_hub|transformers)\.")
            yield
    finally:
        for library in ours:
            library.enable_progress_bar()
        _show_downloads(downloads)


def _show_downloads(wanted: bool) -> None:
    """The hub's bars as they were: transformers switches them with its own."""
    if wanted == are_progress_bars_disabled():
        (enable_progress_bars if wanted else disable_progress_bars)()
