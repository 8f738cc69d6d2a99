"""Device, number type, threads, keyed randomness and the peak-memory meter."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from shoestring.errors import RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as a signed 64-bit integer
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the first of cuda, mps, cpu that is there; raises `RecipeError` for one that is not."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device {name!r}: unknown. Use auto, cpu, cuda, cuda:N or mps.") from None
    there: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if device.type not in there or not there[device.type]():
        raise RecipeError(f"device {name!r}: not available here. Use --device cpu or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"device {name!r}: there are {torch.cuda.device_count()}, counted from cuda:0.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type: `auto` is bfloat16 on a GPU that has it and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name not in DTYPES:
        raise RecipeError(f"dtype {name!r}: unknown. Use auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Mixed precision for the forward pass: weights stay float32; nothing to do in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Within `autocast`: compute in the tensors' own types."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def set_threads(count: int | None) -> int:
    """Fix the number of CPU threads (results depend on it in the last bit); returns the number in force."""
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def keyed_uniform(seed: int, stream: str, index: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Uniform draws in [0, 1) that depend on (seed, stream, index) alone: (B,) int64 -> (B, *shape) float32.

    A counter-based generator (splitmix64 over a hashed key): the same bits on every device, for any
    grouping of the indices into batches and processes, and after any resume.
    """
    bits = _keyed_bits(seed, stream, index, math.prod(shape))
    return (_high24(bits) * 2.0**-24).view(index.shape[0], *shape)


def keyed_normal(seed: int, stream: str, index: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Standard normal draws that depend on (seed, stream, index) alone: (B,) int64 -> (B, *shape) float32.

    Box-Muller on the bits behind `keyed_uniform`; equal across devices up to rounding of log, cos, sin.
    """
    count = math.prod(shape)
    bits = _keyed_bits(seed, stream, index, (count + 1) // 2)
    radius = ((_high24(bits) + 0.5) * 2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = (bits & 0xFFFFFF).float().mul_(2.0 * math.pi * 2.0**-24)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.flatten(1)[:, :count].reshape(index.shape[0], *shape)


def keyed_seed(seed: int, stream: str) -> int:
    """A 63-bit seed for a named purpose, for generators that want one number."""
    digest = hashlib.blake2b(f"{seed}:{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def keyed_generator(seed: int, stream: str, index: Tensor) -> Iterator[None]:
    """torch's own generators (CPU, CUDA) keyed by (seed, stream, index[0]), for layers that draw from them.

    Within, dropout and stochastic depth depend on that key alone, so a resumed run drops what an unbroken
    one does; afterwards the global generators stand where they stood. The key is the first image of what one
    process computes in one pass: unlike the draws above, other numbers of processes or microbatches drop
    other features. Reads `index[0]` of (B,) back from its device, which waits for it; no keying on `meta`.
    """
    if index.device.type == "meta":
        yield
        return
    key = keyed_seed(seed, f"{stream}:{int(index[0])}")
    cuda = [index.device] if index.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        # Not torch.manual_seed: it also sets the generators of devices that are not restored.
        torch.default_generator.manual_seed(key)
        for device in cuda:
            torch.cuda.default_generators[device.index].manual_seed(key)
        yield


def _keyed_bits(seed: int, stream: str, index: Tensor, count: int) -> Tensor:
    """(B,) int64 -> (B, count) int64 of 64 random bits each."""
    start = _mix(_mix(index * _GOLDEN) ^ keyed_seed(seed, stream))
    counter = torch.arange(1, count + 1, device=index.device, dtype=torch.int64) * _GOLDEN
    return _mix(start[:, None] + counter)


def _mix(z: Tensor) -> Tensor:
    """The splitmix64 finaliser; `>>` on int64 copies the sign, so the copied bits are masked off."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MIX_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def _high24(bits: Tensor) -> Tensor:
    return ((bits >> 40) & 0xFFFFFF).float()


class PeakMemory:
    """Peak memory since the last `reset`: of the allocator on a GPU, of the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Start a new measurement; a CPU process's peak can be reset on Linux only."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                file.write("5")

    def bytes(self) -> int:
        """Peak bytes since the last reset."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with contextlib.suppress(OSError), open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """The processor's name and core count, for ledgers and benchmark results."""
    name = "cpu"
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name} x {os.cpu_count()}"
