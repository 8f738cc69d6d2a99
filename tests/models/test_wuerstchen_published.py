"""The authors' Würstchen checkpoints become ours: names, layout, sizes; other versions are told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import modeling_wuerstchen_common as theirs
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel as TheirVQ
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
    WuerstchenDiffNeXt as TheirDecoder,
)
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior as TheirPrior
from torch import Tensor, nn

from shoestring.errors import CheckpointError
from shoestring.models.semantic_compressor import SemanticCompressor
from shoestring.models.wuerstchen_decoder import WuerstchenDiffNeXt
from shoestring.models.wuerstchen_prior import WuerstchenPrior
from shoestring.models.wuerstchen_published import (
    config_from_shapes,
    recognise,
    stages_in,
    state_from_published,
)
from shoestring.models.wuerstchen_vqgan import PaellaVQModel
from tests.models.wuerstchen_oracles import shake

PRIOR = {"c_in": 4, "c": 16, "c_cond": 12, "c_r": 8, "depth": 2, "nhead": 2}
DECODER = {
    "c_in": 4,
    "c_out": 4,
    "c_r": 8,
    "patch_size": 2,
    "c_cond": 16,
    "c_hidden": [8, 16, 24],
    "nhead": [-1, 2, 3],
    "blocks": [1, 3, 2],
    "level_config": ["CT", "CTA", "CTA"],
    "inject_effnet": [False, True, True],
    "effnet_embd": 4,
    "clip_embd": 12,
    "kernel_size": 3,
}
VQGAN = {
    "in_channels": 3,
    "out_channels": 3,
    "up_down_scale_factor": 2,
    "levels": 2,
    "bottleneck_blocks": 3,
    "embed_dim": 8,
    "latent_channels": 4,
    "num_vq_embeddings": 32,
    "scale_factor": 0.3764,
}
HEAD_DIM = 8


class Attention2D(nn.Module):
    """Attention as the authors wrote it, on torch's own module, which keeps q, k and v in one matrix."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, x: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # (B, H W, C)
        out = self.attn(tokens, encoder_hidden_states, encoder_hidden_states, need_weights=False)[0]
        return out.transpose(1, 2).view_as(x)


