"""U-Nets in the layout they were first published in, one file for a whole Stable Diffusion: names and kinds.

diffusers, L layers a block    original, below `model.diffusion_model.`
down_blocks.i, layer k         input_blocks.n, n = 1 + i (L + 1) + k: .0 its ResNet, .1 its attention
down_blocks.i.downsamplers.0   input_blocks.n.0.op, n = 1 + i (L + 1) + L
mid_block                      middle_block: .0 ResNet, .1 attention, .2 ResNet
up_blocks.i, layer k           output_blocks.n, n = i (L + 1) + k, likewise
up_blocks.i.upsamplers.0       the last place of output_blocks.n, n = i (L + 1) + L
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from shoestring.errors import CheckpointError
from shoestring.models.unet_presets import SD14, SD21, SDXL

_FIXED = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ORIGINAL, _DIFFUSERS = "output_blocks.0.0.in_layers.0.weight", "up_blocks.0.resnets.0.time_emb_proj.weight"
"""A tensor that a U-Net has in each layout, and neither a ControlNet nor an autoencoder has."""

_FAMILIES = {2048: ("SDXL", SDXL), 768: ("SD 1.x", SD14), 1024: ("SD 2.x", SD21)}
"""By the width of the text that cross-attention reads."""

_V_SPREAD = 0.09
"""Spread of a bias of the last attention above which an SD 2.x predicts v: ComfyUI's rule."""


