"""Configurations found from published tensors: the authors', the presets', and networks of ours."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from shoestring.errors import CheckpointError
from shoestring.models.microdit import MicroDiT
from shoestring.models.microdit_config import PRESETS, recognise
from shoestring.models.microdit_published import (
    config_from_published,
    network_tensors,
    read_positions,
    state_from_published,
    state_to_published,
    stored_buffers,
)

SMALL: dict[str, Any] = {
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


def network(**changes: Any) -> MicroDiT:
    """A small network, its zero-initialised layers woken up."""
    torch.manual_seed(0)
    model = MicroDiT(**{**SMALL, **changes})
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@cache
def _small() -> dict[str, Tensor]:
    return network().to_published()


def published(**changes: Any) -> dict[str, Tensor]:
    return network(**changes).to_published() if changes else dict(_small())


# --- architecture ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["a", "b"])
def test_the_authors_networks_are_recognised(letter: str, fixtures: Path) -> None:
    """Everything in the configuration beside their weights is found again, but for the width of a head."""
    with safe_open(fixtures / f"microdit_{letter}.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("weights.")]  # noqa: SIM118 - no mapping
        weights = {name.removeprefix("weights."): file.get_tensor(name) for name in names}
        config = json.loads(file.metadata()["config"])
    found = recognise(weights, head_dim=config["head_dim"])
    theirs = {name: value for name, value in config.items() if name not in {"text_length", "mask_ratio"}}
    ours = config_from_published(theirs)
    assert {name: _plain(found.config[name]) for name in ours} == ours
    assert (found.name, found.assumed) == (None, ("expert_capacity 2",))
    back = MicroDiT.around(state_from_published(weights), found.config).to_published()
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes_are_known_by_name(name: str, channels: int) -> None:
    """XL/2 and Tiny/2 from shapes alone, at 512 px, head and expert capacity taken from the publication."""
    arguments = {**PRESETS[name], "in_channels": channels, "sample_size": 64, "pos_interp_scale": 2.0}
    with torch.device("meta"):
        model = MicroDiT(**arguments)
        state = state_to_published(model.state_dict())
    found = recognise({**state, **stored_buffers(model.config)})
    assert found.name == name
    assert found.config == {key: model.config[key] for key in found.config}
    assert found.assumed == (f"head_dim {model.config.head_dim}", "expert_capacity 2")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_bias": True},
        {"mixer_size": 32},
        {"mixer_depth": 0},
        {"num_experts": 0, "expert_blocks": 0, "mixer_expert_blocks": 0},
        {"expert_blocks": 1, "mixer_expert_blocks": [0]},
        {"expert_blocks": [0, 3], "mixer_expert_blocks": 0},
        {"expert_blocks": 3, "depth": 7},
        {"qkv_ratio": 1.0, "mlp_ratio": 4.0},
        {"qkv_ratio": [0.5, 1.0, 0.7, 0.9], "mlp_ratio": [1.0, 4.0, 0.3, 2.2], "mixer_mlp_ratio": [3.1, 0.4]},
        {"mixer_qkv_ratio": 0.5, "hidden_size": 48, "multiple_of": 12, "mixer_size": 48},
        {"hidden_size": 40, "multiple_of": 10, "head_dim": 4, "mixer_size": 20},
        {"patch_size": 1, "in_channels": 3},
        {"patch_size": 4, "sample_size": 16, "in_channels": 16},
    ],
    ids=str,
)
@torch.no_grad()
def test_any_publishable_network_is_found_again(changes: dict[str, Any]) -> None:
    """Out to the published names and back without a configuration: the same output, bit for bit."""
    there = network(**changes)
    state = there.to_published()
    found = recognise(state, head_dim=there.config.head_dim)
    again = MicroDiT.around(state_from_published(state), found.config).eval()
    side = there.config.sample_size
    x, t = torch.randn(2, there.config.in_channels, side, side), torch.rand(2)
    text = torch.randn(2, 5, 12)
    assert torch.equal(again(x, t, text)[0], there(x, t, text)[0])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_what_weights_do_not_tell_is_asked_for() -> None:
    state = published()
    with pytest.raises(
        CheckpointError, match=r"width of a head is not in the weights. Give --head-dim: 8, 16\."
    ):
        recognise(state)
    with pytest.raises(CheckpointError, match=r"Of no MicroDiT with head_dim 16: .* and should be "):
        recognise(published(qkv_ratio=[0.5, 0.75, 0.75, 1.0], head_dim=4), head_dim=16)
    assert recognise(state, head_dim=8, expert_capacity=1.5).config["expert_capacity"] == 1.5
    assert recognise(state, head_dim=8, expert_capacity=1.5).assumed == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_embedder.proj.weight": None}, "x_embedder.proj.weight: missing, where"),
        ({"blocks.2.attn.proj.weight": None}, "blocks.2.attn.proj.weight: missing, where"),
        ({"blocks.1.": None}, "blocks.1: missing, though there is a blocks.3"),
        ({"blocks.0.norm2.weight": None}, "blocks.0.norm2.weight is missing"),
        ({"t_embedder.mlp.0.weight": (32, 256)}, "is 32 x 256 and should be 32 x 512"),
        (
            {"patch_mixer.1.mlp.w2": (3, 64, 16)},
            "patch_mixer.1.mlp.w2 is 3 x 64 x 16 and should be 4 x 64 x 16",
        ),
        ({"y_embedder.y_proj.fc1.weight": (32,)}, "y_embedder.y_proj.fc1.weight: 32, where"),
        ({"blocks.0.mlp.w9.weight": (1,)}, "blocks.0.mlp.w9.weight is one tensor too many"),
        ({"blocks.last.norm1.weight": (1,)}, "blocks.last.norm1.weight is one tensor too many"),
    ],
)
def test_what_is_wrong_with_a_state_dict_is_named(change: dict[str, Any], message: str) -> None:
    state = published()
    for name, shape in change.items():
        state = {key: tensor for key, tensor in state.items() if not key.startswith(name)}
        if shape is not None:
            state[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=message):
        recognise(state, head_dim=8)


def test_a_damaged_published_network_is_told_as_one() -> None:
    with torch.device("meta"):
        state = state_to_published(MicroDiT(**PRESETS["Tiny/2"]).state_dict())
    del state["final_layer.linear.bias"]
    with pytest.raises(
        CheckpointError, match=r"Not the published Tiny/2, .*: final_layer\.linear\.bias is missing"
    ):
        recognise(state)


# --- positions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0, 1.5, 0.75, 3.2])
def test_stored_positions_tell_grid_and_scale(scale: float, dtype: torch.dtype) -> None:
    sizes = {"sample_size": 64, "patch_size": 2, "hidden_size": 64, "in_channels": 4}
    stored = stored_buffers({**sizes, "pos_interp_scale": scale})["pos_embed"].to(dtype)
    assert read_positions(stored) == (32, scale)


def test_a_scale_that_is_no_round_number_is_found() -> None:
    config = {
        "sample_size": 24,
        "patch_size": 2,
        "hidden_size": 32,
        "in_channels": 4,
        "pos_interp_scale": 4 / 3,
    }
    side, scale = read_positions(stored_buffers(config)["pos_embed"])
    assert side == 12
    assert scale == pytest.approx(4 / 3, abs=1e-6)


def test_positions_that_are_computed_otherwise_are_refused() -> None:
    """Rows and columns exchanged, or another base of frequencies: no scale explains them."""
    stored = published()["pos_embed"]
    columns, rows = stored.chunk(2, dim=-1)
    for other in (torch.cat([rows, columns], dim=-1), stored.square(), stored + 1e-3):
        with pytest.raises(CheckpointError, match="not the sin-cos positions of a 4 x 4 grid at any scale"):
            read_positions(other)
    for shape in ((1, 15, 32), (16, 32), (1, 16, 30)):
        with pytest.raises(CheckpointError, match=r"where 1 x N x D with a square N is expected"):
            read_positions(torch.zeros(shape))


def test_stored_positions_win_over_what_is_given() -> None:
    state = published(pos_interp_scale=2.0)
    config = recognise(state, head_dim=8, position_scale=2.0, sample_size=8).config
    assert (config["sample_size"], config["pos_interp_scale"]) == (8, 2.0)
    with pytest.raises(
        CheckpointError, match=r"pos_interp_scale 1: the stored positions say 2\. Leave it out\."
    ):
        recognise(state, head_dim=8, position_scale=1.0)
    with pytest.raises(CheckpointError, match=r"sample_size 64: the stored positions say 8\."):
        recognise(state, head_dim=8, sample_size=64)


def test_without_stored_positions_the_published_512_px_are_taken_and_said() -> None:
    state = published()
    del state["pos_embed"]
    found = recognise(state, head_dim=8, expert_capacity=2.0)
    assert (found.config["sample_size"], found.config["pos_interp_scale"]) == (64, 2.0)
    assert found.assumed == ("sample_size 64", "position scale 2")
    given = recognise(state, head_dim=8, expert_capacity=2.0, sample_size=32, position_scale=1.0)
    assert (given.config["sample_size"], given.config["pos_interp_scale"]) == (32, 1.0)
    assert given.assumed == ()


# --- weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], "is a list, not a tensor"),
        (torch.zeros(32, dtype=torch.int8), "holds int8, not plain floating-point numbers"),
        (torch.zeros(32, dtype=torch.complex64), "holds complex64"),
        (torch.zeros(32).to_sparse(), "not plain floating-point numbers"),
        (torch.zeros(32, device="meta"), "holds no data"),
        (torch.full((32,), torch.nan), "infinite numbers or NaN"),
        (torch.tensor([torch.inf] * 32), "infinite numbers or NaN"),
    ],
)
def test_weights_that_are_no_weights_are_refused(value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"blocks.0.norm1.weight: .*{message}"):
        network_tensors({**published(), "blocks.0.norm1.weight": value})


def test_other_things_beside_weights_do_not_matter_but_other_tensors_do() -> None:
    state = published()
    assert network_tensors({**state, "epoch": 3, "args": {"lr": 1e-4}}).keys() == state.keys()
    with pytest.raises(CheckpointError, match=r"label_emb\.weight: not a tensor of a published MicroDiT"):
        network_tensors({**state, "label_emb.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"positions": "sincos+rope"}, "positions 'sincos\\+rope'"),
        ({"qk_norm": "head"}, "qk_norm 'head'"),
        ({"text_positions": "rope"}, "text_positions 'rope'"),
        ({"text_depth": 2}, "text_depth 2"),
    ],
)
def test_a_network_without_a_place_in_the_layout_names_the_argument(
    change: dict[str, Any], name: str
) -> None:
    with pytest.raises(CheckpointError, match=f"{name}: has no place in the published layout, which is "):
        network(**change).to_published()


def test_weights_of_the_same_layout_are_not_copied() -> None:
    """So that a mapped file stays on disk: only experts, which are transposed, take memory."""
    state = published()
    again = MicroDiT.around(state_from_published(state), recognise(state, head_dim=8).config)
    mine = {tensor.data_ptr() for tensor in again.state_dict().values()}
    shared = [name for name, tensor in state.items() if tensor.data_ptr() in mine]
    experts = [name for name in state if name.endswith(("mlp.w1", "mlp.w2"))]
    assert set(shared) == state.keys() - {*experts, "pos_embed", "mask_token"}
    assert all(parameter.requires_grad for parameter in again.parameters())
