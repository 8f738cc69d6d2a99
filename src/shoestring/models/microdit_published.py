"""The published MicroDiT checkpoints' names and layouts, to ours and back: pure functions of state dicts.

What differs: names; queries, keys and values are one matrix; experts are 3-D tensors (E, in, out) where ours
are Linear modules (out, in); positions are stored though they are computed; a mask token that is never used.
What the positions say, and what a network has to be for these names to hold it, is here too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoestring.errors import CheckpointError
from shoestring.models.layers import grid_positions, sincos_positions

_CONFIG_NAMES = {
    "input_size": "sample_size",
    "in_channels": "in_channels",
    "caption_channels": "caption_channels",
    "patch_size": "patch_size",
    "dim": "hidden_size",
    "depth": "depth",
    "head_dim": "head_dim",
    "multiple_of": "multiple_of",
    "qkv_ratio": "qkv_ratio",
    "mlp_ratio": "mlp_ratio",
    "use_bias": "use_bias",
    "patch_mixer_depth": "mixer_depth",
    "patch_mixer_dim": "mixer_size",
    "patch_mixer_qkv_ratio": "mixer_qkv_ratio",
    "patch_mixer_mlp_ratio": "mixer_mlp_ratio",
    "num_experts": "num_experts",
    "expert_capacity": "expert_capacity",
    "experts_every_n": "expert_blocks",
    "pos_interp_scale": "pos_interp_scale",
}
_NOT_ARCHITECTURE = {"use_patch_mixer", "text_length", "mask_ratio"}

# (published, ours). A name starts with one of the prefixes; then every part in it is replaced.
_PREFIXES = [
    ("x_embedder.proj.", "patch_embed."),
    ("t_embedder.mlp.0.", "time_embed.linear_1."),
    ("t_embedder.mlp.2.", "time_embed.linear_2."),
    ("y_embedder.y_proj.", "caption_projection."),
    ("y_emb_preprocess.", "text_blocks.0."),
    ("pooled_y_emb_process.", "pooled_projection."),
    ("patch_mixer_map_xin.0.", "mixer_in.norm."),
    ("patch_mixer_map_xin.1.", "mixer_in.linear."),
    ("patch_mixer_map_xout.0.", "mixer_out.norm."),
    ("patch_mixer_map_xout.1.", "mixer_out.linear."),
    ("patch_mixer_map_y.0.", "mixer_text.norm."),
    ("patch_mixer_map_y.1.", "mixer_text.linear."),
    ("patch_mixer.", "patch_mixer."),
    ("blocks.", "transformer_blocks."),
    ("final_layer.adaLN_modulation.1.", "modulation_out.linear."),
    ("final_layer.norm_final.", "norm_out."),
    ("final_layer.linear.", "proj_out."),
]
_PARTS = [
    (".adaLN_modulation.1.", ".modulation.linear."),
    (".cross_attn.q_linear.", ".cross_attn.to_q."),
    ("attn.proj.", "attn.to_out.0."),
    (".mlp.gate.", ".ff.router."),
    (".mlp.w1.", ".ff.gate."),
    (".mlp.w2.", ".ff.up."),
    (".mlp.w3.", ".ff.down."),
    ("projection.fc1.", "projection.linear_1."),
    ("projection.fc2.", "projection.linear_2."),
]
_UNUSED = ("pos_embed", "mask_token")
_FIXED = {"positions": "sincos", "text_positions": "none", "qk_norm": "hidden", "text_depth": 1}
_ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of numbers up to 1


def config_from_published(config: Mapping[str, Any]) -> dict[str, Any]:
    """The published configuration keys as `MicroDiT` arguments; raises `CheckpointError` for unknown ones."""
    unknown = set(config) - set(_CONFIG_NAMES) - _NOT_ARCHITECTURE
    if unknown:
        raise CheckpointError(
            f"Published configuration: unknown keys {sorted(unknown)}. Known: {sorted(_CONFIG_NAMES)}."
        )
    ours = {_CONFIG_NAMES[key]: value for key, value in config.items() if key in _CONFIG_NAMES}
    ours["mixer_expert_blocks"] = ours.get("expert_blocks", 2)
    if not config.get("use_patch_mixer", True):
        ours["mixer_depth"] = 0
    return ours


def state_from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict under our names and in our layout."""
    ours: dict[str, Tensor] = {}
    for published, tensor in state.items():
        if published in _UNUSED:
            continue
        name = _ours(published)
        if fused := re.fullmatch(r"(.*attn)\.(qkv|kv_linear)\.(weight|bias)", name):
            parts = ("to_q", "to_k", "to_v") if fused[2] == "qkv" else ("to_k", "to_v")
            for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
                ours[f"{fused[1]}.{part}.{fused[3]}"] = piece.contiguous()
        elif expert := re.fullmatch(r"(.*)\.mlp\.(w1|w2)", name):
            layer = "up" if expert[2] == "w1" else "down"
            for number, weight in enumerate(tensor):
                ours[f"{expert[1]}.ff.experts.{number}.{layer}.weight"] = weight.T.contiguous()
        else:
            ours[name] = tensor.contiguous()
    return ours


