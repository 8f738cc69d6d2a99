"""Würstchen's prior against diffusers' class, closed forms and itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior as Theirs
from torch import Tensor, nn

from shoestring.errors import UserError
from shoestring.models.wuerstchen_layers import GlobalResponseNorm, attention_mask, time_embedding
from shoestring.models.wuerstchen_prior import WuerstchenPrior
from shoestring.training.optimizers import BOUNDARY, KERNEL, MATRIX, VECTOR, parameter_roles
from shoestring.training.parallel import blocks
from tests.models.wuerstchen_oracles import (
    arguments,
    assert_dropout_is_the_same,
    gradients,
    largest_difference,
    randomize,
    relative,
    saved_numbers,
    shapes,
)

PUBLISHED: dict[str, Any] = {"c_in": 16, "c": 1536, "c_cond": 1280, "c_r": 64, "depth": 32, "nhead": 24}
CONFIGS: list[dict[str, Any]] = [
    {"c_in": 4, "c": 32, "c_cond": 12, "c_r": 16, "depth": 2, "nhead": 4, "dropout": 0.1},
    {"c_in": 3, "c": 24, "c_cond": 24, "c_r": 9, "depth": 3, "nhead": 1, "dropout": 0.0},  # odd c_r
    {"c_in": 16, "c": 40, "c_cond": 7, "c_r": 4, "depth": 1, "nhead": 5, "dropout": 0.2},
]
SMALL = CONFIGS[0]


def prior(config: dict[str, Any] = SMALL, seed: int = 0) -> WuerstchenPrior:
    """Random weights everywhere, but B away from 1, where the noise has a pole."""
    network: Any = randomize(WuerstchenPrior(**config), seed)
    with torch.no_grad():
        network.out[1].bias[config["c_in"] :] -= 6
    return network.eval()


def inputs(config: dict[str, Any] = SMALL, batch: int = 3, length: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, config["c_in"], 6, 9, generator=generator),
        torch.rand(batch, generator=generator),
        torch.randn(batch, length, config["c_cond"], generator=generator),
    )


# --- the published network -------------------------------------------------------------------------------


def test_published_size_and_keys() -> None:
    """993,636,896 parameters in 648 tensors with the names and shapes of diffusers' class."""
    with torch.device("meta"):
        ours, theirs = WuerstchenPrior(**PUBLISHED), Theirs(**PUBLISHED)
    assert sum(p.numel() for p in ours.parameters()) == 993_636_896
    assert len(ours.state_dict()) == 648
    assert shapes(ours) == shapes(theirs)


def test_constructor_is_that_of_diffusers() -> None:
    ours = arguments(WuerstchenPrior)
    assert ours.pop("text_depth") == 0
    assert ours == arguments(Theirs)


@pytest.mark.parametrize("config", CONFIGS)
def test_output_and_gradients_equal_those_of_diffusers(config: dict[str, Any]) -> None:
    """With weights loaded strictly there and back again, non-square, a batch of three."""
    theirs, ours = Theirs(**config).eval(), WuerstchenPrior(**config).eval()
    theirs.load_state_dict(prior(config).state_dict())
    ours.load_state_dict(theirs.state_dict())
    given = inputs(config)
    with torch.no_grad():
        output = ours(*given)
        assert relative(output, theirs(*given)) < 1e-5
    assert output.is_contiguous()
    found = gradients(ours, lambda: ours(*given))
    assert len(found) == len(list(ours.parameters()))
    assert largest_difference(found, gradients(theirs, lambda: theirs(*given))) < 1e-5


@torch.no_grad()
def test_dropout_falls_where_it_does_in_diffusers() -> None:
    """In training mode, from the same seed: in the MLPs and on what attention puts out."""
    config = {**SMALL, "dropout": 0.3}
    assert_dropout_is_the_same(prior(config), Theirs(**config), inputs())


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    network, given = prior(), inputs()
    network.save_pretrained(tmp_path)
    again = WuerstchenPrior.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert torch.equal(again.eval()(*given), network(*given))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"c_r": 3}, "at least 4"), ({"nhead": 5}, "nhead must divide"), ({"nhead": -1}, "nhead must divide")],
)
def test_impossible_arguments_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        WuerstchenPrior(**{**SMALL, **wrong})


def test_without_text_it_says_what_is_missing() -> None:
    x, r, _ = inputs()
    with pytest.raises(ValueError, match="needs c or projected"):
        prior()(x, r)


