"""Colours of runs can be told apart by everybody, on light paper and dark."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from shoestring.training.page import STYLE, page, table

SIGHT = {
    "usual": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}
"""Linear RGB as dichromats see it (Machado, Oliveira and Fernandes 2009, severity 1)."""


def linear(colour: str) -> np.ndarray:
    """#rrggbb or #rgb as linear RGB."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    value = np.array([int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Björn Ottosson's perceptual space: a distance of 0.02 is just noticeable."""
    to_lms = [
        [0.41222147, 0.53633254, 0.05144599],
        [0.2119035, 0.68069955, 0.10739696],
        [0.08830246, 0.28171884, 0.6299787],
    ]
    to_lab = [
        [0.21045426, 0.79361779, -0.00407205],
        [1.9779985, -2.42859221, 0.45059371],
        [0.02590404, 0.78277177, -0.80867577],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ np.clip(rgb, 0, 1))


def colours(theme: str) -> dict[str, str]:
    """The style's variables in a light or a dark room."""
    found: dict[str, str] = {}
    for block in re.findall(r"(@media \(prefers-color-scheme:dark\)\{)?:root\{([^}]*)\}", STYLE):
        if not block[0] or theme == "dark":
            found |= dict(re.findall(r"--(\w+):(#\w+)", block[1]))
    return found


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("sight", SIGHT)
def test_the_colours_of_eight_runs_stay_apart(theme: str, sight: str) -> None:
    names = colours(theme)
    seen = [oklab(np.array(SIGHT[sight]) @ linear(names[f"r{k}"])) for k in range(8)]
    apart = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))
    assert apart > 0.1


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_colours_of_runs_stand_out_from_the_card(theme: str) -> None:
    """WCAG asks for a contrast of 3 in graphics."""
    names = colours(theme)
    weights = np.array([0.2126, 0.7152, 0.0722])
    card = float(weights @ linear(names["card"])) + 0.05
    for k in range(8):
        line = float(weights @ linear(names[f"r{k}"])) + 0.05
        assert max(line, card) / min(line, card) >= 3, names[f"r{k}"]


def test_headings_stand_above_their_rows() -> None:
    text = table(["", "x"], [["a", "1"], ["b", "2"]], {1}, groups={1: "second"})
    assert re.sub(r"<[^>]*>", " ", text).split() == ["x", "a", "1", "second", "b", "2"]


def test_a_page_leaves_out_empty_sections_and_escapes_its_title() -> None:
    assert "<title>a &lt;b&gt;</title>" in page("a <b>", ["", "<p>x</p>"])
