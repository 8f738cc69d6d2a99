"""The words for a mistake in a recipe: what was given, what is allowed, what was perhaps meant."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

_TYPES = {
    "int": "must be a whole number",
    "float": "must be a number",
    "finite": "must be a finite number",
    "bool": "must be true or false",
    "string": "must be text (quote a number)",
    "list": "must be a list",
    "tuple": "must be a list",
    "dict": "must be a section of keys and values",
    "model": "must be a section of keys and values",
    "none": "must be null",
}
_BOUNDS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}


def nearest(word: str, choices: Iterable[str]) -> str:
    """As " Did you mean 'depth'?" for the nearest choice, or nothing where none is near."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The nearest choice, or all choices where none is near."""
    choices = list(choices)
    return nearest(word, choices) or f" Allowed: {', '.join(choices)}."


def shown(value: Any) -> str:
    """A value for a message: long ones are cut."""
    return reprlib.repr(value)


def requirement(problem: Mapping[str, Any]) -> str:
    """What pydantic asked for in one of its `errors()`, in few words: "must be at least 1"."""
    kind, context = problem["type"], problem.get("ctx", {})
    for name, words in _BOUNDS.items():
        if name in context:
            return f"must be {words} {context[name]:g}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        return "must be letters, digits, '-', '_' or '.', and begin with a letter or digit"
    if kind in {"too_short", "string_too_short"}:
        return "must not be empty"
    if kind == "too_long":
        return f"must have {context['max_length']} items"
    return _TYPES.get(kind.split("_")[0], problem["msg"])