# --- initialisation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.001, 0.25, 0.5, 0.9, 1.0])
def test_at_its_start_the_noise_is_the_input(t: float) -> None:
    """At every time, and gradients are finite; diffusers' own initialisation gives outputs of 1e3."""
    network = WuerstchenPrior(**SMALL)
    x, r, c = inputs()
    output = network(x, torch.full_like(r, t), c)
    assert torch.allclose(output, x, atol=1e-4)
    output.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


@torch.no_grad()
def test_initial_weights_are_the_authors() -> None:
    torch.manual_seed(0)
    depth, c, c_cond = 4, 128, 96
    network: Any = WuerstchenPrior(c_in=16, c=c, c_cond=c_cond, c_r=64, depth=depth, nhead=2)
    for res, time, attn in zip(*(network.blocks[i::3] for i in range(3)), strict=True):
        xavier = math.sqrt(2 / (4 * c + c))
        assert float(res.channelwise[-1].weight.std()) == pytest.approx(xavier / math.sqrt(depth), rel=0.02)
        assert float(res.channelwise[0].weight.std()) == pytest.approx(xavier, rel=0.02)
        assert float(res.depthwise.weight.std()) == pytest.approx(math.sqrt(2 / (9 + 9 * c)), rel=0.1)
        assert not time.mapper.weight.any()
        assert not res.channelwise[2].gamma.any()
        # One matrix for queries, keys and values, as torch's own attention has and starts it.
        together = nn.MultiheadAttention(c, 2).in_proj_weight
        for linear in (attn.attention.to_q, attn.attention.to_k, attn.attention.to_v):
            assert float(linear.weight.abs().max()) == pytest.approx(float(together.abs().max()), rel=1e-3)
        out = attn.attention.to_out[0].weight
        assert float(out.std()) == pytest.approx(math.sqrt(1 / c), rel=0.02)
    for weight in (network.projection.weight, network.cond_mapper[0].weight, network.cond_mapper[2].weight):
        assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
    assert not network.out[1].weight.any()
    biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
    assert len(biases) == 9 * depth + 4
    assert not any(bias.any() for bias in biases)


# --- text ------------------------------------------------------------------------------------------------


