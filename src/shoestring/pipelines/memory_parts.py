"""What a pipeline is made of, as shapes: weights by their headers, live tensors by a run on the meta device.

Nothing here reads or makes a weight, so SDXL's figures come in seconds on any machine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.autoencoders import latent_channels, spatial_factor
from shoestring.models.network_files import CONFIG, INDEX, index_parts, open_safetensors, read_config
from shoestring.models.unet_presets import SDXL
from shoestring.models.unet_students import preset_config
from shoestring.objectives.noise import TIME_IDS
from shoestring.pipelines.live_memory import forward_peak

STAGED = ("StableDiffusionXLPipeline", "StableDiffusionPipeline", "UNetPipeline")
"""Pipelines whose stages run one after the other."""

INT8_DTYPE = torch.bfloat16
"""What 8-bit weights are multiplied in: the type that torchao's kernels and diffusers' quantiser ask for."""
TOKENS = 77
TILE = 512

SDXL_VAE: dict[str, Any] = {  # stabilityai/stable-diffusion-xl-base-1.0, vae/config.json
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": False,  # madebyollin/sdxl-vae-fp16-fix, which KOALA is drawn with
}


@dataclass(frozen=True)
class TextPart:
    """A text encoder: how many numbers its weights are, and its layers and width (0 where it has none)."""

    values: int
    layers: int
    width: int

    def live(self, rows: int, dtype: torch.dtype) -> int:
        """Bytes alive in a forward of `rows` prompts: every layer's states, and one layer's insides."""
        return rows * TOKENS * (self.layers + 14) * self.width * dtype.itemsize


@dataclass(frozen=True)
class Parts:
    """What a pipeline is made of, as shapes: networks are on the meta device and hold no numbers."""

    kind: str
    text: tuple[TextPart, ...]
    unet: UNet2DConditionModel
    vae: nn.Module
    other_values: int = 0  # a safety checker's weights

    def size(self) -> int:
        """Pixels of a side where none is given: what the U-Net was trained at."""
        side = self.unet.config.sample_size
        return round((side if isinstance(side, int) else max(side)) * spatial_factor(self.vae))


def typed(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same network in another number type: torch's own `to`, since diffusers' warns of it each time."""
    return nn.Module.to(network, dtype)


def count_values(module: nn.Module) -> int:
    """Numbers in a module's weights and statistics."""
    return sum(tensor.numel() for tensor in module.state_dict().values())


def unet_bytes(unet: nn.Module, dtype: torch.dtype, *, int8: bool = False) -> int:
    """Bytes of a U-Net's weights; with `int8` a linear layer's are one each, and five a row (scale, zero)."""
    whole = count_values(unet) * dtype.itemsize
    if not int8:
        return whole
    linear = [each.weight for each in unet.modules() if isinstance(each, nn.Linear)]
    return whole - sum(weight.numel() * (dtype.itemsize - 1) - 5 * len(weight) for weight in linear)


