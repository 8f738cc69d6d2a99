"""A store's two encoders on their device: pictures to latents and captions to tokens, as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shoestring.data.store import split_revision
from shoestring.data.text_column import DESCRIBED, INT8, calibrate, combined, error_of, pack
from shoestring.data.transforms import mirrored
from shoestring.errors import ShoestringError, StoreError
from shoestring.models.autoencoders import (
    PixelAutoencoder,
    as_scaling,
    encode_images,
    encoder_fingerprint,
    latent_channels,
    latent_side,
    load_autoencoder,
    size_multiple,
    spatial_factor,
    weights_fingerprint,
)
from shoestring.models.text_encoders import TextEncoder, load_text_encoder

PIXELS_AT_ONCE = 2**22  # of a batch of images for the autoencoder
CAPTIONS_AT_ONCE = 1024

Arrays = dict[str, NDArray[Any]]


class ImageEncoder:
    """An autoencoder: pictures (B, H, W, 3) uint8 to raw latents."""

    def __init__(
        self,
        model: torch.nn.Module,
        name: str,
        revision: str | None = None,
        *,
        device: torch.device | None = None,
        log_variance: bool = False,
    ) -> None:
        if log_variance and type(model).__name__ != "AutoencoderKL":
            raise StoreError(f"log_variance: {name} gives no distribution. Leave out --log-variance.")
        self.device = device or torch.device("cpu")
        self.model, self.name, self.revision = model.to(self.device), name, revision
        self.log_variance = log_variance
        self.is_pixels = isinstance(model, PixelAutoencoder)

    @classmethod
    def load(cls, name: str, **options: Any) -> ImageEncoder:
        """The autoencoder `name` (`id@revision`)."""
        place, revision = split_revision(name)
        return cls(load_autoencoder(place, revision=revision), place, revision, **options)

    def identity(self) -> dict[str, Any]:
        """The manifest's entry, with `encoder_weights` where a decoder may change without the latents."""
        scaling = as_scaling(self.model)
        weights, encoder_weights = weights_fingerprint(self.model), encoder_fingerprint(self.model)
        return {
            "id": self.name,
            "revision": self.revision,
            "class": type(self.model).__name__,
            "channels": latent_channels(self.model),
            "spatial_factor": spatial_factor(self.model),
            "scaling": {"shift": list(scaling.shift), "factor": list(scaling.factor)},
            "weights": weights,
            **({} if encoder_weights == weights else {"encoder_weights": encoder_weights}),
        }

    @property
    def dtype(self) -> str:
        """What latents are stored as, in words."""
        return "uint8 (x = value / 127.5 - 1)" if self.is_pixels else "float16, raw (unscaled)"

    def shapes(self, sizes: Sequence[int]) -> dict[str, list[int]]:
        """[C, h, w] of the latents at each size; raises `StoreError` for one that does not fit."""
        channels, multiple = latent_channels(self.model), size_multiple(self.model)
        if odd := [size for size in sizes if size % multiple]:
            below = odd[0] // multiple * multiple
            near = " or ".join(str(each) for each in (below, below + multiple) if each)
            raise StoreError(
                f"size {odd[0]}: this autoencoder needs multiples of {multiple}; nearest: {near}."
            )
        sides = {size: latent_side(self.model, size) for size in sizes}
        return {str(size): [channels, side, side] for size, side in sides.items()}

    def columns(self, pictures: NDArray[np.uint8], mirror: NDArray[np.bool_] | None = None) -> Arrays:
        """Latents (B, C, h, w) as stored: `mean`, `log_variance` where wanted, and each mirrored.

        `mirror` (B,) says which pictures have a mirrored version; the others' is a copy.
        """
        arrays = self._encode(pictures)
        if mirror is None:
            return arrays
        flipped = {f"{name}_flipped": array.copy() for name, array in arrays.items()}
        if mirror.any():
            turned = self._encode(np.stack([mirrored(each) for each in pictures[mirror]]))
            for name, values in turned.items():
                flipped[f"{name}_flipped"][mirror] = values
        return arrays | flipped

    def none(self, shape: Sequence[int]) -> Arrays:
        """The latents of no picture at all."""
        return {"mean": np.empty((0, *shape), np.uint8 if self.is_pixels else np.float16)}

    def _encode(self, pictures: NDArray[np.uint8]) -> Arrays:
        if self.is_pixels:
            model: Any = self.model
            values = model.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2)).latent
            return {"mean": np.ascontiguousarray(values.numpy())}
        images = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, log_variance = encode_images(self.model, images)
        latents = mean.half().cpu().numpy()
        if not np.isfinite(latents).all():
            raise ShoestringError(
                f"autoencoder {self.name}: gave latents beyond float16's range, in float32 arithmetic: its "
                "weights are damaged or for other pictures. Give another --autoencoder."
            )
        if not self.log_variance or log_variance is None:
            return {"mean": latents}
        return {"mean": latents, "log_variance": log_variance.half().cpu().numpy()}