def original_names(names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of a U-Net's modules or tensors, all of them -> their names in the original layout.

    The numbers depend on the layers there are, students' too; what has no place there keeps its name.
    """
    names = list(names)
    places = dict(_FIXED)
    for side, there, count in (("down_blocks", "input_blocks", 1), ("up_blocks", "output_blocks", 0)):
        for stage, inside in _stages(names, side):
            layers = sum(part.startswith("resnets.") for part in inside)
            for k in range(layers):
                places[f"{stage}.resnets.{k}"] = f"{there}.{count + k}.0"
                places[f"{stage}.attentions.{k}"] = f"{there}.{count + k}.1"
            count += layers
            slot = 2 if "attentions.0" in inside else 1
            places[f"{stage}.upsamplers.0"] = f"{there}.{count - 1}.{slot}"
            places[f"{stage}.downsamplers.0.conv"] = f"{there}.{count}.0.op"
            count += "downsamplers.0" in inside
    return {name: _original_name(name, places) for name in names}


def _stages(names: Iterable[str], side: str) -> Iterator[tuple[str, set[str]]]:
    """(`down_blocks.1`, {`resnets.0`, `attentions.0`, ...}) for each stage of one side."""
    stages: dict[int, set[str]] = {}
    for name in names:
        if name.startswith(f"{side}."):
            stage, *inside = name.split(".")[1:4]
            stages.setdefault(int(stage), set()).add(".".join(inside))
    return ((f"{side}.{stage}", stages[stage]) for stage in sorted(stages))


def _original_name(name: str, places: Mapping[str, str]) -> str:
    place = next((each for each in places if name == each or name.startswith(f"{each}.")), None)
    if place is None:
        return name
    first, *rest = name.removeprefix(place).removeprefix(".").split(".")
    return ".".join(part for part in (places[place], _RESNET.get(first, first), *rest) if part)


@dataclass(frozen=True)
class FoundUNet:
    """The U-Net in a file: configuration, the file's name of each of its tensors, how it is trained."""

    config: dict[str, Any]
    names: dict[str, str]
    schedule: dict[str, Any]


def find_unet(
    names: Collection[str], shape: Callable[[str], tuple[int, ...]], read: Callable[[str], Tensor]
) -> FoundUNet:
    """The SDXL, SD 1.x or SD 2.x U-Net among the tensors of one file, in the original layout or diffusers'.

    `schedule` holds what the file says of `prediction_type` and `rescale_betas_zero_snr`: keys `v_pred` and
    `ztsnr`, as fine-tunes of SDXL mark themselves; of an SD 2.x without them, the spread of one bias. Raises
    `CheckpointError` for anything else, saying what it looks like.
    """
    anchor = next((each for each in (_ORIGINAL, _DIFFUSERS) if any(n.endswith(each) for n in names)), None)
    if anchor is None:
        raise CheckpointError(f"{_what(names)}. Give a U-Net's folder, a pipeline, or a file of SDXL or SD.")
    prefix = min((name for name in names if name.endswith(anchor)), key=len).removesuffix(anchor)
    inside = {name for name in names if name.startswith(prefix)}
    contexts = {shape(name)[1] for name in inside if name.endswith("attn2.to_k.weight")}
    family = _FAMILIES.get(max(contexts, default=0))
    if len(contexts) != 1 or family is None:
        raise CheckpointError(
            f"a U-Net that reads text {sorted(contexts)} wide. In one file only SDXL (2048), SD 1.x (768) "
            "and SD 2.x (1024) are known; give this one as a diffusers folder with its config.json."
        )
    kind, config = family[0], dict(family[1])
    with torch.device("meta"):
        own = UNet2DConditionModel(**config).state_dict()
    written = original_names(own) if anchor == _ORIGINAL else {name: name for name in own}
    theirs = {name: prefix + there for name, there in written.items()}
    if not prefix:  # other networks' tensors lie beside these
        tops = {name.split(".")[0] for name in theirs.values()}
        inside = {name for name in inside if name.split(".")[0] in tops}
    _check_whole(kind, set(theirs.values()), inside)
    width, config["in_channels"] = shape(theirs["conv_in.weight"])[:2]
    config["out_channels"] = shape(theirs["conv_out.weight"])[0]
    if width != config["block_out_channels"][0]:
        raise CheckpointError(
            f"a U-Net with the names of {kind}'s, but {width} channels wide and not "
            f"{config['block_out_channels'][0]}: a variant. Give it as a diffusers folder."
        )
    schedule = _schedule(kind, config, names, lambda name: read(theirs[name]))
    if kind == "SD 2.x" and schedule:
        config["sample_size"] = 96  # the ones that predict v are trained at 768 px
    return FoundUNet(config, theirs, schedule)


def _schedule(
    kind: str, config: Mapping[str, Any], names: Collection[str], read: Callable[[str], Tensor]
) -> dict[str, Any]:
    if any(name.startswith(("edm_mean", "edm_std", "edm_vpred.")) for name in names):
        raise CheckpointError(
            "an SDXL trained on EDM's noise levels, not on a table of betas. Its targets are not known here; "
            "give one that predicts epsilon or v."
        )
    spread = kind == "SD 2.x" and config["in_channels"] == 4
    last = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
    if "v_pred" not in names and not (spread and read(last).float().std(correction=0) > _V_SPREAD):
        return {}
    return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in names}


def _check_whole(kind: str, wanted: set[str], given: set[str]) -> None:
    for problem, odd in (("lacks", wanted - given), ("has besides", given - wanted)):
        if odd:
            raise CheckpointError(
                f"a U-Net that reads text as {kind}'s does, but {problem} {len(odd)} tensors, such as "
                f"{min(odd)}: a student or another variant. Give it as a diffusers folder."
            )


def _what(names: Collection[str]) -> str:
    """What a file without a U-Net looks like."""
    for part, kind in (
        ("lora_", "a LoRA, which changes a U-Net and is none"),
        ("double_blocks.", "a Flux transformer, no U-Net"),
        ("joint_blocks.", "a Stable Diffusion 3 transformer, no U-Net"),
        ("transformer_blocks.", "a transformer, no U-Net"),
        ("control_model.", "a ControlNet, no U-Net"),
        ("decoder.up", "an autoencoder, no U-Net"),
        ("text_model.", "a text encoder, no U-Net"),
    ):
        if any(part in name for name in names):
            return kind
    return f"no U-Net in it: {len(names)} tensors, such as {min(names, default='none')}"
