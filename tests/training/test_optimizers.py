"""Roles of parameters, optimisers against torch's own, schedules against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from shoestring.errors import RecipeError
from shoestring.models.microdit import MicroDiT
from shoestring.training.optimizers import (
    BOUNDARY,
    EXPERT,
    MATRIX,
    VECTOR,
    OptimizerSettings,
    lr_factor,
    make_optimizers,
    parameter_roles,
)


@pytest.fixture
def network() -> MicroDiT:
    torch.manual_seed(0)
    return MicroDiT(
        sample_size=8,
        caption_channels=12,
        hidden_size=16,
        depth=2,
        head_dim=8,
        multiple_of=8,
        mixer_depth=2,
        mixer_size=16,
        num_experts=2,
    )


def test_every_parameter_has_the_role_of_its_place(network: MicroDiT) -> None:
    roles = parameter_roles(network)
    assert roles.keys() == dict(network.named_parameters()).keys()
    expected = {
        "patch_embed.weight": BOUNDARY,
        "patch_embed.bias": VECTOR,
        "caption_projection.linear_1.weight": BOUNDARY,
        "proj_out.weight": BOUNDARY,
        "patch_mixer.0.modulation.linear.weight": BOUNDARY,
        "patch_mixer.0.attn.to_q.weight": MATRIX,
        "patch_mixer.0.norm1.weight": VECTOR,
        "patch_mixer.1.ff.router.weight": MATRIX,
        "patch_mixer.1.ff.experts.0.up.weight": EXPERT,
        "transformer_blocks.0.ff.down.weight": MATRIX,
        "text_blocks.0.attn.to_out.0.weight": MATRIX,
    }
    assert {name: roles[name] for name in expected} == expected


def step(network: MicroDiT, settings: OptimizerSettings, lr: float) -> dict[str, torch.Tensor]:
    """How far one step with gradient 1 everywhere moves each parameter."""
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizers = make_optimizers(network, settings)
    optimizers.set_lr(lr)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step()
    return {name: p.detach() - before[name] for name, p in network.named_parameters()}


def test_adamw_moves_each_role_at_its_own_rate(network: MicroDiT) -> None:
    """A first AdamW step has size lr; experts take their ratio of it; nothing decays without weight decay."""
    moved = step(network, OptimizerSettings(kind="adamw", expert_lr_ratio=0.5), lr=1e-2)
    for name, role in parameter_roles(network).items():
        size = 5e-3 if role == EXPERT else 1e-2
        assert torch.allclose(moved[name], torch.full_like(moved[name], -size), rtol=1e-4), name


def test_weight_decay_spares_norms_and_biases(network: MicroDiT) -> None:
    plain = step(network, OptimizerSettings(kind="adamw"), lr=1e-2)
    decayed = step(network, OptimizerSettings(kind="adamw", weight_decay=0.5), lr=1e-2)
    roles = parameter_roles(network)
    vectors = [name for name, role in roles.items() if role == VECTOR]
    assert all(torch.allclose(plain[name], decayed[name], atol=1e-7) for name in vectors)
    assert not torch.allclose(
        plain["caption_projection.linear_1.weight"], decayed["caption_projection.linear_1.weight"]
    )


def test_muon_gets_hidden_matrices_and_equals_torchs(network: MicroDiT) -> None:
    name = "transformer_blocks.0.attn.to_q.weight"
    weight = dict(network.named_parameters())[name].detach().clone().requires_grad_()
    weight.grad = torch.ones_like(weight)
    torch.optim.Muon([weight], lr=2e-2, weight_decay=0.0).step()
    start = dict(network.named_parameters())[name].detach().clone()
    moved = step(network, OptimizerSettings(kind="muon", lr_ratio=10.0), lr=2e-3)
    assert torch.allclose(start + moved[name], weight.detach(), atol=1e-6)
    assert torch.allclose(moved["patch_embed.bias"], torch.full((16,), -2e-3), rtol=1e-4)


def test_the_state_comes_back(network: MicroDiT) -> None:
    """Loaded into new optimisers, the state makes the next step equal, bit for bit."""
    for kind in ("adamw", "muon"):
        first = make_optimizers(network, OptimizerSettings(kind=kind))
        first.set_lr(1e-3)
        generator = torch.Generator().manual_seed(1)
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        first.step()
        weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        state = {name: tensor.clone() for name, tensor in first.state().items()}
        first.step()
        after = [p.detach().clone() for p in network.parameters()]
        network.load_state_dict(weights)
        second = make_optimizers(network, OptimizerSettings(kind=kind))
        second.set_lr(1e-3)
        second.prepare(list(state))
        for name, tensor in second.state().items():
            tensor.copy_(state[name])
        second.step()
        assert all(torch.equal(a, p) for a, p in zip(after, network.parameters(), strict=True))


def test_an_unknown_optimizer_is_refused(network: MicroDiT) -> None:
    with pytest.raises(RecipeError, match="Use adamw or muon"):
        make_optimizers(network, OptimizerSettings(kind="lion"))


@pytest.mark.parametrize(
    ("settings", "images", "expected"),
    [
        ({"schedule": "constant"}, 0, 1.0),
        ({"schedule": "constant", "warmup": 100}, 25, 0.25),
        ({"schedule": "cosine", "final": 0.33}, 1000, 0.33),
        ({"schedule": "cosine", "final": 0.33}, 500, 0.665),
        ({"schedule": "cosine", "warmup": 200}, 400, 0.5 * (1 + math.cos(math.pi / 4))),
        ({"schedule": "linear", "final": 0.1}, 500, 0.55),
        ({"schedule": "linear"}, 2000, 0.0),
    ],
)
def test_schedules_have_their_closed_forms(settings: dict[str, Any], images: int, expected: float) -> None:
    arguments = {"warmup": 0, "final": 0.0, "total": 1000, **settings}
    assert lr_factor(images=images, **arguments) == pytest.approx(expected)


def test_muon_steps_a_kernel_as_torchs_steps_its_matrix() -> None:
    """Also after the state went through a checkpoint's names, and the kernel's own memory is what moves."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(6, 4, 3)
    flat = torch.nn.Parameter(convolution.weight.detach().flatten(1).clone())
    settings = OptimizerSettings(kind="muon", kernels=True, weight_decay=0.1)
    ours, theirs = make_optimizers(convolution, settings), torch.optim.Muon([flat], lr=1e-2, weight_decay=0.1)
    for number in range(4):
        gradient = torch.randn(4, 6, 3, 3)
        convolution.weight.grad, flat.grad = gradient, gradient.flatten(1)
        ours.set_lr(1e-3)  # hidden matrices take ten times that
        ours.step()
        theirs.step()
        assert torch.equal(convolution.weight.flatten(1), flat)
        if number == 1:
            state = {name: tensor.clone() for name, tensor in ours.state().items()}
            assert state["weight/momentum_buffer"].shape == (4, 54)
            ours = make_optimizers(convolution, settings)
            ours.prepare(list(state))
            for name, tensor in ours.state().items():
                tensor.copy_(state[name])
    assert {id(each) for each in ours.parameters()} == {id(each) for each in convolution.parameters()}
    ours.zero_grad()
    assert convolution.weight.grad is None
