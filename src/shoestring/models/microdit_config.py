"""The configuration of a published state dict, found from its tensors.

Most of it can be read off shapes. Ratios and rounding cannot, only the widths they lead to; so candidates are
built without memory, and the one whose tensors have the names and shapes of the file is the answer. Nothing
tells the width of a head, nor how many patches an expert takes: the two are arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoestring.errors import CheckpointError
from shoestring.models.microdit import MicroDiT, expert_positions
from shoestring.models.microdit_published import read_positions, state_to_published

ANCHOR = "x_embedder.proj.weight"
"""A tensor that every published state dict has."""

PRESETS: dict[str, dict[str, Any]] = {
    "XL/2": {"hidden_size": 1024, "depth": 28, "head_dim": 64, "mixer_depth": 6, "mixer_size": 768},
    "Tiny/2": {"hidden_size": 512, "depth": 16, "head_dim": 32, "mixer_depth": 4, "mixer_size": 512},
}
EXPERT_CAPACITY = 2.0
SAMPLE_SIZE, POSITION_SCALE = 64, 2.0  # of the published checkpoints, which are for 512 px

_STORED = ("pos_embed", "mask_token")
_Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Recognised:
    """The network of a state dict: `MicroDiT`'s arguments, its published name if any, what was assumed."""

    config: dict[str, Any]
    name: str | None
    assumed: tuple[str, ...]


