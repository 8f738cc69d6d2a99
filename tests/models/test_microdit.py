"""MicroDiT against the authors' network, closed forms and itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from shoestring.errors import CheckpointError, UserError
from shoestring.models.experts import ExpertChoice
from shoestring.models.layers import Attention, grid_positions, rotary_angles, rotate, sincos_positions
from shoestring.models.microdit import MicroDiT, expert_positions, spaced
from shoestring.objectives.denoising import kept_patches

TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "caption_channels": 12,
    "hidden_size": 32,
    "depth": 4,
    "head_dim": 8,
    "multiple_of": 8,
    "mixer_depth": 2,
    "mixer_size": 16,
    "num_experts": 4,
}
IMPROVED = {"positions": "sincos+rope", "text_positions": "rope", "qk_norm": "head", "text_depth": 2}


@pytest.fixture(params=["published", "improved"])
def network(request: pytest.FixtureRequest) -> MicroDiT:
    """A tiny network whose zero-initialised layers are woken up, so that every path shows in the output."""
    torch.manual_seed(0)
    model = MicroDiT(**TINY, **(IMPROVED if request.param == "improved" else {}))
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(batch: int = 2, side: int = 8, length: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 4, side, side, generator=generator),
        torch.rand(batch, generator=generator),
        torch.randn(batch, length, 12, generator=generator),
    )


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(params=["a", "b"])
def published(
    request: pytest.FixtureRequest, fixtures: Path
) -> tuple[MicroDiT, dict[str, Tensor], dict[str, Any]]:
    """The authors' tensors, and our network with their weights."""
    with safe_open(fixtures / f"microdit_{request.param}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        config = json.loads(file.metadata()["config"])
    weights = {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}
    return MicroDiT.from_published(weights, config).eval(), tensors, config


@torch.no_grad()
def test_output_equals_the_authors(published: Any) -> None:
    """Output, guided output and masked output agree with the published network to 1e-5."""
    network, t, config = published
    text = t["y"].squeeze(1)
    out = network(t["x"], t["t"], text)[0]
    null = network(t["x"], t["t"], torch.zeros_like(text[:, :1]))[0]
    masked = network(t["x"], t["t"], text, keep=kept_patches(t["mask_noise"], config["mask_ratio"]))[0]
    assert relative(out, t["out"]) < 1e-5
    assert relative(null.lerp(out, 3.0), t["out_cfg3"]) < 1e-5
    assert relative(masked, t["out_masked"]) < 1e-5


def test_published_weights_survive_the_way_there_and_back(published: Any) -> None:
    network, t, _ = published
    back = network.to_published()
    theirs = {n.removeprefix("weights."): v for n, v in t.items() if n.startswith("weights.")}
    assert back.keys() == theirs.keys(), "what their strict loading asks for, positions and mask token too"
    assert all(torch.equal(back[name], theirs[name]) for name in back)


def test_positions_equal_the_stored_ones(published: Any) -> None:
    _, t, config = published
    side = config["input_size"] // config["patch_size"]
    positions = grid_positions(side, side, config["pos_interp_scale"], torch.device("cpu"))
    assert torch.allclose(sincos_positions(positions, config["dim"]), t["weights.pos_embed"], atol=1e-5)


def test_foreign_weights_are_refused(published: Any) -> None:
    _, t, config = published
    weights = {n.removeprefix("weights."): v for n, v in t.items() if n.startswith("weights.")}
    with pytest.raises(CheckpointError, match="not a tensor of a published MicroDiT"):
        MicroDiT.from_published({**weights, "foreign": torch.zeros(1)}, config)
    with pytest.raises(CheckpointError, match="of another shape"):
        MicroDiT.from_published(weights, {**config, "caption_channels": 8})
    with pytest.raises(CheckpointError, match="unknown keys"):
        MicroDiT.from_published(weights, {**config, "depht": 4})


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        ({}, 1165.4),
        ({"hidden_size": 512, "depth": 16, "head_dim": 32, "mixer_depth": 4, "mixer_size": 512}, 200.7),
    ],
    ids=["XL/2", "Tiny/2"],
)
def test_parameter_counts_are_the_published_ones(config: dict[str, Any], millions: float) -> None:
    with torch.device("meta"):
        network = MicroDiT(**config)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


@torch.no_grad()
def test_keeping_every_patch_equals_no_mask(network: MicroDiT) -> None:
    x, t, text = inputs()
    every = torch.arange(16).expand(2, -1)
    assert torch.allclose(network(x, t, text)[0], network(x, t, text, keep=every)[0], atol=1e-6)


@torch.no_grad()
def test_dropped_patches_come_out_zero_and_kept_ones_do_not(network: MicroDiT) -> None:
    x, t, text = inputs()
    out = network(x, t, text, keep=torch.tensor([[0, 5], [3, 15]]))[0]
    patches = torch.nn.functional.unfold(out, 2, stride=2).abs().sum(dim=1)
    assert [row.nonzero().flatten().tolist() for row in patches] == [[0, 5], [3, 15]]


@torch.no_grad()
def test_padding_does_not_count(network: MicroDiT) -> None:
    x, t, text = inputs()
    padded = torch.nn.functional.pad(text, (0, 0, 0, 3), value=7.0)
    mask = torch.arange(8).expand(2, -1) < 5
    assert torch.allclose(network(x, t, padded, mask)[0], network(x, t, text)[0], atol=1e-5)


