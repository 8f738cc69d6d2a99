"""Expert load equals a count by hand, and watching changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring.evaluation.expert_load import watched_experts
from shoestring.models.experts import ExpertChoice
from shoestring.models.microdit import MicroDiT

TOKENS, EXPERTS = 10, 4


def layer(seed: int = 0, capacity: float = 1.5) -> ExpertChoice:
    torch.manual_seed(seed)
    made = ExpertChoice(8, 2.0, 8, EXPERTS, capacity)
    torch.nn.init.normal_(made.router.weight, std=0.7)
    return made


def network(**more: Any) -> MicroDiT:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "mixer_size": 32, "head_dim": 16, "multiple_of": 32, "caption_channels": 8}
    depths = {"depth": 4, "mixer_depth": 2, "text_depth": 1, "num_experts": EXPERTS}
    made = MicroDiT(sample_size=8, in_channels=3, **(small | depths | more))
    torch.nn.init.normal_(made.proj_out.weight)
    return made.eval()


def passes(model: MicroDiT, keep: Tensor | None = None) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    latents, text = torch.randn(3, 3, 8, 8, generator=draw), torch.randn(3, 5, 8, generator=draw)
    return model(latents, torch.zeros(3), encoder_hidden_states=text, keep=keep, return_dict=False)[0]


def by_hand(made: ExpertChoice, batches: list[Tensor]) -> dict[str, float]:
    """The definition, token by token and expert by expert."""
    takers: list[int] = []
    weights = [[] for _ in range(EXPERTS)]
    for batch in batches:
        for tokens in batch:
            scores = [torch.softmax(made.router.weight @ token, 0).tolist() for token in tokens]
            each = max(1, int(made.capacity * len(tokens) / EXPERTS))
            taken = [0] * len(tokens)
            for expert in range(EXPERTS):
                column = [score[expert] for score in scores]
                for best in sorted(column, reverse=True)[:each]:
                    taken[column.index(best)] += 1
                weights[expert] += column
            takers += taken
    means = [sum(each) / len(each) for each in weights]
    return {
        "unused": takers.count(0) / len(takers),
        "many": sum(count >= 3 for count in takers) / len(takers),
        "heaviest": max(means) / (sum(means) / EXPERTS),
        "lightest": min(means) / (sum(means) / EXPERTS),
    }


@pytest.mark.parametrize("capacity", [0.1, 1.5, 2.0, 4.0])
def test_figures_equal_a_count_by_hand(capacity: float) -> None:
    made = layer(capacity=capacity)
    batches = [torch.randn(2, TOKENS, 8), torch.randn(1, TOKENS + 3, 8)]
    with torch.no_grad(), watched_experts(made) as load:
        for batch in batches:
            made(batch)
    (figures,) = load.figures().values()
    assert figures == pytest.approx(by_hand(made, batches), rel=1e-5)
    if capacity == 1.5:
        assert figures["unused"] > 0
        assert figures["many"] > 0
    if capacity == EXPERTS:  # every expert takes every token
        assert (figures["unused"], figures["many"]) == (0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unused_are_the_tokens_that_the_layer_leaves_at_zero(dtype: torch.dtype) -> None:
    """What no expert takes comes out as zero: the layer itself says which tokens those are."""
    made, tokens = layer(capacity=0.8), torch.randn(8, 64, 8)
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        watched_experts(made) as load,
    ):
        out = made(tokens)
    (figures,) = load.figures().values()
    assert figures["unused"] == pytest.approx(float((out == 0).all(dim=-1).float().mean()))
    assert 0.1 < figures["unused"] < 0.9


def test_layers_are_named_by_their_blocks_and_watching_changes_no_bit() -> None:
    model = network()
    keep = torch.arange(6).repeat(3, 1)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with torch.no_grad():
        before = passes(model), passes(model, keep)
        with watched_experts(model) as load:
            during = passes(model), passes(model, keep)
    assert all(torch.equal(one, other) for one, other in zip(before, during, strict=True))
    assert hooks == [len(module._forward_hooks) for module in model.modules()], "hooks are gone"
    assert list(load.figures()) == ["patch_mixer.1", "transformer_blocks.1"]
    assert all(0 <= row["lightest"] <= 1 <= row["heaviest"] <= EXPERTS for row in load.figures().values())
    seen = load.figures()
    with torch.no_grad():
        passes(model)
    assert load.figures() == seen, "nothing is counted outside"


def test_hooks_are_gone_after_a_failure() -> None:
    made = layer()
    with pytest.raises(RuntimeError), watched_experts(made):
        made(torch.zeros(1, TOKENS, 9))
    assert not made.router._forward_hooks


def test_gradients_pass_as_if_unwatched() -> None:
    made, tokens = layer(), torch.randn(2, TOKENS, 8)
    made(tokens).sum().backward()
    expected = made.router.weight.grad.clone()
    made.zero_grad()
    with watched_experts(made) as load:
        made(tokens).sum().backward()
    assert torch.equal(made.router.weight.grad, expected)
    assert not any(row.requires_grad for rows in load.seen.values() for row in rows)


def test_a_dense_network_has_no_figures() -> None:
    model = network(num_experts=0)
    with torch.no_grad(), watched_experts(model) as load:
        passes(model)
    assert load.figures() == {}


def test_a_network_compiled_in_place_is_watched_too() -> None:
    made, tokens = layer(), torch.randn(2, TOKENS, 8)
    with torch.no_grad():
        with watched_experts(made) as load:
            made(tokens)
        made.compile(backend="eager")
        made(tokens)
        with watched_experts(made) as again:
            made(tokens)
    assert again.figures() == load.figures() != {}
