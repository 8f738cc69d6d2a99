"""Text tokens as a store keeps them: float16, or int8 with one scale a token and one a channel.

    int8:  token[c] = values[c] * scale * channels[c],   values in -127 .. 127

`channels` is each channel's root mean square over a calibration set, fixed once a store: the few channels of
large values that text encoders have then cost the others no precision. `scale` makes 127 of the token's
largest value in units of its channel. A zero token is stored exactly.

Scales are float32: in float16 they would save 2 bytes of 1028 at width 1024, change no error, and overflow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FLOAT16, INT8 = "float16", "int8"
DESCRIBED = {FLOAT16: "float16", INT8: "int8 token x channel"}
"""`--text-dtype` -> what the manifest says."""

LARGEST = 127
FLOOR = 0.01  # of the channels' mean: a channel silent in calibration may speak later
LARGE_CHANNELS = 8  # cosine over all channels hides what befalls the others: told without these as well
AT_ONCE = 2**19  # values turned back at once
MEASURED = 512  # tokens of a batch of captions whose error is measured


def dtype_of(described: str) -> str:
    """`--text-dtype` of what a manifest says."""
    return next(name for name, words in DESCRIBED.items() if words == described)


def calibrate(tokens: Tensor) -> list[float]:
    """The scale of each channel from tokens (T, C): root mean squares to three digits, none near zero."""
    square_sum = tokens.double().square().sum(dim=0)
    scales = (square_sum / max(1, len(tokens))).sqrt()
    if not scales.any():
        return [1.0] * tokens.shape[1]
    return [float(f"{scale:.3g}") for scale in scales.clamp(min=FLOOR * scales.mean()).tolist()]


def pack(tokens: Tensor, channels: Tensor | None) -> dict[str, NDArray[Any]]:
    """Tokens (T, C) float32 -> arrays of a text shard: `tokens`, and with `channels` (C,) `scales` (T,).

    Raises `OverflowError` for values that are not finite, or beyond float16 where that is the form.
    """
    if channels is None:
        half = tokens.half()
        if not torch.isfinite(half).all():
            raise OverflowError("beyond float16's range")
        return {"tokens": half.numpy()}
    if not torch.isfinite(tokens).all():
        raise OverflowError("that are not finite numbers")
    units = tokens.float() / channels
    scales = units.abs().amax(dim=1) / LARGEST
    safe = torch.where(scales > 0, scales, 1.0)
    values = (units / safe[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return {"tokens": values.numpy(), "scales": scales.numpy()}


def unpack(tokens: NDArray[Any], scales: NDArray[np.float32] | None, channels: Tensor | None) -> Tensor:
    """Stored tokens (..., C) with scales (...) -> float32, in torch (numpy's float16 is 30 times slower)."""
    values = torch.from_numpy(tokens)
    if channels is None or scales is None:
        return values.float()
    out, scale = torch.empty(values.shape), torch.from_numpy(scales)[..., None]
    step = max(1, AT_ONCE // max(1, values[:1].numel()))
    for start in range(0, len(values), step):  # in the cache: several passes over a whole batch are not
        part = slice(start, start + step)
        torch.mul(values[part], channels, out=out[part])
        out[part].mul_(scale[part])
    return out


def error_of(tokens: Tensor, stored: Mapping[str, NDArray[Any]], channels: Tensor | None) -> dict[str, Any]:
    """How far stored tokens are from those encoded: 1 - cos, of at most `MEASURED` evenly spaced tokens.

    `without_large` leaves out the channels of largest root mean square among them. Zero tokens, which have
    no direction, are left out.
    """
    picked = np.arange(min(len(tokens), MEASURED)) * len(tokens) // max(1, min(len(tokens), MEASURED))
    scales = stored.get("scales")
    kept = unpack(stored["tokens"][picked], None if scales is None else scales[picked], channels).double()
    given = tokens[torch.from_numpy(picked)].double()
    real = given.any(dim=1)
    given, kept = given[real], kept[real]
    large = given.square().sum(dim=0).topk(min(LARGE_CHANNELS, given.shape[1] - 1)).indices
    rest = torch.ones(given.shape[1], dtype=torch.bool).index_fill(0, large, False)
    return {
        "tokens": len(given),
        **_spread(_one_minus_cosine(given, kept)),
        "without_large": _spread(_one_minus_cosine(given[:, rest], kept[:, rest])),
    }


def combined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Errors of several parts as one: means weighted by tokens, the largest of all."""
    parts = [part for part in parts if part["tokens"]]
    total = sum(part["tokens"] for part in parts)

    def of(measures: list[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
        mean = sum(count * measure["mean"] for count, measure in measures) / max(1, total)
        return _rounded(mean, max((measure["largest"] for _, measure in measures), default=0.0))

    return {
        "tokens": total,
        **of([(part["tokens"], part) for part in parts]),
        "without_large": of([(part["tokens"], part["without_large"]) for part in parts]),
    }


def _one_minus_cosine(one: Tensor, other: Tensor) -> Tensor:
    """(T, C) float64 twice -> (T,), 0 where a row of either is zero in these channels."""
    norms = one.norm(dim=1) * other.norm(dim=1)
    return torch.where(norms > 0, 1 - (one * other).sum(dim=1) / norms.clamp(min=1e-300), 0.0).clamp(min=0)


def _spread(errors: Tensor) -> dict[str, float]:
    return _rounded(float(errors.mean()), float(errors.max())) if len(errors) else _rounded(0.0, 0.0)


def _rounded(mean: float, largest: float) -> dict[str, float]:
    """Three digits: sums differ in their last bits between machines, which share one store."""
    return {"mean": float(f"{mean:.3g}"), "largest": float(f"{largest:.3g}")}
