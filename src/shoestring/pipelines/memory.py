"""Which plan draws pictures in a given memory, and what it takes: arithmetic on shapes before anything loads.

    stage      in memory                              what a smaller budget changes, in this order
    text       text encoders                          bfloat16 (on a CPU); on the CPU (from a GPU)
    denoise    U-Net, embeddings                      fewer pictures at once; bfloat16 (CPU); 8-bit weights
    decode     autoencoder, or a tiny one; latents    fewer pictures at once; tiles of 512 px, of 256 px

Stages never overlap (`staged.py` runs them), so each takes its first, fastest choice that fits. A peak is

    fixed + weights + factor x live tensors at the worst moment of a forward (`live_memory.py`)

On a CPU `fixed` is the process itself, and the factor what a heap adds (measured: 1.07 to 1.20). On a GPU
both are fitted to two published peaks, those of KOALA-Lightning-700M at 1024 px (8.3 GB) and KOALA-Turbo-700M
at 512 px (4.9 GB) in float16 on an RTX 4090 with all parts loaded; the four other networks of that table
then follow within 2 %. They stand for the CUDA context, cuDNN's workspaces and what the allocator keeps.

The budget is that of the device which draws. Weights for a GPU pass through the CPU's memory on their way;
on a CPU, pages of files that are being read are the system's to take back, and are not counted.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

from shoestring.errors import RecipeError
from shoestring.models.autoencoders import size_multiple, spatial_factor
from shoestring.models.sizes import check_size
from shoestring.pipelines.memory_parts import (
    INT8_DTYPE,
    TILE,
    Parts,
    count_values,
    decode_dtype,
    decode_live,
    denoise_live,
    largest_linear,
    unet_bytes,
)

FIXED = {"cpu": 640 * 2**20, "cuda": 380 * 10**6, "mps": 380 * 10**6}
FACTOR = {"cpu": 1.2, "cuda": 2.25, "mps": 2.25}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16,), "mps": (torch.float16,)}
"""Of weights and activations, faster first. Published U-Nets are run in float16; a CPU has no fast one."""
TILES = (TILE, TILE // 2)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)B", re.IGNORECASE)
_POWER = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes of "4GiB" (2**30 each), "800MiB" or "4GB" (10**9 each); raises `RecipeError` for other text."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise RecipeError(
            f"--memory {text}: must be a number with KiB, MiB, GiB, TiB, MB or GB, such as 4GiB."
        )
    unit = match[2].lower()
    size = int(Decimal(match[1]) * (1024 if unit.endswith("i") else 1000) ** _POWER[unit[0]])
    if size < 1:
        raise RecipeError(f"--memory {text}: must be more than nothing, such as 4GiB.")
    return size


@dataclass(frozen=True)
class Stage:
    """One stage as it is run: device, number type, pictures at once, and its peak in bytes of the budget."""

    name: str
    device: str
    dtype: torch.dtype
    batch: int
    peak: int  # 0 where it is on another device
    int8: bool = False
    tile: int | None = None  # pixels
    tiny: bool = False

    def __str__(self) -> str:
        words = ["8-bit weights" if self.int8 else str(self.dtype).removeprefix("torch.")]
        if self.tile:
            words.append(f"tiles of {self.tile} px")
        elif self.name != "text":
            words.append(f"{self.batch} at once")
        label = {"text": "text encoders", "denoise": "U-Net"}.get(self.name, "autoencoder")
        if self.tiny:
            label = "tiny decoder"
        place = in_gib(self.peak) if self.peak else f"on the {self.device}"
        return f"{label} {place} ({', '.join(words)})"


@dataclass(frozen=True)
class MemoryPlan:
    """How a picture of `height` x `width` px is drawn within `budget` bytes of `device`'s memory."""

    device: str
    budget: int
    height: int
    width: int
    text: Stage
    denoise: Stage
    decode: Stage

    @property
    def peak(self) -> int:
        """Bytes that the hungriest stage is expected to take."""
        return max(stage.peak for stage in (self.text, self.denoise, self.decode))

    def __str__(self) -> str:
        return (
            f"{self.height} x {self.width} px in {in_gib(self.budget)} on {self.device}: expected peak "
            f"{in_gib(self.peak)}, one stage in memory at a time\n"
            f"  {self.text} > {self.denoise} > {self.decode}"
        )


def in_gib(size: int) -> str:
    """1610612736 -> "1.50 GiB"; what is under a tenth of one, in MiB or KiB."""
    power, unit = next(
        (each for each in ((30, "GiB"), (20, "MiB")) if size >= 2 ** each[0] / 10), (10, "KiB")
    )
    return f"{size / 2**power:.2f} {unit}"


def plan_memory(
    parts: Parts,
    budget: int,
    *,
    device: str = "cpu",
    size: tuple[int, int] | None = None,
    batch: int = 1,
    guided: bool = True,
) -> MemoryPlan:
    """The fastest plan for `batch` pictures at once or fewer that fits in `budget` bytes of a device.

    `device` is "cpu", "mps", "cuda" or one of several, "cuda:1". `size` is (height, width) in pixels, the
    U-Net's own unless given; `guided` is classifier-free guidance, which evaluates two captions a picture.
    Raises `RecipeError`, with the least that would do and what else would help, where nothing fits.
    """
    height, width = size or (parts.size(),) * 2
    check_size(height, width, size_multiple(parts.vae))
    for most in halves(batch):  # a text encoder may want fewer at once than the U-Net
        job = _Job(parts, device, height, width, most, guided)
        denoise = _first_fit(job.denoise(), budget)
        if denoise is None:
            break
        job = replace(job, batch=denoise.batch)
        text, decode = _first_fit(job.text(), budget), _first_fit(job.decode(), budget)
        if text is not None and decode is not None:
            return MemoryPlan(device, budget, height, width, text, denoise, decode)
        if decode is None:
            break
    raise RecipeError(_too_little(job, budget))


