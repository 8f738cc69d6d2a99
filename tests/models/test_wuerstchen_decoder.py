"""Würstchen's Stage B decoder against diffusers' class, closed forms and itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
    WuerstchenDiffNeXt as Theirs,
)
from torch import Tensor, nn

from shoestring.errors import UserError
from shoestring.models.wuerstchen_decoder import CodeResBlock, WuerstchenDiffNeXt, resize_codes
from shoestring.models.wuerstchen_layers import time_embedding
from shoestring.training.optimizers import BOUNDARY, MATRIX, VECTOR, parameter_roles
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

THREE_LEVELS: dict[str, Any] = {
    "c_cond": 24,
    "c_hidden": [16, 32, 24],
    "nhead": [-1, 4, 2],
    "blocks": [1, 2, 1],
    "level_config": ["CT", "CTA", "CTA"],
    "inject_effnet": [False, True, True],
    "effnet_embd": 6,
    "clip_embd": 10,
    "c_r": 8,
}
TWO_LEVELS = {
    **THREE_LEVELS,
    "c_hidden": [16, 32],
    "nhead": [-1, 4],
    "blocks": [1, 1],
    "level_config": ["CT", "CTA"],
    "inject_effnet": [False, True],
}
CONFIGS: list[dict[str, Any]] = [
    THREE_LEVELS,
    {**THREE_LEVELS, "inject_effnet": [False] * 3, "c_r": 9, "dropout": [0.0, 0.1, 0.2], "kernel_size": 5},
    {
        "c_in": 3,
        "c_out": 3,
        "patch_size": 1,
        "c_cond": 16,
        "c_hidden": [16, 16],
        "nhead": [2, 4],
        "blocks": [2, 1],
        "level_config": ["TCAC", "AT"],  # codes at both levels, but the coarse one has no ResBlock
        "inject_effnet": [True, True],
        "effnet_embd": 4,
        "clip_embd": 8,
    },
    {**THREE_LEVELS, "level_config": ["CT", "TCA", "CTA"], "inject_effnet": [True, False, True]},
]
SMALL = CONFIGS[0]
SIZE = (16, 24)


def decoder(config: dict[str, Any] = SMALL, seed: int = 0) -> WuerstchenDiffNeXt:
    network: Any = randomize(WuerstchenDiffNeXt(**config), seed)
    return network.eval()


def inputs(config: dict[str, Any] = SMALL, batch: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, times, codes, text."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, config.get("c_in", 4), *SIZE, generator=generator),
        torch.rand(batch, generator=generator),
        torch.randn(batch, config["effnet_embd"], 3, 5, generator=generator),
        torch.randn(batch, 7, config["clip_embd"], generator=generator),
    )


# --- the published network -------------------------------------------------------------------------------


def test_published_size_and_keys() -> None:
    """1,055,365,280 parameters in 990 tensors with the names and shapes of diffusers' class."""

    class Uninitialised(Theirs):
        def _init_weights(self, module: nn.Module) -> None:
            """Nothing: it would go through the whole network once for each of its modules."""

    with torch.device("meta"):
        ours, theirs = WuerstchenDiffNeXt(), Uninitialised()
    assert sum(p.numel() for p in ours.parameters()) == 1_055_365_280
    assert len(ours.state_dict()) == 990
    assert shapes(ours) == shapes(theirs)


def test_constructor_is_that_of_diffusers() -> None:
    assert arguments(WuerstchenDiffNeXt) == arguments(Theirs)


@pytest.mark.parametrize("config", CONFIGS)
def test_output_and_gradients_equal_those_of_diffusers(config: dict[str, Any]) -> None:
    """With weights loaded strictly there and back again, non-square, a batch of three."""
    theirs, ours = Theirs(**config).eval(), WuerstchenDiffNeXt(**config).eval()
    theirs.load_state_dict(decoder(config).state_dict())
    ours.load_state_dict(theirs.state_dict())
    x, r, effnet, clip = inputs(config)
    codes = [effnet.clone().requires_grad_() for _ in range(2)]
    with torch.no_grad():
        output = ours(x, r, effnet, clip)
        assert relative(output, theirs(x, r, effnet, clip)) < 1e-5
        for mine, other in zip(
            ours(x, r, effnet, clip, return_noise=False, eps=0.1),
            theirs(x, r, effnet, clip, return_noise=False, eps=0.1),
            strict=True,
        ):
            assert relative(mine, other) < 1e-5
    assert output.is_contiguous()
    found = gradients(ours, lambda: ours(x, r, codes[0], clip))
    expected = gradients(theirs, lambda: theirs(x, r, codes[1], clip))
    assert largest_difference(found, expected) < 1e-5
    if any(config["inject_effnet"]):
        assert codes[0].grad is not None
        assert relative(codes[0].grad, codes[1].grad) < 1e-5


