"""Autoencoders behind one set of functions: `pixels` (identity), diffusers' AutoencoderKL, Tiny and DC,
Würstchen's three networks together, and its Stage A alone.

    images in [-1, 1] --encode_images--> raw latents --scale_latents--> what the model sees
    images in [-1, 1] <--decode_latents-------------------------------- what the model makes

A store keeps raw latents; scaled = (raw - shift) * factor. The tiny autoencoder is trained to give latents
that need no scaling: its configuration says factor 1, which is used as it stands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring.errors import RecipeError
from shoestring.models.hub import CLIENT, first_line
from shoestring.models.quiet import cast, muted, no_bars
from shoestring.models.sizes import check_size
from shoestring.models.wuerstchen_autoencoder import WuerstchenAutoencoder, vq_factor
from shoestring.models.wuerstchen_vqgan import PaellaVQModel
from shoestring.storage import RunFolder

PIXELS = "pixels"
FOLDED = "pixels-folded"
FOLDED_SCALE = 0.4  # Stable Diffusion's noise schedule leaves too little noise on pictures in [-1, 1]
PIXELS_AT_ONCE = 2**20  # an AutoencoderKL takes 2.5 KB for each to encode and 4 KB to decode, in float32
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as diffusers clamps it


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """The identity: a picture is its own latent. Lets models train on pixels with nothing to download.

    With `fold` F, squares of F x F pixels become channels: (3, H, W) -> (3 F F, H / F, W / F).
    """

    @register_to_config
    def __init__(self, latent_channels: int = 3, scaling_factor: float = 1.0, fold: int = 1) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(1))  # gives the model a file, a device and a type

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        z = F.pixel_unshuffle(x, self.config["fold"])
        return EncoderOutput(latent=z) if return_dict else (z,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> Any:
        x = F.pixel_shuffle(z, self.config["fold"])
        return DecoderOutput(sample=x) if return_dict else (x,)

    def forward(self, sample: Tensor) -> Any:
        return self.decode(self.encode(sample).latent)


CLASSES: dict[str, Any] = {
    "PixelAutoencoder": PixelAutoencoder,
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
    "AutoencoderDC": AutoencoderDC,
    "PaellaVQModel": PaellaVQModel,
    "WuerstchenAutoencoder": WuerstchenAutoencoder,
}


@dataclass(frozen=True)
class LatentScaling:
    """scaled = (raw - shift) * factor, each one number or one a channel."""

    shift: tuple[float, ...] = (0.0,)
    factor: tuple[float, ...] = (1.0,)

    def apply(self, raw: Tensor) -> Tensor:
        """Raw -> scaled latents, (B, C, h, w)."""
        return (raw - self._like(self.shift, raw)) * self._like(self.factor, raw)

    def undo(self, scaled: Tensor) -> Tensor:
        """Scaled -> raw latents, (B, C, h, w)."""
        return scaled / self._like(self.factor, scaled) + self._like(self.shift, scaled)

    @property
    def is_identity(self) -> bool:
        """True where scaling changes nothing."""
        return set(self.shift) == {0.0} and set(self.factor) == {1.0}

    @staticmethod
    def _like(values: tuple[float, ...], latents: Tensor) -> Tensor:
        return torch.tensor(values, dtype=latents.dtype, device=latents.device).view(-1, 1, 1)


class _AnyConfig(ConfigMixin):
    """Reads any diffusers `config.json`."""

    config_name = "config.json"


def load_autoencoder(path_or_id: str, revision: str | None = None) -> nn.Module:
    """`pixels`, `pixels-folded`, or the autoencoder in a local folder or hub repository, in float32.

    A place is the autoencoder itself, or a pipeline with it in `vae/`; with `vqgan/`, `decoder/` and
    `compressor/` it is a `WuerstchenAutoencoder`, with `vqgan/` alone a `PaellaVQModel`. For a run, its
    exported pipeline is taken. Reads safetensors only (those named `fp16` where there are no others). Raises
    `RecipeError` where there is none, or one of an unknown class, `CheckpointError` where parts of
    Würstchen's are missing.
    """
    if path_or_id == PIXELS:
        return PixelAutoencoder().eval()
    if path_or_id == FOLDED:
        return PixelAutoencoder(latent_channels=12, scaling_factor=FOLDED_SCALE, fold=2).eval()
    refuse_single_file("autoencoder", path_or_id)
    path_or_id = _exported(path_or_id)
    subfolder, name = _find_config(path_or_id, revision)
    if subfolder == "vqgan" and _has_more(path_or_id, revision):
        return WuerstchenAutoencoder.from_folder(path_or_id, revision=revision).requires_grad_(False)
    if name not in CLASSES:
        raise RecipeError(
            f"autoencoder {path_or_id}: its config.json names the class {name}. Known: {', '.join(CLASSES)}."
        )
    try:
        with no_bars(), muted("diffusers.configuration_utils", about=name):
            model = _read_weights(CLASSES[name], path_or_id, subfolder, revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"autoencoder {path_or_id}: cannot be loaded ({first_line(error)}). "
            "It needs diffusion_pytorch_model.safetensors (or .fp16.safetensors) beside its config.json."
        ) from error
    model.requires_grad_(False)
    return model.eval()


@torch.no_grad()
def encode_images(autoencoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Images (B, 3, H, W) in [-1, 1] -> raw latents (B, C, h, w): mean and log-variance (None without one).

    Computed in the autoencoder's own type, a few images at a time, returned in float32.
    """
    means, spreads = [], []
    with _safe_type(autoencoder) as dtype:
        for part in _parts(autoencoder, images, 1):
            result = autoencoder.encode(_as_read(autoencoder, part).to(dtype))  # type: ignore[operator]
            if hasattr(result, "latent_dist"):
                means.append(result.latent_dist.mean.float())
                spreads.append(result.latent_dist.logvar.float().clamp(*LOG_VARIANCE_RANGE))
            else:
                means.append((result.latents if hasattr(result, "latents") else result.latent).float())
    return torch.cat(means), torch.cat(spreads) if spreads else None


