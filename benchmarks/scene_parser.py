"""How often the scene parser is right: on clean pictures, under noise and under blur.

python benchmarks/scene_parser.py [--tiny] [--scenes 2000] [--seed 0]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from parts.figures import tell
from PIL import Image

from shoestring.data.scenes import LEVELS, Scene, ScenesSource, render_many
from shoestring.evaluation.run import wilson
from shoestring.evaluation.scene_parser import FACETS, compare, parse

NOISES = (0.02, 0.05, 0.1, 0.15, 0.2)
BLURS = (2, 4)

Pictures = NDArray[np.uint8]


def noisy(images: Pictures, sigma: float, seed: int) -> Pictures:
    """Gaussian noise on every channel, sigma in shares of the full range, clipped to the range."""
    noise = np.random.default_rng(seed).normal(0, 255 * sigma, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def blurred(images: Pictures, factor: int) -> Pictures:
    """Each picture averaged down by `factor` and brought back up, bicubic."""
    size = images.shape[1]
    small = (size // factor, size // factor)
    pictures = (Image.fromarray(each).resize(small, Image.Resampling.BOX) for each in images)
    return np.stack([np.asarray(each.resize((size, size), Image.Resampling.BICUBIC)) for each in pictures])


def cases(seed: int) -> Iterator[tuple[str, int, Callable[[Pictures], Pictures]]]:
    """Name, size and disturbance of each case."""
    for size in (32, 64, 128):
        yield "clean", size, lambda images: images
    for size in (32, 64):
        for sigma in NOISES:
            yield f"noise {sigma}", size, lambda images, sigma=sigma: noisy(images, sigma, seed)
        for factor in BLURS:
            yield f"blur {factor}x", size, lambda images, factor=factor: blurred(images, factor)


def measure(scenes: list[Scene], images: Pictures, settings: dict[str, object]) -> None:
    """Tell the share right, with its interval and that of each facet, and the time a picture takes."""
    start = time.perf_counter()
    facets = [compare(scene, parse(image, scene.level)) for scene, image in zip(scenes, images, strict=True)]
    milliseconds = 1000 * (time.perf_counter() - start) / len(facets)
    right = {facet: sum(each[facet] for each in facets) for facet in FACETS}
    shares = {facet: round(right[facet] / len(facets), 4) for facet in FACETS if facet != "all"}
    low, high = (round(bound, 4) for bound in wilson(right["all"], len(facets)))
    settings = {**settings, "n": len(facets)}
    tell(
        "scene_parser",
        "all_right",
        right["all"] / len(facets),
        "share",
        low=low,
        high=high,
        **shares,
        **settings,
    )
    tell("scene_parser", "time", milliseconds, "ms/picture", **settings)


def main() -> None:
    """Share of pictures entirely right, and milliseconds a picture, for each level, size and disturbance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="40 scenes a case")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    count = 40 if options.tiny else options.scenes
    for level in LEVELS:
        source = ScenesSource(level=level, images=count, seed=options.seed)
        scenes = [source.scene(row) for row in range(count)]
        for case, size, disturb in cases(options.seed):
            measure(scenes, disturb(render_many(scenes, size)), {"level": level, "size": size, "case": case})


if __name__ == "__main__":
    main()