def original(network: nn.Module) -> nn.Module:
    """diffusers' network with the authors' attention and other weights in every tensor."""
    for module in list(network.modules()):
        if isinstance(module, theirs.AttnBlock):
            channels = module.attention.to_q.in_features
            module.attention = Attention2D(channels, channels // HEAD_DIM)
    shake(network, small=0.3)
    return network.eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def loaded(kind: Any, stage: str, state: dict[str, Any]) -> Any:
    """Our network of an original state dict, loaded strictly."""
    found = recognise(stage, state, head_dim=HEAD_DIM)
    network = kind(**found.config)
    network.load_state_dict(found.state)
    return network.eval()


# --- the same numbers come out ---------------------------------------------------------------------------


@torch.no_grad()
def test_a_prior_on_torchs_attention_gives_the_same_noise_in_ours() -> None:
    their = original(TheirPrior(**PRIOR))
    assert "blocks.2.attention.attn.in_proj_weight" in their.state_dict()
    ours = loaded(WuerstchenPrior, "prior", their.state_dict())
    x, r, c = torch.randn(2, 4, 6, 4), torch.rand(2), torch.randn(2, 5, 12)
    assert {name: ours.config[name] for name in PRIOR} == PRIOR
    assert relative(ours(x, r, c), their(x, r, c)) < 1e-5


@torch.no_grad()
def test_a_decoder_on_torchs_attention_gives_the_same_noise_in_ours() -> None:
    their = original(TheirDecoder(**DECODER))
    ours = loaded(WuerstchenDiffNeXt, "decoder", their.state_dict())
    x, r, codes, text = (
        torch.randn(2, 4, 32, 16),
        torch.rand(2),
        torch.randn(2, 4, 3, 2),
        torch.randn(2, 5, 12),
    )
    assert {name: ours.config[name] for name in DECODER} == DECODER
    assert relative(ours(x, r, codes, text), their(x, r, codes, text)) < 1e-5


@torch.no_grad()
def test_a_stage_a_with_the_authors_codebook_gives_the_same_latents_and_pictures() -> None:
    their = original(TheirVQ(**VQGAN))
    state = their.state_dict()
    state["vquantizer.codebook.weight"] = state.pop("vquantizer.embedding.weight")
    state["vquantizer.ema_element_count"] = torch.ones(32)
    ours = loaded(PaellaVQModel, "vqgan", state)
    x, h = torch.rand(2, 3, 16, 8), torch.randn(2, 4, 4, 2)
    assert {name: ours.config[name] for name in VQGAN} == VQGAN
    assert relative(ours.encode(x).latents, their.encode(x).latents) < 1e-5
    for plain in (True, False):  # without and with the codebook
        expected = their.decode(h, force_not_quantize=plain).sample
        assert relative(ours.decode(h, force_not_quantize=plain).sample, expected) < 1e-5


@pytest.mark.parametrize("affine", [True, False], ids=["v2", "stable cascade"])
def test_a_compressor_keeps_every_tensor_and_its_sizes(affine: bool) -> None:
    stages = [
        {"block": "fused", "expand": 1, "kernel": 3, "stride": 1, "in": 8, "out": 8, "layers": 1},
        {"block": "fused", "expand": 4, "kernel": 3, "stride": 2, "in": 8, "out": 16, "layers": 2},
        {"block": "fused", "expand": 4, "kernel": 3, "stride": 2, "in": 16, "out": 16, "layers": 1},
        {"block": "mbconv", "expand": 4, "kernel": 5, "stride": 2, "in": 16, "out": 24, "layers": 2},
        {"block": "mbconv", "expand": 6, "kernel": 3, "stride": 1, "in": 24, "out": 24, "layers": 1},
        {"block": "mbconv", "expand": 6, "kernel": 3, "stride": 2, "in": 24, "out": 32, "layers": 1},
    ]
    network = SemanticCompressor(c_latent=5, variant=stages, last_channel=40, affine=affine)
    shake(network, small=0.3)
    found = recognise("compressor", network.state_dict())
    assert found.config["variant"] == stages
    assert (found.config["c_latent"], found.config["last_channel"]) == (5, 40)
    scaling = {key: found.config[key] for key in found.config if key.startswith("latents_")}
    assert scaling == ({"latents_mean": -1.0, "latents_std": 42.0} if affine else {})
    assert found.assumed[0] == "strides 1 2 2 2 1 2"
    again = SemanticCompressor(**found.config)
    again.load_state_dict(found.state)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(again.eval()(x), network.eval()(x))


# --- published sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "network", "published"),
    [
        ("prior", TheirPrior, {"c_in": 16, "c": 1536, "c_cond": 1280, "c_r": 64, "depth": 32, "nhead": 24}),
        ("decoder", WuerstchenDiffNeXt, {}),  # ours: diffusers' takes 18 s to start
        ("vqgan", TheirVQ, {}),
        ("compressor", SemanticCompressor, {}),
    ],
)
def test_the_published_sizes_are_read_off_the_published_shapes(
    stage: str, network: Any, published: dict[str, Any]
) -> None:
    """diffusers' classes at the hub's configurations (for the last three, their defaults)."""
    with torch.device("meta"):
        their = network(**published)
    config, assumed = config_from_shapes(stage, shapes(their))
    expected = {key: value for key, value in their.config.items() if key in config}
    if stage == "compressor":
        expected |= {"last_channel": 1280, "latents_mean": -1.0, "latents_std": 42.0}
    assert config == {key: list(v) if isinstance(v, tuple) else v for key, v in expected.items()}
    assert (
        assumed
        == {
            "prior": ("head_dim 64",),
            "decoder": ("head_dim 64", "patch_size 2"),
            "vqgan": ("scale_factor 0.3764",),
            "compressor": ("scaled codes (z + 1) / 42",),
        }[stage]
    )


def test_names_of_ours_pass_unchanged() -> None:
    state = TheirPrior(**PRIOR).state_dict()
    ours = state_from_published(state)
    assert list(ours) == list(state)
    assert all(torch.equal(ours[name], state[name]) for name in state)


# --- which network of a file -----------------------------------------------------------------------------


def test_a_training_checkpoint_gives_the_average_unless_told_otherwise() -> None:
    state = original(TheirPrior(**PRIOR)).state_dict()
    average = {f"module.{name}": 2 * tensor for name, tensor in state.items()}
    tree = {"state_dict": state, "ema_state_dict": average, "iter": 3, "optimizer_state_dict": {"state": {}}}
    plain, averaged = stages_in(tree, "state_dict")["prior"], stages_in(tree)["prior"]
    assert all(torch.equal(plain[name], state[name]) for name in state)
    assert all(torch.equal(averaged[name], 2 * state[name]) for name in state)
    with pytest.raises(
        CheckpointError, match=r"^no network at 'ema'\. Choose with --part: 'ema_state_dict.mod"
    ):
        stages_in(tree, "ema")
    with pytest.raises(
        CheckpointError, match=r"^holds 2 networks of Stage C \(prior\)\. Choose .* 'a', 'b'\.$"
    ):
        stages_in({"a": state, "b": dict(state)})


def test_one_file_gives_its_stages_and_a_part_only_what_lies_there() -> None:
    decoder, compressor = (
        TheirDecoder(**DECODER).state_dict(),
        SemanticCompressor(variant="tiny").state_dict(),
    )
    tree = {"state_dict": decoder, "effnet_state_dict": compressor}
    assert set(stages_in(tree)) == {"decoder", "compressor"}
    assert set(stages_in(tree, "effnet_state_dict")) == {"compressor"}
    assert stages_in({"model": {"weight": torch.zeros(2)}}) == {}


# --- other versions --------------------------------------------------------------------------------------