def mask_of(lengths: list[int], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_projected_text_gives_the_same(masked: bool) -> None:
    network = prior()
    x, r, c = inputs()
    mask = mask_of([5, 2, 1], 5) if masked else None
    projected = network.project(c, mask)
    assert relative(network(x, r, projected=projected), network(x, r, c, mask)) < 1e-5


@torch.no_grad()
def test_guidance_by_a_doubled_batch_equals_two_passes() -> None:
    network = prior()
    x, r, c = inputs()
    null = torch.zeros_like(c)
    projected = network.project(torch.cat([c, null]))
    both = network(torch.cat([x, x]), torch.cat([r, r]), projected=projected)
    assert relative(both, torch.cat([network(x, r, c), network(x, r, null)])) < 1e-5


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    """Texts of several lengths in one batch equal each alone; what lies under the mask does not matter."""
    network = prior()
    x, r, c = inputs()
    lengths = [5, 2, 1]
    together = network(x, r, c, mask_of(lengths, 5))
    alone = [network(x[i, None], r[i, None], c[i, None, :n]) for i, n in enumerate(lengths)]
    assert relative(together, torch.cat(alone)) < 1e-5
    assert relative(together, network(x, r, c)) > 1e-3
    longer = torch.cat([c, torch.full_like(c[:, :3], 9.0)], dim=1)
    assert relative(network(x, r, longer, mask_of(lengths, 8)), together) < 1e-5


def test_without_any_text_token_attention_is_to_the_picture() -> None:
    mask = attention_mask(torch.zeros(1, 2, dtype=torch.bool), tokens=3)
    assert mask is not None
    assert mask.tolist() == [[[[True] * 3 + [False] * 2]]]
    network = prior()
    x, r, c = inputs()
    output = network(x, r, c, torch.zeros(c.shape[:2], dtype=torch.bool))
    assert relative(output, network(x, r, c[:, :0])) < 1e-5


# --- number types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 9])
def test_time_embedding_is_float32_whatever_computes_around_it(size: int) -> None:
    r = torch.linspace(0, 1, 57)
    reference = Theirs(**{**SMALL, "c_r": size}).gen_r_embedding(r)
    assert torch.allclose(time_embedding(r, size), reference, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(time_embedding(r, size), time_embedding(r, size).float())
        assert torch.allclose(time_embedding(r, size), reference, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_time_stays_exact_and_the_head_divides_in_float32(autocast: bool) -> None:
    """What the blocks get is the float32 embedding rounded once; the output is float32's of A and B."""
    network: Any = prior() if autocast else prior().to(torch.bfloat16)
    seen: dict[str, Tensor] = {}
    network.blocks[1].register_forward_pre_hook(lambda _, given: seen.update(time=given[1]))
    network.out.register_forward_hook(lambda _, given, output: seen.update(head=output))
    x, r, c = inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = network(x, r, c)
    exact = time_embedding(r, SMALL["c_r"])
    assert (seen["time"].float() - exact).abs().max() <= 2**-8
    theirs = Theirs(**SMALL).gen_r_embedding(r.bfloat16()).float()
    assert (theirs - exact).abs().max() > 0.5
    assert seen["head"].dtype == torch.bfloat16
    a, b = seen["head"].float().chunk(2, dim=1)
    assert output.dtype == torch.float32
    assert torch.equal(output, (x - a) / ((1 - b).abs() + 1e-5))
    assert relative(output, prior()(x, r, c)) < 0.05


@torch.no_grad()
def test_output_has_the_type_of_the_latents() -> None:
    network = prior().to(torch.bfloat16)
    x, r, c = inputs()
    assert network(x.bfloat16(), r, c).dtype == torch.bfloat16


def test_response_norm_has_gradients_where_a_channel_is_silent() -> None:
    hidden = torch.randn(2, 3, 4, 6)
    hidden[..., 2] = 0
    hidden.requires_grad_()
    norm: Any = randomize(GlobalResponseNorm(6))
    norm(hidden).square().sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


# --- training --------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less() -> None:
    network, given = prior(), inputs()
    plain = gradients(network, lambda: network(*given))
    kept = saved_numbers(lambda: network(*given))
    network.enable_gradient_checkpointing()
    assert largest_difference(gradients(network, lambda: network(*given)), plain) < 1e-6
    assert saved_numbers(lambda: network(*given)) < kept / 2


@torch.no_grad()
@pytest.mark.parametrize("with_projected", [False, True])
def test_it_compiles_to_one_graph(with_projected: bool) -> None:
    torch._dynamo.reset()
    network = prior({**SMALL, "depth": 1})
    x, r, c = inputs()
    mask = mask_of([5, 2, 1], 5)
    given: dict[str, Any] = (
        {"projected": network.project(c, mask)} if with_projected else {"c": c, "text_mask": mask}
    )
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert relative(compiled(x, r, **given), network(x, r, **given)) < 1e-6
    torch._dynamo.reset()


def test_roles_of_parameters() -> None:
    """Matrices within blocks are hidden, ends and modulations are not; kernels are kernels, norms vectors."""
    network = prior()
    roles = parameter_roles(network)
    for name, role in (
        ("projection.weight", BOUNDARY),
        ("cond_mapper.2.weight", BOUNDARY),
        ("out.1.weight", BOUNDARY),
        ("blocks.1.mapper.weight", BOUNDARY),
        ("blocks.0.channelwise.0.weight", MATRIX),
        ("blocks.2.kv_mapper.1.weight", MATRIX),
        ("blocks.2.attention.to_out.0.weight", MATRIX),
        ("blocks.0.channelwise.2.gamma", VECTOR),
        ("blocks.0.depthwise.weight", KERNEL),
        ("projection.bias", VECTOR),
    ):
        assert roles[name] == role, name


def test_what_is_sharded_is_its_blocks() -> None:
    network = prior()
    assert list(blocks(network)) == list(network.blocks)


def test_text_blocks_relate_words_change_no_other_key_and_start_as_nothing() -> None:
    """At the start they add nothing; trained, keys depend on neighbours, and padding never counts."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"c_in": 3, "c": 16, "c_cond": 8, "c_r": 8, "depth": 2, "nhead": 2, "dropout": 0}
    plain, deep = WuerstchenPrior(**small).eval(), WuerstchenPrior(**small, text_depth=2).eval()
    own = {name for name in deep.state_dict() if not name.startswith("text_blocks.")}
    assert own == set(plain.state_dict())
    assert not deep.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    text, mask = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for a, b in zip(plain.project(text, mask).key_values, deep.project(text, mask).key_values, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))
    for parameter in deep.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, r = torch.randn(2, 3, 4, 6), torch.rand(2)
    whole = deep(x, r, text, text_mask=mask)
    assert torch.allclose(deep(x, r, projected=deep.project(text, mask)), whole, atol=1e-5)
    changed = text.clone()
    changed[1, 3:] = 7.0
    assert torch.allclose(deep(x, r, changed, text_mask=mask)[1], whole[1], atol=1e-5)
    one, other = (deep.project(each, None).key_values[0][0] for each in (text, text.roll(1, dims=1)))
    assert not torch.allclose(one[:, 0], other[:, 1], atol=1e-3), "places and neighbours count"