@torch.no_grad()
def test_extra_channels_come_behind_the_latents() -> None:
    """As in diffusers, whose noise has the channels of both; ours may have the latents' alone."""
    x, r, effnet, clip = inputs()
    wide = {**SMALL, "c_in": 6, "c_out": 6}
    extra = x[:, :2] + 1
    ours, theirs = decoder(wide), Theirs(**wide).eval()
    theirs.load_state_dict(ours.state_dict())
    assert relative(ours(x, r, effnet, clip, extra), theirs(x, r, effnet, clip, extra)) < 1e-5

    narrow = decoder({**SMALL, "c_in": 6})
    a, b = narrow(x, r, effnet, clip, extra, return_noise=False)
    assert torch.allclose(narrow(x, r, effnet, clip, extra), (x - a) / b)


@torch.no_grad()
def test_dropout_falls_where_it_does_in_diffusers() -> None:
    """In training mode, from the same seed: in the MLPs and on what attention puts out."""
    config = {**SMALL, "dropout": 0.3}
    assert_dropout_is_the_same(decoder(config), Theirs(**config), inputs())


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    network, given = decoder(), inputs()
    network.save_pretrained(tmp_path)
    again = WuerstchenDiffNeXt.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert torch.equal(again.eval()(*given), network(*given))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"blocks": [1, 1]}, "model.blocks has 2 entries and c_hidden 3"),
        ({"level_config": ["CT", "CTF", "CTA"]}, "unknown block 'F'"),
        ({"nhead": [-1, -1, 2]}, "nhead must divide"),
        ({"c_r": 2}, "at least 4"),
        ({"dropout": [0.1]}, "model.dropout has 1 entries and c_hidden 3"),
    ],
)
def test_impossible_arguments_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        WuerstchenDiffNeXt(**{**SMALL, **wrong})


def test_sizes_that_do_not_divide_are_refused_with_the_nearest() -> None:
    _, r, effnet, clip = inputs()
    with pytest.raises(UserError, match=r"Latents of 16 x 20.* multiples of 8 .*Nearest: 16 x 16 or 16 x 24"):
        decoder()(torch.randn(3, 4, 16, 20), r, effnet, clip)
    with pytest.raises(UserError, match="4 x 24"):
        decoder().project(effnet, clip, size=(4, 24))


def test_conditions_that_do_not_fit_are_refused() -> None:
    x, r, effnet, clip = inputs()
    with pytest.raises(ValueError, match="needs effnet or projected"):
        decoder()(x, r, clip=clip)
    projected = decoder().project(effnet, clip, size=(16, 16))
    with pytest.raises(ValueError, match="projected for 16 x 16"):
        decoder()(x, r, projected=projected)


# --- initialisation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.001, 0.25, 0.5, 0.9, 1.0])
def test_at_its_start_the_noise_is_twice_the_input(t: float) -> None:
    network = WuerstchenDiffNeXt(**SMALL)
    x, r, effnet, clip = inputs()
    output = network(x, torch.full_like(r, t), effnet, clip)
    assert torch.allclose(output, 2 * x, atol=1e-6)
    output.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


@torch.no_grad()
def test_initial_weights_are_the_authors() -> None:
    """The MLPs' last matrices are Xavier over sqrt(layers), where diffusers' are all but zero."""
    torch.manual_seed(0)
    config = {**SMALL, "c_hidden": [64, 96, 96], "c_cond": 128, "clip_embd": 128}
    network: Any = WuerstchenDiffNeXt(**config)
    convolutional = [b for b in network.modules() if isinstance(b, CodeResBlock)]
    assert len(convolutional) == 8
    for block in convolutional:
        first: Any = block.channelwise[0]
        last: Any = block.channelwise[-1]
        c = last.out_features
        assert float(last.weight.std()) == pytest.approx(math.sqrt(2 / (5 * c)) / math.sqrt(4), rel=0.03)
        fans = first.in_features + first.out_features
        assert float(first.weight.std()) == pytest.approx(math.sqrt(2 / fans), rel=0.03)
    theirs = Theirs(**config).down_blocks[1][1].channelwise[-1].weight
    assert float(theirs.std()) < 1e-6
    for mapper in network.effnet_mappers.values():
        assert float(mapper.weight.std()) == pytest.approx(0.02, rel=0.1)
    assert float(network.clip_mapper.weight.std()) == pytest.approx(0.02, rel=0.03)
    embedding = network.embedding[1].weight
    assert float(embedding.abs().max()) == pytest.approx(0.02 * math.sqrt(6 / (16 + 64)), rel=0.02)
    assert not network.clf[1].weight.any()
    for name, parameter in network.named_parameters():
        resampling = isinstance(network.get_submodule(name.rpartition(".")[0]), nn.ConvTranspose2d)
        if name.endswith("bias") and not resampling:
            assert not parameter.any(), name