def state_to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `state_from_published`, without the two tensors it leaves out (`stored_buffers`)."""
    published: dict[str, Tensor] = {}
    fused: dict[str, dict[int, Tensor]] = {}
    for ours, tensor in state.items():
        name = _published(ours)
        if part := re.fullmatch(r"(.*attn)\.to_(q|k|v)\.(weight|bias)", name):
            whole = "kv_linear" if "cross_attn" in part[1] else "qkv"
            fused.setdefault(f"{part[1]}.{whole}.{part[3]}", {})["qkv".index(part[2])] = tensor
        elif expert := re.fullmatch(r"(.*)\.ff\.experts\.(\d+)\.(up|down)\.weight", name):
            layer = "w1" if expert[3] == "up" else "w2"
            fused.setdefault(f"{expert[1]}.mlp.{layer}", {})[int(expert[2])] = tensor.T
        else:
            published[name] = tensor
    for name, pieces in fused.items():
        ordered = [pieces[number] for number in sorted(pieces)]
        published[name] = torch.cat(ordered) if "attn" in name else torch.stack(ordered)
    return published


def network_tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among `values`, which may hold other things beside them, checked to be usable weights.

    Raises `CheckpointError` for a tensor of another architecture, and for a weight that is no tensor, has no
    data, is not of floating point or not finite.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            if _is_published(name):
                raise CheckpointError(f"{name}: is a {type(value).__name__}, not a tensor.")
            continue
        if name not in _UNUSED:
            _ours(name)
        if value.is_meta or value.layout != torch.strided or not value.is_floating_point():
            kind = "no data" if value.is_meta else str(value.dtype).removeprefix("torch.")
            raise CheckpointError(f"{name}: holds {kind}, not plain floating-point numbers.")
        if not value.isfinite().all():
            raise CheckpointError(f"{name}: holds infinite numbers or NaN: the training behind it failed.")
        tensors[name] = value.detach()
    return tensors


def read_positions(stored: Tensor) -> tuple[int, float]:
    """(side of the grid, position scale) of a stored `pos_embed` (1, N, D).

    The two numbers give the positions back to rounding; raises `CheckpointError` where none do.
    """
    count, size = stored.shape[-2:] if stored.ndim == 3 else (0, 0)
    side = math.isqrt(count)
    if side < 2 or side**2 != count or size % 4:
        shape = " x ".join(map(str, stored.shape))
        raise CheckpointError(f"pos_embed: of shape {shape}, where 1 x N x D with a square N is expected.")
    values = stored.float()
    # Patches of the first row lie 1 / scale apart, which is the angle that the first sine and cosine turn by.
    angles = torch.atan2(values[0, :side, 0], values[0, :side, size // 4])
    step = float((angles.diff() % (2 * math.pi)).mean())
    scale = 1 / step if step > 0 else 1.0
    for digits in (0, 1, 2, 3, 4, 6):
        if (near := round(scale, digits)) > 0:
            positions = sincos_positions(grid_positions(side, side, near, values.device), size)
            if (positions - values).abs().max() < _ROUNDING.get(stored.dtype, 1e-5):
                return side, near
    raise CheckpointError(
        f"pos_embed: not the sin-cos positions of a {side} x {side} grid at any scale (nearest: {scale:.6g})."
    )


def stored_buffers(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The two tensors that published checkpoints hold besides weights, for a network of `config`.

    Bit for bit as the authors' code computes them, in float64; its strict loading asks for them.
    """
    patch, size, scale = config["patch_size"], config["hidden_size"], config["pos_interp_scale"]
    side, quarter = config["sample_size"] // patch, size // 4
    frequencies = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    places = torch.arange(side, dtype=torch.float32) / scale
    angles = places.double()[:, None] * frequencies  # (side, D / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, D / 2)
    columns = line[None, :].expand(side, -1, -1)
    rows = line[:, None].expand(-1, side, -1)
    positions = torch.cat([columns, rows], dim=-1).reshape(1, side * side, size)
    mask = torch.zeros(1, 1, patch**2 * config["in_channels"])
    return {"pos_embed": positions.float(), "mask_token": mask}


def check_publishable(config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for a network that the published layout cannot hold, naming the argument."""
    for name, fixed in _FIXED.items():
        if config[name] != fixed:
            raise CheckpointError(
                f"{name} {config[name]!r}: has no place in the published layout, which is {name} {fixed!r}. "
                "Use the network's pipeline folder as it is."
            )


def _is_published(name: str) -> bool:
    return name in _UNUSED or name.startswith(tuple(published for published, _ in _PREFIXES))


def _ours(name: str) -> str:
    for published, ours in _PREFIXES:
        if name.startswith(published):
            name = ours + name.removeprefix(published)
            break
    else:
        raise CheckpointError(f"{name}: not a tensor of a published MicroDiT checkpoint.")
    for published, ours in _PARTS:
        name = name.replace(published, ours)
    return name


def _published(name: str) -> str:
    for published, ours in _PARTS:
        name = name.replace(ours, published)
    for published, ours in _PREFIXES:
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    raise CheckpointError(f"{name}: has no place in the published architecture.")
