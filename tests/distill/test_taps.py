"""Taps: their names and shapes on the published students, and what they catch and when."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shoestring.distill.taps import ROLES, TapPair, Taps, check_gradients, tap_pairs, unwrapped
from shoestring.errors import RecipeError
from shoestring.models.unet_presets import SD14, SDXL, StudentSpec
from shoestring.models.unet_students import preset_config, preset_spec, student_config
from shoestring.objectives.noise import Conditioning, predict
from tests.distill.networks import KOALA_700M, KOALA_TAPS, SMALL_SDXL, make_batch, make_teacher


def preset_pairs(name: str, teacher: dict[str, Any], *roles: str) -> list[TapPair]:
    return tap_pairs(preset_config(name), teacher, preset_spec(name), roles)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        (
            "koala-1b",
            {"down_blocks.1": 2, "down_blocks.2": 6, "mid_block": 6, "up_blocks.0": 12, "up_blocks.1": 4},
        ),
        ("koala-700m", {"down_blocks.1": 2, "down_blocks.2": 5, "up_blocks.0": 10, "up_blocks.1": 4}),
    ],
)
def test_koala_s_taps_are_those_of_the_paper(name: str, stages: dict[str, int]) -> None:
    """30 and 21 self-attentions, each against the same block of attention 0 <- 0, 1 <- 2, and two outputs."""
    pairs = preset_pairs(name, SDXL, *KOALA_TAPS)
    attentions, outer = pairs[:-2], pairs[-2:]
    assert [pair.role for pair in pairs] == ["self_attention"] * len(attentions) + ["outer_blocks"] * 2
    found = Counter(pair.student.split(".attentions")[0] for pair in attentions)
    assert found == stages
    assert [pair[1:] for pair in outer] == [("down_blocks.0",) * 2, ("up_blocks.2",) * 2]
    for _, student, teacher in attentions:
        up = student.startswith("up_blocks")
        assert teacher == (student.replace("attentions.1", "attentions.2") if up else student)
        assert student.endswith(".attn1")


@pytest.mark.parametrize(("name", "elements"), [("koala-1b", 47_185_920), ("koala-700m", 35_389_440)])
def test_features_at_1024_px_have_the_shapes_of_the_paper(name: str, elements: int) -> None:
    """On shapes alone, of both networks: tokens by width, and the outer blocks after resampling."""
    pairs = preset_pairs(name, SDXL, *KOALA_TAPS)
    wide = ("down_blocks.1", "up_blocks.1")  # at 64 x 64
    expected = [(1, 4096, 640) if pair.student.startswith(wide) else (1, 1024, 1280) for pair in pairs[:-2]]
    assert sum(math.prod(shape) for shape in expected) == elements
    expected += [(1, 320, 64, 64), (1, 320, 128, 128)]
    student = features_on_meta(preset_config(name), [pair.student for pair in pairs])
    teacher = features_on_meta(SDXL, [pair.teacher for pair in pairs])
    assert [tuple(student[pair.student].shape) for pair in pairs] == expected
    assert [tuple(teacher[pair.teacher].shape) for pair in pairs] == expected


def features_on_meta(config: dict[str, Any], names: list[str]) -> dict[str, Tensor]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        z, text = torch.empty(1, 4, 128, 128), torch.empty(1, 77, 2048)
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        with torch.no_grad(), Taps(unet, names).catching() as features:
            unet(z, torch.zeros(1, dtype=torch.int64), text, added_cond_kwargs=added)
    return features


def test_bk_s_taps_are_those_of_its_scripts() -> None:
    """All block outputs; Tiny's innermost down block by the last attention's projection."""
    base = preset_pairs("bk-sdm-base", SD14, "block")
    blocks = [f"{side}_blocks.{k}" for side in ("down", "up") for k in range(4)]
    assert [pair[1:] for pair in base] == [(name, name) for name in blocks]
    assert preset_pairs("bk-sdm-small", SD14, "block") == base, "no mid block either way"
    assert [pair[1:] for pair in preset_pairs("bk-sdm-tiny", SD14, "block")] == [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1"),
        ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out"),
        ("up_blocks.0", "up_blocks.1"),
        ("up_blocks.1", "up_blocks.2"),
        ("up_blocks.2", "up_blocks.3"),
    ]


@pytest.mark.parametrize("name", ["bk-sdm-base", "bk-sdm-tiny", "koala-1b", "koala-700m", "ssd-1b", "vega"])
def test_every_role_of_every_student_has_partners_of_its_width(name: str) -> None:
    """Each pair names modules that both networks have, with weights of the same shapes outside of blocks."""
    teacher = SD14 if name.startswith("bk") else SDXL
    roles = [role for role in ROLES if role != "outer_blocks"]
    with torch.device("meta"):
        own, theirs = UNet2DConditionModel(**preset_config(name)), UNet2DConditionModel(**teacher)
    pairs = preset_pairs(name, teacher, *roles)
    assert {pair.role for pair in pairs} == set(roles)
    assert len({pair.student for pair in pairs}) == len({pair.teacher for pair in pairs}) == len(pairs)
    for role, student, partner in pairs:
        ours, other = own.get_submodule(student), theirs.get_submodule(partner)
        if role == "resnet":
            assert ours.out_channels == other.out_channels
        elif role != "block":
            assert [p.shape for p in ours.parameters()] == [p.shape for p in other.parameters()]
    assert ("mid_block" in {pair.student.split(".")[0] for pair in pairs}) == (own.mid_block is not None)


def test_other_cuts_pair_with_the_blocks_they_come_from() -> None:
    spec = StudentSpec(layers_per_block=1, depth=(1, 1, 2), depth_map="top")
    pairs = tap_pairs(student_config(SMALL_SDXL, spec), SMALL_SDXL, spec, ["feed_forward"])
    inner = [pair.teacher for pair in pairs if pair.student.startswith("down_blocks.2")]
    assert inner == [f"down_blocks.2.attentions.0.transformer_blocks.{k}.ff" for k in (1, 2)]


def test_taps_that_match_nothing_or_say_nothing_new_are_refused() -> None:
    plain = SMALL_SDXL | {
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
        "mid_block_type": None,
    }
    spec = StudentSpec(layers_per_block=1)
    with pytest.raises(RecipeError, match=r"objective.taps 'self_attention': the student has no such module"):
        tap_pairs(student_config(plain, spec), plain, spec, ["self_attention"])
    with pytest.raises(RecipeError, match=r"objective.taps 'attention': unknown. Use self_attention, cross"):
        preset_pairs("koala-1b", SDXL, "attention")
    with pytest.raises(RecipeError, match=r"objective.taps 'outer_blocks': other taps hold all of it"):
        preset_pairs("koala-1b", SDXL, "block", "outer_blocks")
    with pytest.raises(RecipeError, match=r"UNet2DConditionModel has no module mid_block.attentions.0"):
        Taps(UNet2DConditionModel(**student_config(SMALL_SDXL, KOALA_700M)), ["mid_block.attentions.0"])


def run(unet: nn.Module, config: dict[str, Any] = SMALL_SDXL) -> Tensor:
    batch = make_batch(2)
    return predict(unet, batch.latents, torch.tensor([10, 900]), Conditioning(config)(batch))


def test_a_self_attention_s_feature_is_its_output_before_the_residual() -> None:
    """Recomputed by hand from what enters the transformer block."""
    unet = make_teacher().eval()
    block = unet.get_submodule("up_blocks.0.attentions.2.transformer_blocks.1")
    entered: list[Tensor] = []
    block.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    names = [f"up_blocks.0.attentions.2.transformer_blocks.1.{part}" for part in ("attn1", "attn2", "ff")]
    with torch.no_grad(), Taps(unet, names).catching() as features:
        run(unet)
        (x,) = entered
        batch = make_batch(2)
        first = block.attn1(block.norm1(x))
        second = block.attn2(block.norm2(x + first), encoder_hidden_states=batch.text)
        third = block.ff(block.norm3(x + first + second))
    expected = dict(zip(names, (first, second, third), strict=True))
    assert features.keys() == expected.keys()
    for name in names:
        assert torch.allclose(features[name], expected[name], atol=1e-6), name


def test_a_block_s_feature_is_what_goes_on_to_the_next_one() -> None:
    """Down blocks return their skip connections too; up blocks a bare tensor."""
    unet = make_teacher().eval()
    entered: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda module, inputs, named: entered.__setitem__(name, (*inputs, *named.values())[0])

    unet.down_blocks[1].register_forward_pre_hook(note("down_blocks.0"), with_kwargs=True)
    unet.conv_norm_out.register_forward_pre_hook(note("up_blocks.2"), with_kwargs=True)
    with torch.no_grad(), Taps(unet, ["down_blocks.0", "up_blocks.2"]).catching() as features:
        run(unet)
    assert features.keys() == entered.keys()
    assert all(features[name] is entered[name] for name in entered)


def test_nothing_is_caught_or_kept_outside() -> None:
    unet = make_teacher().eval()
    taps = Taps(unet, ["up_blocks.2"])
    with torch.no_grad():
        with taps.catching() as first:
            run(unet)
        caught = first["up_blocks.2"]
        run(unet)
        assert first["up_blocks.2"] is caught
        with taps.catching() as second:
            assert not second
            copied = copy.deepcopy(unet)
            run(copied)
            assert not second, "a copy's hooks are its own"
    assert taps._caught is None
    with pytest.raises(ZeroDivisionError), taps.catching():
        raise ZeroDivisionError
    assert taps._caught is None


class Wrapped(DistributedDataParallel):
    """What DDP's wrapper looks like, without processes."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def test_wrappers_do_not_hide_the_modules() -> None:
    """DDP's `module.` and torch.compile's `_orig_mod.` prefixes broke taps that were found by name."""
    unet = make_teacher().eval()
    wrapped = torch.compile(Wrapped(unet), backend="eager")
    assert unwrapped(wrapped) is unet
    with torch.no_grad(), Taps(wrapped, ["up_blocks.2"]).catching() as features:
        output = run(unet)
    assert output.shape == (2, 4, 8, 8)
    assert features["up_blocks.2"].shape == (2, 8, 8, 8)


