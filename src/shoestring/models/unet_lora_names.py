"""How LoRA files name the modules of a U-Net and of CLIP's text encoders.

    diffusers, peft   unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight
    diffusers, older  unet. ... .attn1.to_q.lora.down.weight,  ... .attn1.processor.to_q_lora.down.weight
    kohya             lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight
    kohya for SDXL    lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight

kohya's names have underscores for dots, and cannot be read back by themselves: they are looked up in a table
made from the modules that the U-Net has. SDXL's are those of its original layout, of Stability's own code
("SGM"), where layers are numbered through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from shoestring.models.unet_original import original_names
from shoestring.models.unet_students import arguments

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
PARTS = ("unet", *TEXT_ENCODERS)

DOWN, UP, ALPHA = "down", "up", "alpha"

_PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_down.weight", ".lora_up.weight"),
)
_ENDS = {".alpha": ALPHA} | {end: role for pair in _PAIRS for end, role in zip(pair, (DOWN, UP), strict=True)}
_KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_CLIP = re.compile(
    r"((text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])|text_projection)"
)
_KOHYA_CLIP = re.compile(
    r"text_model_encoder_layers_(\d+)_(self_attn|mlp)_(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
)
_OLD_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Place:
    """Where a tensor of a LoRA belongs: a module of one of `PARTS`, and "down", "up" or "alpha"."""

    part: str
    module: str
    role: str


def weight_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every Linear and Conv2d of the U-Net of `config` with its weight's shape; no memory is taken."""
    with torch.device("meta"):
        network = UNet2DConditionModel(**arguments(config))
    return {
        name: tuple(module.weight.shape)
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def place_of(key: str, modules: Mapping[str, str]) -> Place | None:
    """Where the tensor called `key` belongs, None for what is no part of a LoRA on these networks.

    modules   `written_names` of the U-Net.
    """
    end = next((each for each in _ENDS if key.endswith(each)), None)
    if end is None:
        return None
    stem, role = key.removesuffix(end), _ENDS[end]
    kohya = next((each for each in _KOHYA if stem.startswith(each)), None)
    if kohya is not None:
        part, name = _KOHYA[kohya], stem.removeprefix(kohya)
        module = modules.get(name) if part == "unet" else _kohya_clip(name)
    else:
        part = next((each for each in PARTS if stem.startswith(f"{each}.")), "unet")
        name = stem.removeprefix(f"{part}.").replace(".processor.", ".")
        module = modules.get(name) if part == "unet" else _dotted_clip(name)
    return None if module is None else Place(part, module, role)


def written_names(modules: Iterable[str]) -> dict[str, str]:
    """Every way to write the U-Net's `modules` -> the module: with dots, kohya's, kohya's for SDXL."""
    modules = list(modules)
    numbered = original_names(modules)
    table = {module: module for module in modules}
    table |= {module.removesuffix(".0"): module for module in modules if module.endswith(".to_out.0")}
    table |= {numbered[module].replace(".", "_"): module for module in modules}
    return table | {module.replace(".", "_"): module for module in modules}


def kohya_name(part: str, module: str, *, several: bool) -> str:
    """A module's name in kohya's files; of a teacher with `several` text encoders the first is te1, else te.

    The U-Net's parts have diffusers' names, which user interfaces take for any U-Net, whereas the numbers of
    SGM's depend on the layers there are. Only the added embedding has its SGM name: diffusers misreads
    the other.
    """
    if part == "unet":
        dotted = original_names([module])[module] if module.startswith("add_embedding.linear") else module
        return f"lora_unet_{dotted.replace('.', '_')}"
    inside = module if module.startswith(("text_model.", "text_projection")) else f"text_model.{module}"
    prefix = "lora_te2" if part == "text_encoder_2" else "lora_te1" if several else "lora_te"
    return f"{prefix}_{inside.replace('.', '_')}"


def _kohya_clip(name: str) -> str | None:
    if name == "text_projection":
        return name
    found = _KOHYA_CLIP.fullmatch(name)
    return f"text_model.encoder.layers.{found[1]}.{found[2]}.{found[3]}" if found else None


def _dotted_clip(name: str) -> str | None:
    stem, _, last = name.rpartition(".")
    name = f"{stem}.{_OLD_CLIP[last]}" if stem.endswith(".self_attn") and last in _OLD_CLIP else name
    return name if _CLIP.fullmatch(name) else None