# --- codes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 12), (3, 5), (2, 3), (1, 1), (7, 20), (1, 3), (2, 1), (6, 1)])
def test_codes_are_resized_as_torch_does(size: tuple[int, int]) -> None:
    """Up, down, not at all, to one cell: bicubic, antialiased, corners aligned, in float32."""
    codes = torch.randn(2, 4, 3, 5)
    resized = resize_codes(codes.bfloat16(), *size)
    assert resized.dtype == torch.float32
    expected = F.interpolate(
        codes.bfloat16().float(), size=size, mode="bicubic", antialias=True, align_corners=True
    )
    assert torch.allclose(resized[..., :4].permute(0, 3, 1, 2), expected, atol=1e-5)
    assert (resized[..., 4] == 1).all()


@torch.no_grad()
def test_a_layer_in_place_of_the_first_linear_is_called_with_all_columns() -> None:
    """As adapters and quantisers put there; projected conditions serve it too."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x.mean(dim=-1, keepdim=True)

    x, r, effnet, clip = inputs()
    ours: Any = decoder()
    theirs = Theirs(**SMALL).eval()
    theirs.load_state_dict(ours.state_dict())
    for block in (ours.down_blocks["1"][1], theirs.down_blocks[1][1]):
        linear = nn.Linear(block.channelwise[0].in_features, block.channelwise[0].out_features)
        linear.load_state_dict(block.channelwise[0].state_dict())
        block.channelwise[0] = Adapted(linear)
    expected = theirs(x, r, effnet, clip)
    assert relative(ours(x, r, effnet, clip), expected) < 1e-5
    projected = ours.project(effnet, clip, size=SIZE)
    assert relative(ours(x, r, projected=projected), expected) < 1e-5


@torch.no_grad()
def test_weights_stored_in_eight_bits_are_used_in_the_type_of_the_rest() -> None:
    """Their type is another wherever no layer is called: there nothing is folded."""
    x, r, effnet, clip = inputs()
    network = decoder()
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert network.down_blocks["1"][1].channelwise[0].weight.dtype == torch.float8_e4m3fn
    projected = network.project(effnet, clip, size=SIZE)
    assert relative(network(x, r, projected=projected), network(x, r, effnet, clip)) < 1e-5


# --- projected conditions, text --------------------------------------------------------------------------


def mask_of(lengths: list[int], length: int = 7) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("text", ["none", "whole", "masked"])
def test_projected_conditions_give_the_same(config: dict[str, Any], text: str) -> None:
    network = decoder(config)
    x, r, effnet, words = inputs(config)
    clip = None if text == "none" else words
    mask = mask_of([7, 2, 1]) if text == "masked" else None
    projected = network.project(effnet, clip, mask, size=SIZE)
    expected = network(x, r, effnet, clip, text_mask=mask)
    assert relative(network(x, r, projected=projected), expected) < 1e-5
    assert projected.text is None
    assert all((pair is None) == (text == "none") for pair in projected.key_values)


@torch.no_grad()
def test_guidance_by_a_doubled_batch_equals_two_passes() -> None:
    network = decoder()
    x, r, effnet, clip = inputs()
    null = torch.zeros_like(clip)
    both_codes = torch.cat([effnet, torch.zeros_like(effnet)])
    projected = network.project(both_codes, torch.cat([clip, null]), size=SIZE)
    both = network(torch.cat([x, x]), torch.cat([r, r]), projected=projected)
    alone = [network(x, r, effnet, clip), network(x, r, torch.zeros_like(effnet), null)]
    assert relative(both, torch.cat(alone)) < 1e-5


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    network = decoder()
    x, r, effnet, clip = inputs()
    lengths = [7, 2, 1]
    together = network(x, r, effnet, clip, text_mask=mask_of(lengths))
    alone = [
        network(x[i, None], r[i, None], effnet[i, None], clip[i, None, :n]) for i, n in enumerate(lengths)
    ]
    assert relative(together, torch.cat(alone)) < 1e-5
    assert relative(together, network(x, r, effnet, clip)) > 1e-4
    longer = torch.cat([clip, torch.full_like(clip[:, :3], 9.0)], dim=1)
    assert relative(network(x, r, effnet, longer, text_mask=mask_of(lengths, 10)), together) < 1e-5


@torch.no_grad()
def test_without_text_attention_is_to_the_picture() -> None:
    """The same as a text of no tokens, with diffusers' class as the oracle."""
    network = decoder()
    theirs = Theirs(**SMALL).eval()
    theirs.load_state_dict(network.state_dict())
    x, r, effnet, clip = inputs()
    expected = theirs(x, r, effnet, clip[:, :0])
    assert relative(network(x, r, effnet), expected) < 1e-5
    assert relative(network(x, r, projected=network.project(effnet, size=SIZE)), expected) < 1e-5


