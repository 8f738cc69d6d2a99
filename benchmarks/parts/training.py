"""Runs of a comparison: trained to their end within a time, and gone on with the next time."""

from __future__ import annotations

import sys
import threading
import time
from _thread import interrupt_main

import torch

from shoestring import build
from shoestring.recipes.schema import Recipe
from shoestring.storage import RunFolder

STOPPED = 130


def train(recipe: Recipe, run: RunFolder, device: torch.device, until: float) -> None:
    """Train a run to its end, or go on with it; raises KeyboardInterrupt where it is stopped before that.

    `until` is a time of `time.monotonic()`.
    """
    store = build.open_store(recipe, device=device, log=say)
    with build.claimed(run):
        resume = run.recipe.is_file()
        training = build.make_training(recipe, run, store, device=device, resume=resume, log=say)
        if training.finished:
            return
        left = until - time.monotonic()
        if left <= 0:
            raise KeyboardInterrupt
        clock = threading.Timer(min(left, threading.TIMEOUT_MAX), interrupt_main)  # as Ctrl-C does
        clock.daemon = True
        clock.start()
        try:
            finished = training.train()
        finally:
            clock.cancel()
    if not finished:
        raise KeyboardInterrupt


def say(text: str) -> None:
    """A line beside the figures."""
    print(text, file=sys.stderr)