def largest_linear(unet: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the largest linear layer: 8-bit weights are widened to `dtype` one layer at a time."""
    sizes = (each.weight.numel() for each in unet.modules() if isinstance(each, nn.Linear))
    return max(sizes, default=0) * dtype.itemsize


def unet_inputs(
    unet: UNet2DConditionModel,
    rows: int,
    sides: tuple[int, int],
    dtype: torch.dtype,
    device: str = "meta",
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """Arguments of one evaluation of a text-to-image U-Net, not filled; `sides` are latent cells (h, w)."""
    config = unet.config

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    inputs: dict[str, Any] = {
        "sample": empty(rows, config.in_channels, *sides),
        "timestep": torch.empty((), device=device),
        "encoder_hidden_states": empty(rows, tokens, config.encoder_hid_dim or config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": empty(rows, pooled), "time_ids": empty(rows, TIME_IDS)}
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = empty(rows, config.time_cond_proj_dim)
    return inputs


def decode_dtype(vae: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """What it decodes in: SDXL's own autoencoder overflows in float16 and says so by `force_upcast`."""
    config: Any = vae.config
    return torch.float32 if dtype == torch.float16 and config.get("force_upcast") else dtype


def set_tile(vae: Any, tile: int | None) -> None:
    """Decode in tiles of `tile` px. SDXL's own tiles are 1024 px, so that tiling alone changes nothing."""
    if tile is None:
        return
    vae.enable_tiling()
    vae.tile_sample_min_size = tile
    vae.tile_latent_min_size = round(tile / spatial_factor(vae))


@lru_cache
def denoise_live(unet: UNet2DConditionModel, rows: int, sides: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes alive at the worst moment of one evaluation of `rows` latents, `unet` being on meta."""
    return forward_peak(typed(unet, dtype), **unet_inputs(unet, rows, sides, dtype))


@lru_cache
def decode_live(
    vae: nn.Module, batch: int, size: tuple[int, int], dtype: torch.dtype, tile: int | None = None
) -> int:
    """Bytes alive at the worst moment of decoding `batch` pictures of `size` px, `vae` being on meta.

    In tiles it is that of one, and three pictures: what the tiles give, which overlap, and the whole.
    """
    factor = spatial_factor(vae)
    sides = [round(min(side, tile or side) / factor) for side in size]
    latents = torch.empty(batch, latent_channels(vae), *sides, dtype=dtype, device="meta")
    joined = 0 if tile is None else 3 * batch * 3 * size[0] * size[1] * dtype.itemsize
    return forward_peak(typed(vae, dtype), latents, method="decode") + joined


def read_parts(folder: Path, tiny: nn.Module | None = None) -> Parts:
    """What is in a pipeline's folder, from configurations and headers; `tiny` decodes in its decoder's place.

    Raises `CheckpointError` for a folder that is not whole, `RecipeError` for a pipeline of another kind.
    """
    index = read_config(folder / INDEX)
    kind = str(index.get("_class_name"))
    check_kind(kind, folder)
    named = index_parts(index)
    encoders = sorted(name for name in named if name.startswith("text_encoder"))
    return Parts(
        kind,
        tuple(_text_part(folder / name) for name in encoders),
        _on_meta(folder, named, "unet"),
        _on_meta(folder, named, "vae") if tiny is None else tiny.to("meta"),
        stored_values(folder / "safety_checker") if "safety_checker" in named else 0,
    )


def check_kind(kind: str, path_or_id: str | Path) -> None:
    """Raise `RecipeError` for a pipeline that has no such stages."""
    if kind not in STAGED:
        raise RecipeError(
            f"--memory: {path_or_id} is a {kind}; plans are made for {', '.join(STAGED)}. Leave it out, and "
            "make fewer pictures at once."
        )


def stored_values(folder: Path) -> int:
    """Numbers in a component's safetensors files, by their headers alone; of several variants one counts."""
    files = sorted(folder.glob("*.safetensors"))
    if plain := [path for path in files if "." not in path.stem]:
        files = plain
    total = 0
    for path in files:
        with open_safetensors(path) as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        total += sum(torch.Size(shape).numel() for shape in shapes)
    return total


def _text_part(folder: Path) -> TextPart:
    config = read_config(folder / CONFIG)
    layers = config.get("num_hidden_layers", config.get("num_layers", 0))
    return TextPart(stored_values(folder), layers, config.get("hidden_size", config.get("d_model", 0)))


def _on_meta(folder: Path, parts: Mapping[str, tuple[str, str]], name: str) -> Any:
    """A network of diffusers' or ours, without its numbers."""
    library, kind = parts.get(name, ("", "missing"))
    if library != "diffusers" and not library.startswith("shoestring."):
        what = f"{library}.{kind}".removeprefix(".")
        raise CheckpointError(f"{folder}: its {name} is {what}, which no plan is made for.")
    config = read_config(folder / name / CONFIG)
    with torch.device("meta"):
        return getattr(importlib.import_module(library), kind).from_config(config).eval()


def sdxl_parts(unet: Mapping[str, Any], *, tiny: bool = False) -> Parts:
    """SDXL's pipeline around a U-Net of this configuration; `tiny` decodes with the AutoencoderTiny.

    The decoder is one object for all, so that each way to decode is counted once.
    """
    with torch.device("meta"):
        network = UNet2DConditionModel(**unet)
    text = (TextPart(123_060_480, 12, 768), TextPart(694_659_840, 32, 1280))
    return Parts("StableDiffusionXLPipeline", text, network.eval(), _sdxl_decoder(tiny=tiny))


@cache
def _sdxl_decoder(*, tiny: bool) -> nn.Module:
    with torch.device("meta"):
        decoder: nn.Module = AutoencoderTiny() if tiny else AutoencoderKL(**SDXL_VAE)
    return decoder.eval()


NETWORKS: dict[str, Callable[[], Mapping[str, Any]]] = {
    "sdxl": lambda: SDXL,
    "koala-1b": lambda: preset_config("koala-1b"),
    "koala-700m": lambda: preset_config("koala-700m"),
}


def memory_table(
    names: Iterable[str] = tuple(NETWORKS), size: int = 1024, dtype: torch.dtype = torch.float16
) -> list[dict[str, Any]]:
    """Bytes of SDXL's shapes by network: weights, live tensors, and sums for ways to draw one guided picture.

    `plain` has all parts loaded and decodes whole; `staged_*` is the hungriest stage with the decoder full,
    in tiles of 512 px, or tiny; `int8` is that with a tiny decoder and 8-bit weights. Sums only: what a
    device adds (`FIXED`, `FACTOR`) is left out.
    """
    return [_row(name, size, dtype) for name in names]


def _row(name: str, size: int, dtype: torch.dtype) -> dict[str, Any]:
    parts, small = sdxl_parts(NETWORKS[name]()), _sdxl_decoder(tiny=True)
    sides = (size // 8, size // 8)
    row = {
        "unet": unet_bytes(parts.unet, dtype),
        "unet_int8": unet_bytes(parts.unet, INT8_DTYPE, int8=True),
        "text": sum(each.values for each in parts.text) * dtype.itemsize,
        "vae": count_values(parts.vae) * dtype.itemsize,
        "tiny": count_values(small) * dtype.itemsize,
        "unet_live": denoise_live(parts.unet, 2, sides, dtype),
        "decode_full_live": decode_live(parts.vae, 1, (size, size), dtype),
        "decode_tiled_live": decode_live(parts.vae, 1, (size, size), dtype, TILE),
        "decode_tiny_live": decode_live(small, 1, (size, size), dtype),
    }
    drawing = row["unet"] + row["unet_live"]
    decoding = {
        "full": row["vae"] + row["decode_full_live"],
        "tiled": row["vae"] + row["decode_tiled_live"],
        "tiny": row["tiny"] + row["decode_tiny_live"],
    }
    everything = row["unet"] + row["text"] + row["vae"]
    sums = {
        "plain": everything + max(row["unet_live"], row["decode_full_live"]),
        **{f"staged_{how}": max(row["text"], drawing, taken) for how, taken in decoding.items()},
        "int8": max(row["text"], row["unet_int8"] + row["unet_live"], decoding["tiny"]),
    }
    return {"network": name, "size": size, "dtype": str(dtype).removeprefix("torch."), **row, **sums}