def recognise(
    state: Mapping[str, Tensor],
    *,
    head_dim: int | None = None,
    expert_capacity: float | None = None,
    sample_size: int | None = None,
    position_scale: float | None = None,
) -> Recognised:
    """Find the configuration of a published state dict; arguments give what its tensors do not tell.

    Raises `CheckpointError` where the tensors are of no such network, where something has to be given, and
    where what is given contradicts what is stored.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in _STORED}
    known = _read(shapes)
    name, config = _architecture(shapes, known, head_dim)
    config["expert_capacity"] = EXPERT_CAPACITY if expert_capacity is None else expert_capacity
    assumed = [] if head_dim else [f"head_dim {config['head_dim']}"]
    if expert_capacity is None and known["num_experts"]:
        assumed.append(f"expert_capacity {EXPERT_CAPACITY:g}")
    if "pos_embed" in state:
        side, scale = read_positions(state["pos_embed"])
        stored = {"sample_size": side * known["patch_size"], "pos_interp_scale": scale}
        for key, given in (("sample_size", sample_size), ("pos_interp_scale", position_scale)):
            if given is not None and given != stored[key]:
                raise CheckpointError(
                    f"{key} {given:g}: the stored positions say {stored[key]:g}. Leave it out."
                )
        config.update(stored)
    else:
        config["sample_size"] = sample_size or SAMPLE_SIZE
        config["pos_interp_scale"] = position_scale or POSITION_SCALE
        assumed += [] if sample_size else [f"sample_size {SAMPLE_SIZE}"]
        assumed += [] if position_scale else [f"position scale {POSITION_SCALE:g}"]
    return Recognised(config, name, tuple(assumed))


def _architecture(
    shapes: _Shapes, known: dict[str, Any], head_dim: int | None
) -> tuple[str | None, dict[str, Any]]:
    """The published name, if any, and the configuration that has these shapes."""
    inputs = {key: known[key] for key in ("in_channels", "caption_channels")}
    for name, preset in PRESETS.items():
        same_size = all(known[key] == value for key, value in preset.items() if key in known)
        if same_size and head_dim in (None, preset["head_dim"]):
            config, expected = _build({**preset, **inputs})
            difference = _difference(expected, shapes)
            if difference is None:
                return name, config
            if head_dim is None:
                raise CheckpointError(
                    f"Not the published {name}, whose size it has: {difference}. If it is a variant, give "
                    f"--head-dim, {preset['head_dim']} in {name}."
                )
    if head_dim is None:
        widths = {known["hidden_size"], known["mixer_size"], *known["attention_widths"]}
        fitting = [size for size in range(8, 257, 8) if not math.gcd(*widths) % size]
        raise CheckpointError(
            f"Width {known['hidden_size']} and depth {known['depth']} are neither XL/2's nor Tiny/2's, and "
            "the width of a head is not in the weights. Give --head-dim: "
            f"{', '.join(map(str, fitting)) or 'a divisor of every width'}."
        )
    for candidate in _candidates(known, head_dim):
        config, expected = _build(candidate)
        difference = _difference(expected, shapes)
        if difference is None:
            return None, config
    raise CheckpointError(f"Of no MicroDiT with head_dim {head_dim}: {difference}.")


def _candidates(known: dict[str, Any], head_dim: int) -> Iterator[dict[str, Any]]:
    """Configurations of these widths: published ratios first, then a ratio for each block."""
    keys = ("in_channels", "caption_channels", "patch_size", "hidden_size", "depth", "use_bias")
    mixer = ("mixer_depth", "mixer_size", "num_experts", "expert_blocks", "mixer_expert_blocks")
    config = {"head_dim": head_dim, **{key: known[key] for key in (*keys, *mixer)}}
    common = math.gcd(*known["hidden_widths"])
    multiples = [number for number in range(common, 0, -1) if common % number == 0]
    for multiple in multiples:
        yield {**config, "multiple_of": multiple}
    for multiple in multiples:
        yield {**config, "multiple_of": multiple, **known["ratios"]}


def _read(shapes: _Shapes) -> dict[str, Any]:
    """What the shapes tell, under our names; raises `CheckpointError` for one that is missing."""

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != ndim:
            there = " x ".join(map(str, shapes[name])) if name in shapes else "missing"
            raise CheckpointError(f"{name}: {there}, where a published checkpoint has {ndim} dimensions.")
        return shapes[name]

    hidden, channels, patch, _ = shape(ANCHOR, 4)
    found: dict[str, Any] = {
        "in_channels": channels,
        "caption_channels": shape("y_embedder.y_proj.fc1.weight", 2)[1],
        "patch_size": patch,
        "hidden_size": hidden,
        "mixer_size": hidden,
        "use_bias": "y_emb_preprocess.attn.qkv.bias" in shapes,
        "num_experts": 0,
        "attention_widths": [],
        "hidden_widths": [shape("y_emb_preprocess.mlp.w1.weight", 2)[0]],
        "ratios": {},
    }
    for part, ours in (("patch_mixer", "mixer_"), ("blocks", "")):
        depth = found[f"{ours}depth"] = _count(shapes, part)
        size = shape(f"{part}.0.norm1.weight", 1)[0] if depth else hidden
        experts, qkv_ratios, mlp_ratios = [], [], []
        for block in (f"{part}.{i}" for i in range(depth)):
            inner = shape(f"{block}.attn.proj.weight", 2)[1]
            qkv_ratios.append(inner / size)
            if f"{block}.mlp.gate.weight" in shapes:
                experts.append(int(block.rpartition(".")[2]))
                found["num_experts"], _, width = shape(f"{block}.mlp.w1", 3)
                mlp_ratios.append(width / size)
            else:
                width = shape(f"{block}.mlp.w1.weight", 2)[0]
                mlp_ratios.append(1.5 * width / size)
            found["attention_widths"].append(inner)
            found["hidden_widths"].append(width)
        if depth:
            found[f"{ours}size" if ours else "hidden_size"] = size
            found["ratios"] |= {f"{ours}qkv_ratio": qkv_ratios, f"{ours}mlp_ratio": mlp_ratios}
        found[f"{ours}expert_blocks"] = _pattern(experts, depth, last=bool(ours))
    return found


def _count(shapes: _Shapes, part: str) -> int:
    """How many blocks there are; raises `CheckpointError` where one in between is missing."""
    numbers = {int(found[1]) for name in shapes if (found := re.match(rf"{part}\.(\d+)\.", name))}
    if numbers != set(range(len(numbers))):
        gone = min(set(range(max(numbers))) - numbers)
        raise CheckpointError(f"{part}.{gone}: missing, though there is a {part}.{max(numbers)}.")
    return len(numbers)


def _pattern(experts: list[int], depth: int, *, last: bool) -> int | list[int]:
    """The n of "every n-th block" that puts experts where they are (0: nowhere), else their places."""
    for n in (2, *range(depth + 1)):
        if expert_positions(n, depth, last=last) == set(experts):
            return n
    return experts


def _build(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], _Shapes]:
    """The full configuration of a network with these arguments, and the shapes it would be published with."""
    with torch.device("meta"):
        network = MicroDiT(**arguments)
        state = state_to_published(network.state_dict())
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return config, {name: tuple(tensor.shape) for name, tensor in state.items()}


def _difference(expected: _Shapes, given: _Shapes) -> str | None:
    """What first sets two networks apart, in words; None where nothing does."""
    for name in sorted(expected.keys() | given.keys()):
        if name not in given:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is one tensor too many"
        if expected[name] != given[name]:
            wanted, there = (" x ".join(map(str, each[name])) for each in (expected, given))
            return f"{name} is {there} and should be {wanted}"
    return None