def _first_fit(choices: Iterator[Stage], budget: int) -> Stage | None:
    usable = (stage for stage in choices if has_int8() or not stage.int8)
    return next((stage for stage in usable if stage.peak <= budget), None)


def has_int8() -> bool:
    """Whether the packages for 8-bit weights are installed."""
    return all(importlib.util.find_spec(name) for name in ("torchao", "accelerate"))


def require_int8() -> None:
    """Raise `RecipeError` where 8-bit weights cannot be had."""
    if not has_int8():
        raise RecipeError('8-bit weights: need torchao and accelerate. pip install "shoestring[int8]"')


@dataclass(frozen=True)
class _Job:
    """What is to be drawn, and the choices there are for each stage, faster first."""

    parts: Parts
    device: str
    height: int
    width: int
    batch: int
    guided: bool

    @property
    def kind(self) -> str:
        """The device's, "cuda" of "cuda:1": what the tables above go by."""
        return torch.device(self.device).type

    def least(self) -> dict[str, int]:
        """Bytes that each stage takes at the least, for one picture at a time."""
        one = replace(self, batch=1)
        choices = {"text": one.text, "denoise": one.denoise, "decode": one.decode}
        return {
            name: min(stage.peak for stage in each() if has_int8() or not stage.int8)
            for name, each in choices.items()
        }

    def text(self) -> Iterator[Stage]:
        """All text encoders at once, for the prompts of one batch."""
        encoders = self.parts.text
        for dtype in DTYPES[self.kind]:
            weights = sum(each.values for each in encoders) * dtype.itemsize
            live = max((each.live(self.batch, dtype) for each in encoders), default=0)
            yield Stage("text", self.device, dtype, self.batch, self.peak(weights, live))
        if self.kind != "cpu":
            yield Stage("text", "cpu", torch.float32, self.batch, 0)

    def denoise(self) -> Iterator[Stage]:
        """The U-Net at each number type, pictures at once halved to one. UNetPipeline keeps its decoder."""
        kept = count_values(self.parts.vae) if self.parts.kind == "UNetPipeline" else 0
        for dtype, int8 in (*((dtype, False) for dtype in DTYPES[self.kind]), (INT8_DTYPE, True)):
            weights = unet_bytes(self.parts.unet, dtype, int8=int8) + kept * dtype.itemsize
            widened = largest_linear(self.parts.unet, dtype) if int8 else 0
            for batch in halves(self.batch):
                live = self.unet_live(batch, dtype) + widened
                yield Stage("denoise", self.device, dtype, batch, self.peak(weights, live), int8=int8)

    def unet_live(self, batch: int, dtype: torch.dtype) -> int:
        """Bytes alive at the worst moment of one evaluation."""
        factor = spatial_factor(self.parts.vae)
        sides = round(self.height / factor), round(self.width / factor)
        return denoise_live(self.parts.unet, batch * (2 if self.guided else 1), sides, dtype)

    def decode(self) -> Iterator[Stage]:
        """The decoder whole, then in tiles where it can and where they are smaller than the picture."""
        vae = self.parts.vae
        dtype = decode_dtype(vae, DTYPES[self.kind][0])
        weights = (count_values(vae) + self.parts.other_values) * dtype.itemsize
        tiny = isinstance(vae, AutoencoderTiny)
        can = isinstance(vae, (AutoencoderKL, AutoencoderTiny))
        for tile in (None, *(tile for tile in TILES if can and tile < max(self.height, self.width))):
            for batch in halves(self.batch) if tile is None else (1,):
                live = decode_live(vae, batch, (self.height, self.width), dtype, tile)
                peak = self.peak(weights, live)
                yield Stage("decode", self.device, dtype, batch, peak, tile=tile, tiny=tiny)

    def peak(self, weights: int, live: int) -> int:
        """Bytes of the device's memory."""
        return FIXED[self.kind] + weights + round(FACTOR[self.kind] * live)


def halves(count: int) -> Iterator[int]:
    """16 -> 16, 8, 4, 2, 1."""
    while count >= 1:
        yield count
        count //= 2


def _too_little(job: _Job, budget: int) -> str:
    least = job.least()
    name = max(least, key=least.__getitem__)
    wanted = least[name]
    what = {"text": "its text encoders", "denoise": "its U-Net, one picture at a time", "decode": "decoding"}
    advice = [f"Give at least {wanted / 2**30 + 0.005:.2f}GiB"]
    if name == "denoise" and not has_int8():
        advice.append('8-bit weights (pip install "shoestring[int8]")')
    others = max(size for stage, size in least.items() if stage != "decode")
    lower = in_gib(others) != in_gib(wanted)  # which a smaller decoder might come to
    if name == "decode" and isinstance(job.parts.vae, AutoencoderKL) and lower:
        advice.append("a tiny decoder (--tiny-decoder)")
    multiple = size_multiple(job.parts.vae)
    smaller = [max(multiple, side // 2 // multiple * multiple) for side in (job.height, job.width)]
    half = max(replace(job, height=smaller[0], width=smaller[1]).least().values())
    if in_gib(half) != in_gib(wanted):
        advice.append(f"a smaller picture ({smaller[0]} x {smaller[1]} px takes {in_gib(half)})")
    return (
        f"--memory {in_gib(budget)}: {job.height} x {job.width} px on {job.device} takes {in_gib(wanted)} at "
        f"the least, for {what[name]}. {', or '.join(advice)}."
    )
