"""SemanticCompressor: a picture as a few numbers a cell, an EfficientNetV2 with a linear map on top.

    x in [0, 1] --ImageNet mean, std--> backbone (EfficientNetV2 features, torchvision's names)
      --mapper: Conv 1x1, BatchNorm--> z (B, c_latent, H / stride, W / stride)

Würstchen's Stage B trains it together with its decoder, and Stage C lives in its latents. Sources: Tan & Le,
"EfficientNetV2" (2104.00298), table 4; Pernias et al., "Würstchen" (2306.00637), section 3. The published
networks: v2 EfficientNetV2-S, affine; Stable Cascade the same, not affine; v1 EfficientNetV2-L, affine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.checkpoint_files import networks_in, read_checkpoint
from shoestring.models.sizes import check_size
from shoestring.models.synced_norm import SyncedBatchNorm2d

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NORM_EPS = 1e-3  # of the backbone; the mapper keeps torch's 1e-5

Stage = dict[str, Any]


def _stage(block: str, expand: int, stride: int, width_in: int, width_out: int, layers: int) -> Stage:
    sizes = {"expand": expand, "kernel": 3, "stride": stride, "in": width_in, "out": width_out}
    return {"block": block, **sizes, "layers": layers}


VARIANTS: dict[str, tuple[list[Stage], int]] = {
    "s": (
        [
            _stage("fused", 1, 1, 24, 24, 2),
            _stage("fused", 4, 2, 24, 48, 4),
            _stage("fused", 4, 2, 48, 64, 4),
            _stage("mbconv", 4, 2, 64, 128, 6),
            _stage("mbconv", 6, 1, 128, 160, 9),
            _stage("mbconv", 6, 2, 160, 256, 15),
        ],
        1280,
    ),
    "l": (
        [
            _stage("fused", 1, 1, 32, 32, 4),
            _stage("fused", 4, 2, 32, 64, 7),
            _stage("fused", 4, 2, 64, 96, 7),
            _stage("mbconv", 4, 2, 96, 192, 10),
            _stage("mbconv", 6, 1, 192, 224, 19),
            _stage("mbconv", 6, 2, 224, 384, 25),
            _stage("mbconv", 6, 1, 384, 640, 7),
        ],
        1280,
    ),
    "tiny": (
        [
            _stage("fused", 1, 1, 16, 16, 1),
            _stage("fused", 4, 2, 16, 24, 2),
            _stage("fused", 4, 2, 24, 40, 2),
            _stage("mbconv", 4, 2, 40, 64, 4),
        ],
        128,
    ),
}
"""Name -> (stages, width of the features). "s" and "l" are published; "tiny" (stride 16) is ours."""


class SqueezeExcitation(nn.Module):
    """Channels weighted by what the whole picture holds: x * sigmoid(fc2(silu(fc1(mean x))))."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(weights)


