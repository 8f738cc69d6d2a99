"""WuerstchenAutoencoder: Würstchen's compressor, Stage B and Stage A as one autoencoder.

    picture [-1, 1] --compressor--> z (B, 16, h, w)
    picture [-1, 1] <--Stage A-- x (B, 4, H / 4, W / 4) <--Stage B, a dozen denoising steps-- z, noise

What Stage C generates is z. Decoding draws noise, so it is a sample and not a function: a picture's noise is
the same every time unless a generator is given. Source: Pernias et al., "Würstchen" (2306.00637), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DDPMWuerstchenScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file
from torch import Tensor

from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.quiet import muted, no_bars
from shoestring.models.semantic_compressor import SemanticCompressor
from shoestring.models.sizes import check_size
from shoestring.models.wuerstchen_decoder import WuerstchenDiffNeXt
from shoestring.models.wuerstchen_vqgan import PaellaVQModel

NULL_TEXT = "null_text.safetensors"
"""The file beside Stage B that holds its encoded empty caption, where it was trained with text."""

PARTS: dict[str, Any] = {
    "vqgan": PaellaVQModel,
    "decoder": WuerstchenDiffNeXt,
    "compressor": SemanticCompressor,
}
"""Subfolder of a saved pipeline -> class."""

Generators = torch.Generator | Sequence[torch.Generator] | None


class WuerstchenAutoencoder(ModelMixin, ConfigMixin):
    """Pictures (B, 3, H, W) in [-1, 1] to z (B, c_latent, H / f, W / f) and back; f is 42 2/3 as published.

    Args:
        vqgan, decoder, compressor: constructor arguments of `PaellaVQModel`, `WuerstchenDiffNeXt` and
            `SemanticCompressor`.
        decode_steps: denoising steps of Stage B; published: 12.
        null_tokens: text tokens that Stage B sees, for one that was trained with text; 0: none. They are
            zeros, or the encoded empty caption where `from_parts` was given it.

    H and W must be multiples of `size_multiple` (published: 128). Raises `RecipeError` for stages that do not
    fit together.
    """

    @register_to_config
    def __init__(
        self,
        vqgan: dict[str, Any],
        decoder: dict[str, Any],
        compressor: dict[str, Any],
        decode_steps: int = 12,
        null_tokens: int = 0,
    ) -> None:
        super().__init__()
        if decode_steps < 1:
            raise RecipeError(f"decode_steps {decode_steps}: must be at least 1.")
        self.vqgan = PaellaVQModel(**_arguments(vqgan))
        self.decoder = WuerstchenDiffNeXt(**_arguments(decoder))
        self.compressor = SemanticCompressor(**_arguments(compressor))
        if null_tokens:
            self.register_buffer("null_text", torch.zeros(null_tokens, self.decoder.config["clip_embd"]))
        _check_fit(self.vqgan.config, self.decoder.config, self.compressor.config)

    def __getattr__(self, name: str) -> Any:
        """The networks before arguments of the same names, which diffusers would return as attributes."""
        modules = self.__dict__.get("_modules", {})
        return modules[name] if name in modules else super().__getattr__(name)

    # --- sizes --------------------------------------------------------------------------------------------

    @property
    def factor(self) -> Fraction:
        """Pixels along one side of a cell of z: 128/3 as published."""
        return self.compressor.stride / self.compressor.ratio

    @property
    def size_multiple(self) -> int:
        """Sides of pictures must be multiples of this: 128 as published."""
        config = self.decoder.config
        return resolution_multiple(
            self.compressor.stride,
            self.compressor.ratio,
            vq_factor(self.vqgan.config),
            config["patch_size"],
            len(config["c_hidden"]),
        )

    def check_size(self, height: int, width: int) -> None:
        """Raise `RecipeError`, naming the nearest sizes that fit, for a picture that does not."""
        check_size(height, width, self.size_multiple)

    def latent_side(self, size: int) -> int:
        """Cells along a side of `size` pixels; raises `RecipeError` for one that does not fit."""
        self.check_size(size, size)
        return int(size / self.factor)

    # --- pictures to latents and back ---------------------------------------------------------------------

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Pictures (B, 3, H, W) in [-1, 1] -> `EncoderOutput(latent=z)`, z (B, c_latent, h, w), unscaled."""
        self.check_size(*x.shape[-2:])
        z = self.compressor.compress((x + 1) / 2)
        return EncoderOutput(latent=z) if return_dict else (z,)

    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: Generators = None,
        steps: int | None = None,
    ) -> Any:
        """z (B, c_latent, h, w), unscaled -> `DecoderOutput(sample)`, pictures (B, 3, H, W) in [-1, 1].

        Noise comes from `generator`, one for all or one a picture. Without, each picture gets a generator
        seeded 0: what it looks like depends on its own z alone, and not on its neighbours in the batch.
        """
        height, width = self._stage_b_size(z)
        if generator is None:
            generator = [torch.Generator().manual_seed(0) for _ in range(len(z))]
        elif isinstance(generator, Sequence):
            generator = list(generator)
            if len(generator) != len(z):
                raise ValueError(
                    f"{len(generator)} generators for {len(z)} pictures: give one, or one a picture."
                )
        shape = (len(z), self.decoder.config["c_in"], height, width)
        x = randn_tensor(shape, generator=generator, device=z.device, dtype=torch.float32)
        projected = self.decoder.project(z.float(), self._null_text(z), size=(height, width))
        scheduler = DDPMWuerstchenScheduler()
        scheduler.set_timesteps(steps or self.config["decode_steps"], device=z.device)
        for time in scheduler.timesteps[:-1]:
            times = time.expand(len(z))
            noise = self.decoder(x, times, projected=projected)
            x = scheduler.step(noise, times, x, generator=generator, return_dict=False)[0]
        raw = x * self.vqgan.config["scale_factor"]
        pictures = self.vqgan.decode(raw.to(self.vqgan.dtype)).sample.clamp(0, 1) * 2 - 1
        return DecoderOutput(sample=pictures) if return_dict else (pictures,)

    def forward(self, sample: Tensor, generator: Generators = None) -> Any:
        """Pictures through both: `DecoderOutput`."""
        return self.decode(self.encode(sample).latent, generator=generator)

    def _stage_b_size(self, z: Tensor) -> tuple[int, int]:
        """Height and width of Stage B's latents for this z."""
        unit = self.latent_side(self.size_multiple)
        if any(side % unit or not side for side in z.shape[-2:]):
            raise RecipeError(
                f"latents of {z.shape[-2]} x {z.shape[-1]}: sides must be multiples of {unit} "
                f"(pictures' of {self.size_multiple})."
            )
        vq = vq_factor(self.vqgan.config)
        height, width = (int(side * self.factor) // vq for side in z.shape[-2:])
        return height, width

    def _null_text(self, z: Tensor) -> Tensor | None:
        if not self.config["null_tokens"]:
            return None
        return self.null_text.to(z.device, self.decoder.dtype).expand(len(z), -1, -1)

    # --- making one ---------------------------------------------------------------------------------------

    @classmethod
    def from_parts(
        cls,
        vqgan: PaellaVQModel,
        decoder: WuerstchenDiffNeXt,
        compressor: SemanticCompressor,
        decode_steps: int = 12,
        null_tokens: int = 0,
        null_text: Tensor | None = None,
    ) -> WuerstchenAutoencoder:
        """The autoencoder of these very networks, which it shares and does not copy.

        `null_text` (L, C) is what a Stage B that was trained with text is given: the encoded empty caption.
        """
        null_tokens = null_tokens if null_text is None else len(null_text)
        parts: dict[str, Any] = {"vqgan": vqgan, "decoder": decoder, "compressor": compressor}
        configs = {name: _arguments(part.config) for name, part in parts.items()}
        with torch.device("meta"):  # networks that give way at once
            model = cls(**configs, decode_steps=decode_steps, null_tokens=null_tokens)
        for name, part in parts.items():
            setattr(model, name, part)
        if null_tokens:
            zeros = torch.zeros(null_tokens, decoder.config["clip_embd"])
            model.null_text = zeros if null_text is None else null_text.detach().cpu().float()
        model.training = decoder.training  # the networks keep their own modes
        return model

    @classmethod
    def from_folder(
        cls, path_or_id: str | Path, *, revision: str | None = None, **options: Any
    ) -> WuerstchenAutoencoder:
        """From a saved pipeline with `vqgan/`, `decoder/` and `compressor/`, in float32 and evaluation mode.

        `options` are `decode_steps`, `null_tokens` and `null_text`; steps and the encoded empty caption are
        the pipeline's own unless given. Raises
        `CheckpointError` for a part that is missing or of another class.
        """
        parts = {}
        for name, kind in PARTS.items():
            _check_class(path_or_id, name, kind, revision)
            with no_bars(), muted("diffusers.configuration_utils", about=kind.__name__):
                parts[name] = kind.from_pretrained(
                    path_or_id,
                    subfolder=name,
                    revision=revision,
                    use_safetensors=True,
                    low_cpu_mem_usage=False,
                    torch_dtype=torch.float32,
                )
        file = Path(path_or_id) / NULL_TEXT
        if file.is_file() and not options.keys() & {"null_tokens", "null_text"}:
            options["null_text"] = load_file(file)["null_text"]
        return cls.from_parts(**parts, **_steps(path_or_id, revision) | options).eval()

    def set_statistics(self, mean: Sequence[float] | float, std: Sequence[float] | float) -> None:
        """Store the mean and spread of z, one number or one a channel, by which latents are scaled."""
        self.compressor.set_statistics(mean, std)
        self.register_to_config(compressor=_arguments(self.compressor.config))


# --- sizes that fit --------------------------------------------------------------------------------------


def resolution_multiple(
    stride: int, input_ratio: float | Fraction, vq_factor: int = 4, patch_size: int = 2, levels: int = 4
) -> int:
    """The least n so that pictures whose sides are multiples of n pass all stages; published: 128.

    The compressor wants side * input_ratio to be a multiple of its `stride`; Stage B wants side / vq_factor
    to be a multiple of patch_size * 2^(levels - 1).
    """
    ratio = Fraction(input_ratio).limit_denominator(64)
    return math.lcm((stride / ratio).numerator, vq_factor * patch_size * 2 ** (levels - 1))


def vq_factor(config: Mapping[str, Any]) -> int:
    """Pixels along one side of a cell of Stage A's latents: 4 as published."""
    return int(config["up_down_scale_factor"] * 2 ** (config["levels"] - 1))


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration without what diffusers adds (`_class_name` and so on)."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _check_fit(vqgan: Mapping[str, Any], decoder: Mapping[str, Any], compressor: Mapping[str, Any]) -> None:
    if decoder["c_in"] != vqgan["latent_channels"]:
        raise RecipeError(
            f"decoder: makes latents of {decoder['c_in']} channels; the vqgan's have "
            f"{vqgan['latent_channels']}. They are not of one training."
        )
    if decoder["effnet_embd"] != compressor["c_latent"]:
        raise RecipeError(
            f"decoder: takes codes of {decoder['effnet_embd']} channels; the compressor's have "
            f"{compressor['c_latent']}. They are not of one training."
        )


def _steps(path_or_id: str | Path, revision: str | None) -> dict[str, int]:
    """`decode_steps` as one of our pipelines has it in its index; empty where none says."""
    try:
        with no_bars():
            index = DiffusionPipeline.load_config(path_or_id, revision=revision)
    except (OSError, ValueError):
        return {}
    # A combined pipeline's `default_steps` are Stage C's.
    steps = index.get("decoder_steps") or index.get("default_steps")
    return {"decode_steps": int(steps)} if steps else {}


def _check_class(path_or_id: str | Path, name: str, kind: Any, revision: str | None) -> None:
    """Raise `CheckpointError` unless the subfolder holds a configuration of that class."""
    try:
        with no_bars():
            config = kind.load_config(path_or_id, subfolder=name, revision=revision)
    except (OSError, ValueError) as error:
        help_compressor = (
            " Published repositories hold none: it lies in model_v2_stage_b.pt of dome272/wuerstchen; "
            "make the folder of it with `shoestring convert`."
        )
        raise CheckpointError(
            f"{path_or_id}: no {name}/config.json, which a Würstchen autoencoder needs beside "
            f"{', '.join(each + '/' for each in PARTS if each != name)}."
            + (help_compressor if name == "compressor" else "")
        ) from error
    if config.get("_class_name") != kind.__name__:
        raise CheckpointError(
            f"{path_or_id}: {name}/ holds a {config.get('_class_name')}; a {kind.__name__} is wanted."
        )
