"""A low-rank adapter (LoRA, 2106.09685) on a U-Net: added to be trained, saved alone, folded in.

    W x  ->  W x + (alpha / rank) B A x        A (rank, in) random, B (out, rank) zero at first

The adapter is peft's, put in by diffusers' own `add_adapter`, so that the weights' names are those that every
diffusers pipeline loads. peft comes with the extra `lora`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from shoestring.errors import RecipeError

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""Ends of the names of the modules that LCM-LoRA adapts (2311.05556; diffusers' example): all attention,
feed-forward and residual blocks."""

ADAPTER = "default"
"""The adapter's name within the network: peft's own default, which diffusers' examples have too."""


def add_lora(
    unet: UNet2DConditionModel, rank: int, alpha: int | None = None, targets: Sequence[str] = TARGETS
) -> UNet2DConditionModel:
    """Put an adapter into a U-Net and freeze all else; the same network, whose output is unchanged.

    rank     the adapter's inner width, 1 or more
    alpha    the adapter's share is alpha / rank; None is alpha = rank
    targets  ends of the names of the modules to adapt, Linear or Conv2d; some may be missing

    A is drawn from torch's global generator. Adapter weights are float32 whatever the network's type.
    Raises `RecipeError` without peft, for a rank below 1, a network that has an adapter, and for targets of
    which the network has none.
    """
    _require_peft()
    from peft import LoraConfig

    if rank < 1:
        raise RecipeError(f"lora_rank {rank}: must be 1 or more, such as 64.")
    if has_lora(unet):
        raise RecipeError("lora_rank: the U-Net has an adapter already. Fold it in first, or give another.")
    if not any(_ends_with(name, targets) for name, _ in unet.named_modules()):
        raise RecipeError(
            f"lora targets {', '.join(targets)}: this U-Net has no such module. Give ends of module names, "
            "such as to_q."
        )
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets)),
        adapter_name=ADAPTER,
    )
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return unet


def has_lora(unet: UNet2DConditionModel) -> bool:
    """Whether an adapter is in the network (and not folded)."""
    return ADAPTER in getattr(unet, "peft_config", {})


def lora_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The adapter alone, as diffusers' pipelines save and load it (`unet.<module>.lora_A.weight`, `lora_B`).

    (rank, in) and (out, rank), or kernels; on the weights' device, detached. Such a file holds no alpha, and
    a reader takes it for the rank: so B comes times alpha / rank. Raises `RecipeError` where there is no
    adapter.
    """
    config = _adapter(unet)
    from peft import get_peft_model_state_dict

    scale = config.lora_alpha / config.r
    found: dict[str, Tensor] = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    return {
        f"unet.{name}": (tensor * scale if ".lora_B." in name else tensor).detach().contiguous()
        for name, tensor in found.items()
    }


def merged(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A plain U-Net with the adapter folded into its weights; the one given is left as it is.

    Raises `RecipeError` where there is no adapter.
    """
    _adapter(unet)
    plain = copy.deepcopy(unet)
    plain.fuse_lora()
    plain.unload_lora()
    return plain.requires_grad_(False)


def _adapter(unet: UNet2DConditionModel) -> Any:
    """The adapter's configuration."""
    if not has_lora(unet):
        raise RecipeError("This U-Net has no adapter. Put one in with add_lora, or train with lora_rank set.")
    return unet.peft_config[ADAPTER]


def _require_peft() -> None:
    if find_spec("peft") is None:
        raise RecipeError(
            'lora_rank: adapters need peft, which is not installed. Run `pip install "shoestring[lora]"`, or '
            "leave lora_rank out to train all weights."
        )


def _ends_with(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)