def test_compiled_networks_are_tapped_too() -> None:
    """Traced whole, after a call that caught nothing: the same features and gradients."""
    torch.manual_seed(0)
    network = nn.Sequential(*(BasicTransformerBlock(8, 2, 4) for _ in range(2)))
    taps, x = Taps(network, ["0", "1.attn1"]), torch.randn(2, 6, 8)

    def features_and_gradient() -> list[Tensor]:
        with taps.catching() as features:
            network(x)
        loss = sum(feature.square().mean() for feature in features.values())
        (gradient,) = torch.autograd.grad(loss, [network[0].attn1.to_q.weight])
        return [features["0"], features["1.attn1"], gradient]

    plain = features_and_gradient()
    torch._dynamo.reset()
    network.compile(dynamic=False, backend="aot_eager")
    with torch.no_grad():
        network(x)
    for _ in range(2):
        for ours, theirs in zip(features_and_gradient(), plain, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


def test_features_without_gradients_are_noticed_in_training_alone() -> None:
    alive, dead = torch.ones(1, requires_grad=True), torch.ones(1)
    check_gradients({"a": alive})
    check_gradients({})
    with torch.no_grad():
        check_gradients({"a": dead})
    with pytest.raises(
        RecipeError, match=r"no gradient reaches 1 of the student's 2 taps, such as b\. .*use_reent"
    ):
        check_gradients({"a": alive, "b": dead})