def sample_latents(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """One draw of raw latents: mean + exp(log_variance / 2) * noise."""
    return mean + torch.exp(0.5 * log_variance) * noise


def scale_latents(scaling: nn.Module | LatentScaling, raw: Tensor) -> Tensor:
    """Raw latents (B, C, h, w) -> as the model sees them: (raw - shift) * factor."""
    return as_scaling(scaling).apply(raw)


def decode_latents(autoencoder: nn.Module, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> images (B, 3, H, W) float32 in [-1, 1], a few at a time."""
    raw = as_scaling(autoencoder).undo(latents.float())
    with _safe_type(autoencoder) as dtype:
        parts = _parts(autoencoder, raw, spatial_factor(autoencoder))
        images = [_decode(autoencoder, part.to(dtype)).float() for part in parts]
    return torch.cat(images).clamp(-1, 1)


def as_scaling(scaling: nn.Module | LatentScaling) -> LatentScaling:
    """The scaling that an autoencoder's configuration asks for (or the scaling given)."""
    if isinstance(scaling, LatentScaling):
        return scaling
    config: Any = scaling.config
    if isinstance(scaling, PaellaVQModel):
        return LatentScaling((0.0,), (1 / float(config["scale_factor"]),))
    if isinstance(scaling, WuerstchenAutoencoder):
        config = scaling.compressor.config
    factor = float(config.get("scaling_factor") or 1.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:  # a few AutoencoderKL (Playground 2.5) normalise by channel
        return LatentScaling(_numbers(mean), tuple(factor / each for each in _numbers(std)))
    return LatentScaling((float(config.get("shift_factor") or 0.0),), (factor,))


def spatial_factor(autoencoder: nn.Module) -> int | float:
    """Pixels along one side of a latent cell: 1 for pixels, 8 for Stable Diffusion's, 32 for DC.

    A fraction for Würstchen's: 128 / 3 as published. `latent_side` is exact.
    """
    if isinstance(autoencoder, PixelAutoencoder):
        return int(autoencoder.config["fold"])
    if isinstance(autoencoder, WuerstchenAutoencoder):
        factor = autoencoder.factor
        return int(factor) if factor.denominator == 1 else float(factor)
    config: Any = autoencoder.config
    if isinstance(autoencoder, PaellaVQModel):
        return vq_factor(config)
    # The tiny class's own `spatial_scale_factor` is 2**out_channels, right for 3 colours and 4 blocks alone.
    blocks = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return int(2 ** (len(blocks) - 1))


def size_multiple(autoencoder: nn.Module) -> int:
    """Sides of images must be multiples of this: a cell's side, or 128 for Würstchen's as published."""
    if isinstance(autoencoder, WuerstchenAutoencoder):
        return autoencoder.size_multiple
    return int(spatial_factor(autoencoder))


def latent_side(autoencoder: nn.Module, size: int) -> int:
    """Latent cells along a side of `size` pixels; raises `RecipeError`, with the nearest, where none fit."""
    check_size(size, size, size_multiple(autoencoder))
    return round(size / spatial_factor(autoencoder))


def latent_channels(autoencoder: nn.Module) -> int:
    """Channels of the latents."""
    if isinstance(autoencoder, WuerstchenAutoencoder):
        return int(autoencoder.compressor.config["c_latent"])
    config: Any = autoencoder.config
    return int(config["latent_channels"])


def weights_fingerprint(module: nn.Module) -> str:
    """A short hash of a network's weights: names, shapes and first values.

    Reads a few numbers of each tensor, so it is quick for any size and tells different weights apart.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        head: Sequence[float] = tensor.detach().flatten()[:16].float().cpu().tolist()
        digest.update(json.dumps([name, list(tensor.shape), head]).encode())
    return digest.hexdigest()[:16]


def encoder_fingerprint(autoencoder: nn.Module) -> str:
    """`weights_fingerprint` of what decides the latents: Würstchen's compressor, else the whole network.

    So that a decoder trained later for the same compressor may stand in for the first one.
    """
    if isinstance(autoencoder, WuerstchenAutoencoder):
        return weights_fingerprint(autoencoder.compressor)
    return weights_fingerprint(autoencoder)


def refuse_single_file(kind: str, path_or_id: str) -> None:
    """Raise `RecipeError` for a whole pipeline in one file: its parts' configurations are not in there."""
    if Path(path_or_id).is_file():
        raise RecipeError(
            f"{kind} {path_or_id}: is a single file. Make a folder of it once, with diffusers' "
            "StableDiffusionXLPipeline.from_single_file(FILE).save_pretrained(FOLDER), and give the folder."
        )


def _read_weights(kind: Any, path_or_id: str, subfolder: str | None, revision: str | None) -> Any:
    """A network of a diffusers class in float32; raises OSError where no safetensors are there."""
    problem: OSError | None = None
    for variant in (None, "fp16"):
        try:
            return kind.from_pretrained(
                path_or_id,
                subfolder=subfolder,
                revision=revision,
                variant=variant,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
            )
        except OSError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _exported(path_or_id: str) -> str:
    """A run's exported pipeline where `path_or_id` is a run; anything else as it is."""
    run = RunFolder(Path(path_or_id))
    if not run.recipe.is_file():
        return path_or_id
    if not run.pipeline.is_dir():
        raise RecipeError(f"autoencoder {path_or_id}: a run that has exported no pipeline/ yet.")
    return str(run.pipeline)


def _find_config(path_or_id: str, revision: str | None) -> tuple[str | None, str]:
    """(subfolder, class name) of the autoencoder at a place: at the top, in `vae/` or in `vqgan/`."""
    problem: Exception | None = None
    for subfolder in (None, "vae", "vqgan"):
        try:
            return subfolder, _class_at(path_or_id, subfolder, revision)
        except (OSError, ValueError, KeyError) as error:
            problem = problem or error
    if Path(path_or_id).exists() or _looks_local(path_or_id):
        raise RecipeError(
            f"autoencoder {path_or_id}: no autoencoder there (a folder with config.json and "
            "diffusion_pytorch_model.safetensors, or a pipeline's folder with vae/). "
            f"Give such a folder, a hub id such as stabilityai/sdxl-vae, or {PIXELS}."
        )
    raise RecipeError(
        f"autoencoder {path_or_id}: neither a local folder nor to be had from the hub "
        f"({first_line(problem) if problem else 'no configuration'}). "
        f"Give a folder, a hub id such as stabilityai/sdxl-vae, or {PIXELS}."
    )


def _has_more(path_or_id: str, revision: str | None) -> bool:
    """Whether Stage B or the compressor lies beside a `vqgan/`."""
    for subfolder in ("decoder", "compressor"):
        try:
            _class_at(path_or_id, subfolder, revision)
            return True
        except (OSError, ValueError, KeyError):
            continue
    return False


def _class_at(path_or_id: str, subfolder: str | None, revision: str | None) -> str:
    """The class that a `config.json` names; raises OSError, ValueError or KeyError where there is none."""
    with no_bars(), muted(CLIENT):
        config = _AnyConfig.load_config(path_or_id, subfolder=subfolder, revision=revision)
    return str(config["_class_name"])


def _looks_local(path_or_id: str) -> bool:
    return path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") != 1


def _as_read(autoencoder: nn.Module, images: Tensor) -> Tensor:
    """Images [-1, 1] in the range the network reads: Stage A's is [0, 1]."""
    return (images + 1) / 2 if isinstance(autoencoder, PaellaVQModel) else images


def _decode(autoencoder: nn.Module, raw: Tensor) -> Tensor:
    """Raw latents -> images, about [-1, 1]. Stage A is taken without its quantisation, as Würstchen does."""
    if isinstance(autoencoder, PaellaVQModel):
        return autoencoder.decode(raw, force_not_quantize=True).sample * 2 - 1
    images: Tensor = autoencoder.decode(raw).sample  # type: ignore[operator]
    return images


def _numbers(value: Any) -> tuple[float, ...]:
    """One number, or one a channel."""
    return (float(value),) if isinstance(value, (int, float)) else tuple(map(float, value))


def _parts(autoencoder: nn.Module, batch: Tensor, factor: float) -> Sequence[Tensor]:
    """A batch in parts of at most `PIXELS_AT_ONCE` pixels, where `factor` of them lie along a cell's side."""
    if isinstance(autoencoder, PixelAutoencoder) or not len(batch):
        return [batch]
    pixels = batch.shape[-2] * batch.shape[-1] * factor**2
    return batch.split(max(1, int(PIXELS_AT_ONCE // pixels)))


@contextmanager
def _safe_type(autoencoder: nn.Module) -> Iterator[torch.dtype]:
    """The autoencoder's type; for the while float32 where its configuration says that float16 overflows."""
    own = _dtype(autoencoder)
    config: Any = autoencoder.config
    upcast = own == torch.float16 and bool(config.get("force_upcast"))
    if upcast:
        cast(autoencoder, torch.float32)
    try:
        yield torch.float32 if upcast else own
    finally:
        if upcast:
            cast(autoencoder, own)


def _dtype(autoencoder: nn.Module) -> torch.dtype:
    for tensor in (*autoencoder.parameters(), *autoencoder.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32