class CaptionEncoder:
    """A text encoder: captions to the arrays of a text shard, float16 or int8."""

    def __init__(self, encoder: TextEncoder, dtype: str, *, device: torch.device | None = None) -> None:
        if dtype not in DESCRIBED:
            raise StoreError(f"text_dtype {dtype!r}: unknown. Use one of {', '.join(DESCRIBED)}.")
        encoder.model.to(device or torch.device("cpu"))
        self.encoder, self.dtype = encoder, dtype

    @classmethod
    def load(
        cls, name: str, dtype: str, *, pad: str, max_tokens: int | None, device: torch.device | None = None
    ) -> CaptionEncoder:
        """The text encoder `name` (`id@revision`)."""
        place, revision = split_revision(name)
        encoder = load_text_encoder(place, max_tokens=max_tokens, pad=pad, revision=revision)
        return cls(encoder, dtype, device=device)

    def identity(self) -> dict[str, Any]:
        """The manifest's entries: the encoder, and the form of its tokens."""
        probe = self.encoder.encode(["a probe"]).pooled
        pooled = None if probe is None else probe.shape[1]
        return {
            "text_encoder": self.encoder.identity() | {"pooled": pooled},
            "text_dtype": DESCRIBED[self.dtype],
        }

    @property
    def needs_calibration(self) -> bool:
        """True where `calibrated` wants captions."""
        return self.dtype == INT8

    def calibrated(self, captions: Sequence[str]) -> dict[str, Any]:
        """`text_channels` for the manifest, from the tokens of some captions; nothing for float16."""
        if not self.needs_calibration:
            return {}
        tokens = [torch.zeros(1, self.encoder.width), *self.encoder.encode(captions).tokens]
        return {"text_channels": calibrate(self._finite(torch.cat(tokens)))}

    def columns(
        self, captions: Sequence[str], channels: Sequence[float] | None
    ) -> tuple[Arrays, dict[str, Any]]:
        """The arrays of a text shard of these captions, and what a marker says of them."""
        scales = None if channels is None else torch.tensor(channels, dtype=torch.float32)
        parts = [pack(torch.zeros(0, self.encoder.width), scales)]
        lengths, pooled, cut, errors = [0], list[NDArray[Any]](), list[int](), list[dict[str, Any]]()
        for start in range(0, len(captions), CAPTIONS_AT_ONCE):
            encoded = self.encoder.encode(captions[start : start + CAPTIONS_AT_ONCE])
            tokens = self._finite(torch.cat(encoded.tokens))
            parts.append(self._packed(tokens, scales))
            errors.append(error_of(tokens, parts[-1], scales))
            lengths += [len(each) for each in encoded.tokens]
            pooled += [] if encoded.pooled is None else [self._packed(encoded.pooled, None)["tokens"]]
            cut += encoded.cut
        arrays: Arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        arrays["offsets"] = np.cumsum(lengths).astype(np.int64)
        if pooled:
            arrays["pooled"] = np.concatenate(pooled)
        return arrays, {
            "cut": {"captions": sum(each > 0 for each in cut), "tokens": sum(cut)},
            "text": {"captions": len(captions), "tokens": sum(lengths), "error": combined(errors)},
        }

    def _packed(self, tokens: torch.Tensor, scales: torch.Tensor | None) -> Arrays:
        try:
            return pack(tokens, scales)
        except OverflowError as error:
            raise ShoestringError(f"text encoder {self.encoder.name}: gave tokens {error}.") from None

    def _finite(self, tokens: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(tokens).all():
            raise ShoestringError(
                f"text encoder {self.encoder.name}: gave tokens that are not finite numbers."
            )
        return tokens


@dataclass
class Encoders:
    """Both encoders of a store."""

    image: ImageEncoder
    text: CaptionEncoder