# --- number types ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_time_stays_exact_and_the_head_divides_in_float32(autocast: bool) -> None:
    """What the blocks get is the float32 embedding rounded once; the output is float32's of A and B."""
    network: Any = decoder() if autocast else decoder().to(torch.bfloat16)
    seen: dict[str, Tensor] = {}
    network.down_blocks["0"][1].register_forward_pre_hook(lambda _, given: seen.update(time=given[1]))
    network.clf.register_forward_hook(lambda _, given, output: seen.update(head=output))
    x, r, effnet, clip = inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = network(x, r, effnet, clip)
        projected = network(x, r, projected=network.project(effnet, clip, size=SIZE))
    assert (seen["time"].float() - time_embedding(r, SMALL["c_r"])).abs().max() <= 2**-8
    assert seen["head"].dtype == torch.bfloat16
    a, b = seen["head"].float().chunk(2, dim=1)
    assert projected.dtype == torch.float32
    assert torch.equal(projected, (x - a) / (b.sigmoid() * (1 - 2e-3) + 1e-3))
    exact = decoder()(x, r, effnet, clip)
    assert relative(output, exact) < 0.1
    assert relative(projected, exact) < 0.1


# --- training --------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less() -> None:
    network, given = decoder(), inputs()
    plain = gradients(network, lambda: network(*given))
    kept = saved_numbers(lambda: network(*given))
    network.enable_gradient_checkpointing()
    assert largest_difference(gradients(network, lambda: network(*given)), plain) < 1e-6
    assert saved_numbers(lambda: network(*given)) < kept / 2


@torch.no_grad()
@pytest.mark.parametrize("with_projected", [False, True])
def test_it_compiles_to_one_graph(with_projected: bool) -> None:
    torch._dynamo.reset()
    network = decoder(TWO_LEVELS)
    x, r, effnet, clip = inputs()
    mask = mask_of([7, 2, 1])
    given: dict[str, Any] = {"effnet": effnet, "clip": clip, "text_mask": mask}
    if with_projected:
        given = {"projected": network.project(**given, size=SIZE)}
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert relative(compiled(x, r, **given), network(x, r, **given)) < 1e-6
    torch._dynamo.reset()


def test_roles_of_parameters() -> None:
    """Matrices within blocks are hidden; ends, modulations and kernels are not; norms are vectors."""
    roles = parameter_roles(decoder())
    for name, role in (
        ("embedding.1.weight", BOUNDARY),
        ("clip_mapper.weight", BOUNDARY),
        ("effnet_mappers.1.weight", BOUNDARY),
        ("clf.1.weight", BOUNDARY),
        ("down_blocks.0.1.mapper.weight", BOUNDARY),
        ("down_blocks.1.0.1.weight", BOUNDARY),
        ("down_blocks.1.1.channelwise.0.weight", MATRIX),
        ("up_blocks.0.2.attention.to_q.weight", MATRIX),
        ("up_blocks.0.0.channelwise.2.gamma", VECTOR),
        ("effnet_mappers.1.bias", VECTOR),
    ):
        assert roles[name] == role, name


def test_what_is_sharded_is_its_blocks() -> None:
    """Each block by itself, not whole levels, of which one holds a third of the published weights."""
    network: Any = decoder()
    levels = [*network.down_blocks.values(), *network.up_blocks.values()]
    assert list(blocks(network)) == [block for level in levels for block in level]