@torch.no_grad()
def test_one_null_token_equals_many_in_the_published_network() -> None:
    network = MicroDiT(**TINY)
    torch.nn.init.normal_(network.proj_out.weight)
    x, t, _ = inputs()
    many = network(x, t, torch.zeros(2, 77, 12))[0]
    assert torch.allclose(network(x, t, torch.zeros(2, 1, 12))[0], many, atol=1e-5)


@torch.no_grad()
def test_text_projected_once_gives_the_same_picture(network: MicroDiT) -> None:
    x, t, text = inputs()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    once = network.project_text(text, mask, with_key_values=True)
    assert torch.equal(network(x, t, projected_text=once)[0], network(x, t, text, mask)[0])


@torch.no_grad()
def test_pictures_may_have_any_shape_of_whole_patches(network: MicroDiT) -> None:
    x, t, text = inputs()
    assert network(x[:, :, :6, :4], t, text).sample.shape == (2, 4, 6, 4)
    with pytest.raises(ValueError, match="do not divide into patches of 2"):
        network(x[:, :, :7], t, text)


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(network: MicroDiT) -> None:
    x, t, text = inputs()
    together = network(x, t, text)[0]
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], text[i : i + 1])[0] for i in range(2)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(network: MicroDiT) -> None:
    x, t, text = inputs()
    gradients = []
    for on in (False, True):
        if on:
            network.enable_gradient_checkpointing()
        network.train().zero_grad()
        network(x, t, text)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_saved_network_opens_equal(network: MicroDiT, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    again = MicroDiT.from_pretrained(tmp_path)
    x, t, text = inputs()
    with torch.no_grad():
        assert torch.equal(again(x, t, text)[0], network(x, t, text)[0])
    assert tuple(again.config.qkv_ratio) == tuple(network.config.qkv_ratio)


def test_a_fresh_network_starts_at_zero_output() -> None:
    """The output layer is zero at initialisation, so the first prediction is the preconditioning's alone."""
    x, t, text = inputs()
    assert MicroDiT(**TINY)(x, t, text)[0].abs().max() == 0


def test_ratios_and_expert_positions_read_as_documented() -> None:
    assert spaced(0.5, 3) == [0.5, 0.5, 0.5]
    assert spaced((0.0, 1.0), 3) == [0.0, 0.5, 1.0]
    assert spaced([1, 2, 4], 3) == [1.0, 2.0, 4.0]
    assert expert_positions(2, 4, last=False) == {1}
    assert expert_positions(2, 4, last=True) == {1, 3}
    assert expert_positions(0, 4, last=True) == set()
    assert expert_positions([0, 3], 4, last=False) == {0, 3}
    with pytest.raises(UserError, match=r"give 1, 2 \(the ends\) or 4"):
        spaced([1, 2, 3], 4)
    with pytest.raises(UserError, match=r"Expert blocks \[4\] do not exist"):
        expert_positions([4], 4, last=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 1000, "head_dim": 16}, "must be divisible by head_dim 16; nearest: 992 or 1008"),
        ({"positions": "spiral"}, r"Use sincos or sincos\+rope"),
    ],
)
def test_impossible_settings_say_what_is_possible(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MicroDiT(**{**TINY, **change})


def test_experts_equal_a_dense_loop() -> None:
    """Gather and scatter give what the paper's one-hot products give, forward and backward."""
    torch.manual_seed(0)
    experts = ExpertChoice(8, 2.0, 4, num_experts=4, capacity=2.0)
    x = torch.randn(3, 10, 8, requires_grad=True)
    scores = experts.router(x).softmax(-1)  # (B, N, E)
    weights, chosen = scores.topk(5, dim=1)  # k = 2.0 * 10 / 4
    dispatch = torch.nn.functional.one_hot(chosen, 10).to(x.dtype)  # (B, k, E, N)
    picked = torch.einsum("bken,bnd->bekd", dispatch, x)
    results = torch.stack([e(picked[:, i]) for i, e in enumerate(experts.experts)], dim=1)
    dense = torch.einsum("bken,bke,bekd->bnd", dispatch, weights, results)
    ours = experts(x)
    assert torch.allclose(ours, dense, atol=1e-6)
    (theirs,) = torch.autograd.grad(dense.square().sum(), x)
    (mine,) = torch.autograd.grad(ours.square().sum(), x)
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_rotary_attention_depends_on_distance_alone() -> None:
    x = torch.randn(1, 6, 2, 8)
    near = rotary_angles(grid_positions(2, 3, 1.0, x.device), 8)
    far = near + rotary_angles(torch.full((1, 6, 2), 11.0), 8)
    products = [torch.einsum("bnhd,bmhd->bhnm", rotate(x, a), rotate(x, a)) for a in (near, far)]
    assert torch.allclose(products[0], products[1], atol=1e-4)


def test_fused_projections_change_nothing() -> None:
    """diffusers' QKV fusion applies to our attention."""
    torch.manual_seed(0)
    x, context = torch.randn(2, 6, 16), torch.randn(2, 3, 16)
    for cross in (False, True):
        attention = Attention(16, 16, 8, context_size=16 if cross else None)
        given = {"encoder_hidden_states": context} if cross else {}
        before = attention(x, **given)
        attention.fuse_projections()
        assert torch.allclose(attention(x, **given), before, atol=1e-6)