class Block(nn.Module):
    """One residual block; added to its input where that has its shape.

    fused, expand 1:  conv k x k, norm, SiLU
    fused:            conv k x k widens, norm, SiLU; conv 1x1 narrows, norm
    mbconv:           conv 1x1 widens (not at expand 1), depthwise k x k, squeeze-excitation, conv 1x1 narrows
    """

    def __init__(self, stage: Stage, width_in: int, stride: int, drop: float) -> None:
        super().__init__()
        out, kernel = stage["out"], stage["kernel"]
        wide = _round_to_8(width_in * stage["expand"])
        parts: list[nn.Module] = []
        if stage["block"] == "fused":
            if wide == width_in:
                parts = [_conv(width_in, out, kernel, stride)]
            else:
                parts = [_conv(width_in, wide, kernel, stride), _conv(wide, out, 1, active=False)]
        else:
            if wide != width_in:
                parts.append(_conv(width_in, wide, 1))
            parts.append(_conv(wide, wide, kernel, stride, groups=wide))
            parts.append(SqueezeExcitation(wide, max(1, width_in // 4)))
            parts.append(_conv(wide, out, 1, active=False))
        self.block = nn.Sequential(*parts)
        self.residual = stride == 1 and width_in == out
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        if not self.residual:
            return y
        if self.training and self.drop > 0:  # stochastic depth, a coin for each picture
            kept = torch.rand(len(y), 1, 1, 1, device=y.device) >= self.drop
            y = y * (kept / (1 - self.drop)).to(y.dtype)
        return x + y


class SemanticCompressor(ModelMixin, ConfigMixin):
    """Pictures in [0, 1] to z (B, c_latent, H / stride, W / stride).

    Args:
        c_latent: channels of z.
        variant: "s" (published for v2 and Stable Cascade), "l" (v1), "tiny" (stride 16), or a list of stages:
            dicts of block ("fused" | "mbconv"), expand, kernel, stride, in, out, layers.
        last_channel: width of the features; None: the variant's own, or 4 times the last stage's.
        input_ratio: side of what the network sees to side of the picture, in `compress`.
        affine: whether the mapper's norm learns a scale and a shift. Without, z has mean 0 and spread 1.
        latents_mean, latents_std: of z, one number or one a channel; the scaled latents in which Stage C
            lives are (z - mean) / std. Published for v2: -1 and 42.
        stochastic_depth: chance that the last residual block is skipped in training, falling to 0 at the
            first. torchvision trains classifiers with 0.2; a compressor's code should say the same of a
            picture every time, hence 0.

    Raises `RecipeError` for stages that do not fit together.
    """

    @register_to_config
    def __init__(
        self,
        c_latent: int = 16,
        variant: str | list[Stage] = "s",
        last_channel: int | None = None,
        input_ratio: float = 0.75,
        affine: bool = True,
        latents_mean: float | list[float] | None = None,
        latents_std: float | list[float] | None = None,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        stages, width = _stages_of(variant, last_channel)
        if not 0 < input_ratio <= 1:
            raise RecipeError(f"input_ratio {input_ratio}: must be above 0 and at most 1.")
        _check_statistics(latents_mean, latents_std, c_latent)
        self.backbone = _backbone(stages, width, stochastic_depth)
        _initialise(self.backbone)
        self.mapper = nn.Sequential(
            nn.Conv2d(width, c_latent, 1, bias=False), SyncedBatchNorm2d(c_latent, affine=affine)
        )
        self.stride = _stride_of(stages)

    @property
    def ratio(self) -> Fraction:
        """`input_ratio` as an exact fraction: 0.6667 is two thirds."""
        return Fraction(float(self.config["input_ratio"])).limit_denominator(64)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], at the size they come in -> z (B, c_latent, H/stride, W/stride).

        A side that `stride` does not divide is rounded up, as strided convolutions do.
        """
        colours = zip(x.float().unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
        # By numbers, not by tensors: making one on a GPU waits for it.
        normal = torch.stack([(colour - mean) / std for colour, mean, std in colours], dim=1)
        return self.mapper(self.backbone(normal.to(self.dtype)))

    def compress(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> z (B, c_latent, H ratio/stride, W ratio/stride).

        Resizes by `input_ratio` (bilinear, antialiased, float32) first. Raises `RecipeError` for a side
        whose share is not a multiple of the stride.
        """
        height, width = images.shape[-2:]
        check_size(height, width, (self.stride / self.ratio).numerator)
        if self.ratio != 1:
            seen = (int(height * self.ratio), int(width * self.ratio))
            images = F.interpolate(images.float(), seen, mode="bilinear", antialias=True)
        return self(images)

    def set_statistics(self, mean: Sequence[float] | float, std: Sequence[float] | float) -> None:
        """Store the mean and spread of z, one number or one a channel; `save_pretrained` keeps them."""
        mean, std = (value if isinstance(value, float | int) else list(value) for value in (mean, std))
        _check_statistics(mean, std, self.config["c_latent"])
        self.register_to_config(latents_mean=mean, latents_std=std)

    # --- weights of others --------------------------------------------------------------------------------

    def load_imagenet(self, source: Path | str | Mapping[str, Any]) -> None:
        """Fill the backbone from torchvision's classifier: its file (.pth, .safetensors) or state dict.

        `efficientnet_v2_s` fits variant "s", `efficientnet_v2_l` variant "l"; the classifier is left out,
        the mapper left as it is. Raises `CheckpointError` where a name or shape differs.
        """
        where, state = _read(source, "features.0.0.weight", "torchvision's EfficientNetV2 (features.*)")
        features = {name[9:]: value for name, value in state.items() if name.startswith("features.")}
        foreign = [name for name in state if not name.startswith(("features.", "classifier."))]
        if foreign:
            raise CheckpointError(f"{where}: {foreign[0]} is no part of torchvision's EfficientNetV2.")
        _load(self.backbone, features, where)

    def load_published(self, source: Path | str | Mapping[str, Any]) -> None:
        """Fill backbone and mapper from a published compressor: a file or state dict, names `backbone.*`.

        Würstchen v2: `effnet_state_dict` in model_v2_stage_b.pt; Stable Cascade: effnet_encoder.safetensors.
        Raises `CheckpointError` where a name or shape differs, saying plainly when it is v1's.
        """
        where, state = _read(source, "mapper.0.weight", "a compressor (backbone.*, mapper.*)")
        if is_v1(state) and self.config["variant"] != "l":
            raise CheckpointError(
                f"{where}: this is Würstchen v1's compressor (EfficientNetV2-L), which fits no other "
                "version's stages. Use v2's: model_v2_stage_b.pt of dome272/wuerstchen."
            )
        affine = "mapper.1.weight" in state
        if affine != self.config["affine"]:
            raise CheckpointError(
                f"{where}: its norm has {'a' if affine else 'no'} scale and shift "
                f"({'Würstchen v2' if affine else 'Stable Cascade'}). Build the network with affine={affine}."
            )
        _load(self, state, where)

    @classmethod
    def from_published(cls, source: Path | str | Mapping[str, Any], **config: Any) -> SemanticCompressor:
        """The compressor in a published file or state dict, `affine` told from it; v1's is refused.

        `latents_mean` and `latents_std` are in no file: the published pipeline of v2 uses -1 and 42.
        """
        where, state = _read(source, "mapper.0.weight", "a compressor (backbone.*, mapper.*)")
        model = cls(
            **{"affine": "mapper.1.weight" in state, "c_latent": len(state["mapper.0.weight"]), **config}
        )
        try:
            model.load_published(state)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace("state dict", where, 1)) from None
        return model.eval()


def is_v1(state: Mapping[str, Any]) -> bool:
    """Whether a compressor's state dict has the shape of Würstchen v1's, an EfficientNetV2-L."""
    stem = state.get("backbone.0.0.weight")
    return "backbone.8.0.weight" in state and isinstance(stem, Tensor) and len(stem) == 32


# --- building --------------------------------------------------------------------------------------------


def _stages_of(variant: str | Sequence[Stage], last_channel: int | None) -> tuple[list[Stage], int]:
    """(stages, width of the features), checked."""
    if isinstance(variant, str):
        if variant not in VARIANTS:
            raise RecipeError(
                f"variant {variant!r}: unknown. Use {', '.join(VARIANTS)}, or a list of stages."
            )
        stages, width = VARIANTS[variant]
        return stages, last_channel or width
    stages = list(variant)
    keys = {"block", "expand", "kernel", "stride", "in", "out", "layers"}
    width_in = None
    for number, stage in enumerate(stages):
        if set(stage) != keys:
            raise RecipeError(f"variant, stage {number}: has {sorted(stage)}; must have {sorted(keys)}.")
        if stage["block"] not in ("fused", "mbconv"):
            raise RecipeError(f"variant, stage {number}: block {stage['block']!r}; use 'fused' or 'mbconv'.")
        if width_in not in (None, stage["in"]):
            raise RecipeError(f"variant, stage {number}: takes {stage['in']} channels; {width_in} come in.")
        width_in = stage["out"]
    if width_in is None:
        raise RecipeError("variant: an empty list of stages. Give at least one.")
    return stages, last_channel or 4 * width_in


def _backbone(stages: Sequence[Stage], last_channel: int, stochastic_depth: float) -> nn.Sequential:
    """torchvision's `features`: stem of stride 2, a Sequential for each stage, a last 1x1 convolution."""
    parts: list[nn.Module] = [_conv(3, stages[0]["in"], 3, 2)]
    total, number = sum(stage["layers"] for stage in stages), 0
    for stage in stages:
        blocks = []
        for layer in range(stage["layers"]):
            width_in, stride = (stage["in"], stage["stride"]) if layer == 0 else (stage["out"], 1)
            blocks.append(Block(stage, width_in, stride, stochastic_depth * number / total))
            number += 1
        parts.append(nn.Sequential(*blocks))
    parts.append(_conv(stages[-1]["out"], last_channel, 1))
    return nn.Sequential(*parts)


def _conv(
    width_in: int, out: int, kernel: int, stride: int = 1, *, groups: int = 1, active: bool = True
) -> nn.Sequential:
    """Convolution, norm and, where `active`, SiLU."""
    return nn.Sequential(
        nn.Conv2d(width_in, out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        SyncedBatchNorm2d(out, eps=NORM_EPS),
        *([nn.SiLU()] if active else []),
    )


def _initialise(backbone: nn.Module) -> None:
    """torchvision's: convolutions ~ N(0, 2 / fan_out), biases 0; norms are 1 and 0 already."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _stride_of(stages: Sequence[Stage]) -> int:
    stride = 2
    for stage in stages:
        stride *= stage["stride"]
    return stride


def _round_to_8(width: float) -> int:
    """The nearest multiple of 8, at least 8 and never below nine tenths of `width`."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


def _check_statistics(mean: Any, std: Any, channels: int) -> None:
    if (mean is None) != (std is None):
        raise RecipeError("latents_mean and latents_std: give both or none.")
    if mean is None:
        return
    for name, value in (("latents_mean", mean), ("latents_std", std)):
        count = 1 if isinstance(value, float | int) else len(value)
        if count not in (1, channels):
            raise RecipeError(f"{name}: {count} numbers; give one, or one for each of {channels} channels.")
    if min([std] if isinstance(std, float | int) else std) <= 0:
        raise RecipeError(f"latents_std {std}: must be above 0.")


# --- reading ---------------------------------------------------------------------------------------------


def _read(source: Path | str | Mapping[str, Any], anchor: str, what: str) -> tuple[str, Mapping[str, Any]]:
    """(where, state dict) of the one network in `source` that has a tensor called `anchor`."""
    where, tree = ("state dict", source) if isinstance(source, Mapping) else (str(source), None)
    found = networks_in(read_checkpoint(Path(where)) if tree is None else tree, anchor)
    if len(found) != 1:
        raise CheckpointError(
            f"{where}: holds {'no' if not found else len(found)} network{'s' * (len(found) != 1)} like {what}"
            + (f": {', '.join(found)}. Give one of them." if found else ".")
        )
    return where, next(iter(found.values()))


def _load(module: nn.Module, state: Mapping[str, Any], where: str) -> None:
    """Load `state` strictly; the first difference becomes a line."""
    own = module.state_dict()
    missing, foreign = [n for n in own if n not in state], [n for n in state if n not in own]
    if missing or foreign:
        first = f"lacks {missing[0]}" if missing else f"has {foreign[0]}, which this network has not"
        raise CheckpointError(f"{where}: {first} ({len(missing)} missing, {len(foreign)} too many).")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name} is {tuple(state[name].shape)}; this network's is {tuple(tensor.shape)}."
            )
    module.load_state_dict(dict(state))