def on_meta(kind: Any, **config: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(kind(**config).state_dict())


def paella() -> dict[str, Tensor]:
    """A few tensors of v1's Stage B, of the published sizes."""
    sizes = {
        "byt5_mapper.weight": (1024, 1024),
        "effnet_mapper.weight": (1024, 16),
        "in_mapper.0.weight": (8192, 256),
        "embedding.1.weight": (640, 1024, 1, 1),
        "clf.1.weight": (1024, 640, 1, 1),
        "out_mapper.1.weight": (8192, 256, 1, 1),
    }
    return {name: torch.empty(size, device="meta") for name, size in sizes.items()}


def cascade(**config: Any) -> dict[str, Tensor]:
    """Stable Cascade's U-Net, small; the names that tell it are the authors'."""
    sizes = {
        "conditioning_dim": 16,
        "block_out_channels": (8, 16),
        "num_attention_heads": (0, 2),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "down_blocks_repeat_mappers": (1, 1),
        "up_blocks_repeat_mappers": (1, 1),
        "block_types_per_layer": (
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        "dropout": (0.1, 0.1),
        "clip_text_pooled_in_channels": 12,
        "switch_level": (False,),
    }
    return on_meta(StableCascadeUNet, **sizes, **config)


@pytest.mark.parametrize(
    ("stage", "state", "told"),
    [
        ("decoder", paella, "Stage B of Würstchen v1 (Paella"),
        (
            "compressor",
            lambda: on_meta(SemanticCompressor, variant="l"),
            "the compressor of Würstchen v1 (Effici",
        ),
        (
            "prior",
            lambda: on_meta(TheirPrior, c_in=16, c=1536, c_cond=1024, depth=32, nhead=24),
            "Stage C of Würstchen v1 (text of CLIP-H",
        ),
        (
            "decoder",
            lambda: cascade(clip_text_in_channels=12, clip_image_in_channels=12),
            "Stage C of Stable Cascade (Würstchen v3)",
        ),
        (
            "decoder",
            lambda: cascade(effnet_in_channels=4, pixel_mapper_in_channels=3, patch_size=2, in_channels=4),
            "Stage B of Stable Cascade (Würstchen v3)",
        ),
    ],
    ids=["v1 B", "v1 compressor", "v1 C", "v3 C", "v3 B"],
)
def test_other_versions_are_named_with_what_to_use_instead(
    stage: str, state: Callable[[], dict[str, Tensor]], told: str
) -> None:
    found = stages_in({"state_dict": state()})
    assert set(found) == {stage}
    with pytest.raises(CheckpointError) as error:
        recognise(stage, found[stage])
    message = str(error.value)
    assert message.startswith(told), message
    assert "\n" not in message
    assert "Use v2's: model_v2_stage_" in message or "or v2's: model_v2_stage_" in message


def test_what_lies_beside_the_weights_is_left_out() -> None:
    state = TheirPrior(**PRIOR).state_dict()
    beside = {"step": 7, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
    assert recognise("prior", {**state, **beside}, head_dim=HEAD_DIM).state.keys() == state.keys()


# --- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"projection.bias": [0.0] * 16}, "projection.bias: is a list, not a tensor."),
        ({"projection.bias": torch.full((16,), torch.nan)}, "projection.bias: holds infinite numbers or NaN"),
        (
            {"projection.bias": torch.zeros(16, dtype=torch.int8)},
            "projection.bias: holds int8, not plain floating",
        ),
        (
            {"projection.bias": torch.zeros(16, device="meta")},
            "projection.bias: holds no data, not plain float",
        ),
        (
            {"projection.weight": torch.zeros(16)},
            r"projection.weight: of shape \(16,\), where a matrix or kernel",
        ),
        ({"projection.weight": None}, "projection.weight: is missing: not a whole state dict."),
    ],
)
def test_tensors_that_are_no_weights_are_refused_by_name(change: dict[str, Any], told: str) -> None:
    state = {**TheirPrior(**PRIOR).state_dict(), **change}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(CheckpointError, match=f"^{told}"):
        recognise("prior", state, head_dim=HEAD_DIM)


def test_the_width_of_a_head_has_to_be_given_where_64_does_not_fit() -> None:
    state = TheirPrior(**PRIOR).state_dict()
    with pytest.raises(
        CheckpointError, match=r"^attention of width 16 cannot have heads of 64\. Give --head-dim"
    ):
        recognise("prior", state)
    assert recognise("prior", state, head_dim=4).config["nhead"] == 4


def test_a_compressor_of_other_stages_is_refused_since_its_strides_are_unknown() -> None:
    one = {"block": "fused", "expand": 1, "kernel": 3, "stride": 2, "in": 8, "out": 8, "layers": 1}
    state = SemanticCompressor(variant=[one, one], last_channel=16).state_dict()
    with pytest.raises(CheckpointError, match=r"^a compressor of 2 stages: no weight tells its strides"):
        recognise("compressor", state)
