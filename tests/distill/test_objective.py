"""Distillation: its losses against a straight transcription, its gradients, numbers and draws."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shoestring.distill.objective import DistillationObjective
from shoestring.distill.taps import TapPair, tap_pairs
from shoestring.errors import RecipeError
from shoestring.interfaces import Batch
from shoestring.models.unet_guidance import with_guidance_embedding
from shoestring.models.unet_presets import StudentSpec
from shoestring.models.unet_students import student_config
from shoestring.objectives.denoising import held_out_noise
from shoestring.objectives.noise import Conditioning, NoiseObjective, NoiseSchedule
from shoestring.processes import ALONE
from shoestring.runtime import keyed_normal
from tests.distill import steps_of_many
from tests.distill.networks import (
    KOALA_1B,
    KOALA_700M,
    KOALA_TAPS,
    SCHEDULE,
    SMALL_SD14,
    SMALL_SDXL,
    make_batch,
    make_objective,
    make_student,
    make_teacher,
)

BK_BASE = StudentSpec(layers_per_block=1)
BK_TINY = StudentSpec(layers_per_block=1, mid="drop", inner_stage=False)

BK_BASE_TAPS = [(f"{side}_blocks.{k}",) * 2 for side in ("down", "up") for k in range(4)]
BK_TINY_TAPS = [
    ("down_blocks.0", "down_blocks.0"),
    ("down_blocks.1", "down_blocks.1"),
    ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out"),
    ("up_blocks.0", "up_blocks.1"),
    ("up_blocks.1", "up_blocks.2"),
    ("up_blocks.2", "up_blocks.3"),
]


def transcription(
    student: nn.Module,
    teacher: nn.Module,
    taps: list[tuple[str, str]],
    batch: Batch,
    t: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three losses of a batch as the papers' formulas and BK-SDM's script say them, with plain hooks."""
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[t].view(-1, 1, 1, 1)
    z = abar.sqrt() * batch.latents + (1 - abar).sqrt() * noise
    kept: dict[tuple[str, str], Tensor] = {}
    for side, network, place in (("student", student, 0), ("teacher", teacher, 1)):
        for pair in taps:
            name = pair[place]

            def keep(module: Any, inputs: Any, output: Any, key: tuple[str, str] = (side, name)) -> None:
                kept[key] = output[0] if isinstance(output, tuple) else output

            network.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        said = teacher(z, t, batch.text).sample
    output = student(z, t, batch.text).sample
    features = [F.mse_loss(kept["student", s].float(), kept["teacher", u].float()) for s, u in taps]
    return F.mse_loss(output, noise), F.mse_loss(output, said), torch.stack(features).sum()


@pytest.mark.parametrize(("spec", "taps"), [(BK_BASE, BK_BASE_TAPS), (BK_TINY, BK_TINY_TAPS)])
def test_the_losses_are_those_of_bk_sdm(spec: StudentSpec, taps: list[tuple[str, str]]) -> None:
    """Losses and their gradients, on the same networks, batch, times and noise."""
    student, teacher, batch = make_student(spec, SMALL_SD14), make_teacher(SMALL_SD14), make_batch()
    weights = {"task_weight": 1.0, "output_weight": 0.5, "feature_weight": 0.25}
    objective = make_objective(
        copy.deepcopy(student), teacher, spec=spec, config=SMALL_SD14, taps=("block",), **weights
    )
    t, noise = objective.draw_times(batch.index), keyed_normal(0, "noise", batch.index, (4, 8, 8))
    expected = transcription(student, copy.deepcopy(teacher), taps, batch, t, noise)
    terms = objective.terms(batch.latents, t, noise, objective.conditioning(batch))
    for ours, theirs in zip(terms, expected, strict=True):
        assert torch.allclose(ours.mean(), theirs, rtol=1e-5)
    task, output, feature = expected
    (task + 0.5 * output + 0.25 * feature).backward()
    objective(batch).per_sample.mean().backward()
    for ours, theirs in zip(objective.trained["unet"].parameters(), student.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_a_student_that_is_its_teacher_has_the_task_s_loss_alone() -> None:
    spec, teacher = StudentSpec(), make_teacher()
    objective = make_objective(
        copy.deepcopy(teacher), teacher, spec=spec, taps=("self_attention", "feed_forward", "resnet", "block")
    )
    batch = make_batch()
    t = objective.draw_times(batch.index)
    noise = keyed_normal(0, "noise", batch.index, (4, 8, 8))
    task, output, feature = objective.terms(batch.latents, t, noise, objective.conditioning(batch))
    assert output.tolist() == feature.tolist() == [0.0] * 3
    alone = NoiseObjective(teacher, SCHEDULE, Conditioning(SMALL_SDXL), seed=0)
    assert torch.equal(task, alone(batch).per_sample)
    assert torch.equal(objective(batch).per_sample, task)
    level = torch.tensor([-1.0, 0.0, 1.0])
    assert objective.teacher_error_at(batch, level).tolist() == [0.0] * 3
    assert torch.equal(objective.loss_at(batch, level), alone.loss_at(batch, level))


def test_the_loss_of_each_image_is_its_own() -> None:
    """In any grouping, with every scale; so are times and dropped captions."""
    for scale in ("none", "teacher_power", "per_layer_mean"):
        objective = make_objective(feature_scale=scale, timesteps="mixed", caption_drop=0.5)
        whole = objective(make_batch(4))
        parts = [objective(part) for part in make_batch(4).parts(2)]
        assert torch.allclose(torch.cat([part.per_sample for part in parts]), whole.per_sample, rtol=1e-4)
        assert torch.equal(torch.cat([part.noise_level for part in parts]), whole.noise_level)


def test_feature_scales_are_what_they_say() -> None:
    student, teacher = make_student(), make_teacher()
    features = [
        {"a": torch.tensor([[1.0, 3.0], [0.0, 0.0]]), "b": torch.tensor([[2.0], [5.0]])},
        {"A": torch.tensor([[3.0, 1.0], [0.0, 2.0]]), "B": torch.tensor([[0.0], [4.0]])},
    ]
    expected = {
        "none": [4.0 + 4.0, 2.0 + 1.0],
        "teacher_power": [4 / 5 + 4 / 1e-6, 2 / 2 + 1 / 16],
        "per_layer_mean": [4.0, 1.5],
    }
    for scale, losses in expected.items():
        objective = make_objective(student, teacher, feature_scale=scale)
        objective.pairs = (TapPair("block", "a", "A"), TapPair("block", "b", "B"))
        found = objective.feature_loss(*features, like=torch.zeros(2))
        assert found.tolist() == pytest.approx(losses)
    with pytest.raises(
        RecipeError, match=r"taps 'block': a of the student puts out \(2, 2\), A of the teacher"
    ):
        objective.feature_loss(
            features[0], {"A": torch.zeros(2, 3), "B": torch.zeros(2, 1)}, like=torch.zeros(2)
        )


def gradients(objective: DistillationObjective) -> list[Tensor]:
    objective.zero_grad()
    objective(make_batch()).per_sample.mean().backward()
    return [weight.grad for weight in objective.trained.parameters()]


def test_gradient_checkpointing_changes_no_gradient() -> None:
    """The hooks fire again in the backward pass, and what they then see is let go."""
    objective = make_objective(task_weight=0.0, output_weight=0.0)
    plain = gradients(objective)
    unet: Any = objective.trained["unet"]
    calls: list[int] = []
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.register_forward_hook(lambda *_: calls.append(1))
    unet.enable_gradient_checkpointing()
    for ours, theirs in zip(gradients(objective), plain, strict=True):
        assert torch.equal(ours, theirs)
    assert len(calls) == 2, "it was computed twice"
    assert any(gradient.abs().max() > 0 for gradient in plain)


def test_reentrant_checkpointing_is_refused_instead_of_losing_the_features() -> None:
    objective = make_objective()
    unet: Any = objective.trained["unet"]

    def reentrant(module: nn.Module, *inputs: Any) -> Any:
        return checkpoint(module.__call__, *inputs, use_reentrant=True)

    unet.enable_gradient_checkpointing(reentrant)
    with pytest.raises(
        RecipeError, match=r"no gradient reaches 11 of the student's 13 taps.*use_reentrant=False"
    ):
        objective(make_batch())
    with torch.no_grad():
        assert objective(make_batch()).per_sample.isfinite().all(), "nothing is lost where nothing is trained"


def test_the_teacher_is_only_read() -> None:
    objective = make_objective(teacher=make_teacher().train())
    teacher = objective.frozen["teacher"]
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    assert not teacher.training
    objective.train()
    assert objective.trained["unet"].training
    assert not any(module.training for module in teacher.modules())
    asked: list[Tensor] = []
    teacher.register_forward_hook(lambda module, inputs, output: asked.append(output[0]))
    objective(make_batch()).per_sample.sum().backward()
    (output,) = asked
    assert not output.requires_grad
    assert not output.is_inference()
    assert all(weight.grad is None and not weight.requires_grad for weight in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert set(objective.trained) == {"unet"}


def test_the_teacher_rests_where_nothing_is_asked_of_it() -> None:
    objective = make_objective(output_weight=0.0, feature_weight=0.0)
    objective.frozen["teacher"].register_forward_pre_hook(lambda *_: pytest.fail("asked"))
    alone = NoiseObjective(objective.trained["unet"], SCHEDULE, Conditioning(SMALL_SDXL), seed=0)
    assert torch.equal(objective(make_batch()).per_sample, alone(make_batch()).per_sample)


def int8(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(teacher, quantization.Int8WeightOnlyConfig())
    return teacher


@pytest.mark.parametrize(
    "change", [lambda teacher: teacher.to(torch.bfloat16), int8, lambda teacher: int8(teacher.bfloat16())]
)
def test_a_teacher_of_small_numbers_is_near_the_full_one(
    change: Callable[[UNet2DConditionModel], UNet2DConditionModel],
) -> None:
    student, batch = make_student(), make_batch()
    full = make_objective(copy.deepcopy(student))(batch).per_sample
    objective = make_objective(student, change(make_teacher().requires_grad_(False)))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = objective(batch).per_sample
        assert loss.dtype == torch.float32
        assert torch.allclose(loss, full, rtol=0.1)
        assert not torch.equal(loss, full)
    loss.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in student.parameters())


def test_the_teacher_computes_in_its_own_type_whatever_autocast_says() -> None:
    objective, batch = make_objective(), make_batch()
    z, t = batch.latents, torch.tensor([5, 500, 990])
    given = objective.conditioning(batch)
    plain = objective.ask_teacher(z, t, given)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = objective.ask_teacher(z, t, given)
    assert torch.equal(mixed.output, plain.output)
    assert all(torch.equal(mixed.features[name], plain.features[name]) for name in plain.features)
    objective.frozen.to(torch.bfloat16)
    features = objective.ask_teacher(z, t, given).features
    assert {feature.dtype for feature in features.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_in_the_thousands_are_squared_in_float32(dtype: torch.dtype) -> None:
    """1000^2 is beyond float16. The features' biases set them 2000 apart, so that the loss is known."""
    student, teacher = make_student(shaken=0.0), make_teacher()
    for network, value in ((student, 1000.0), (teacher, -1000.0)):
        for name, module in network.named_modules():
            if name.endswith("attn1"):
                nn.init.constant_(module.to_out[0].bias, value)
    objective = make_objective(student, teacher.to(dtype), taps=("self_attention",))
    batch = make_batch()
    with torch.autocast("cpu", dtype):
        terms = objective.terms(
            batch.latents,
            objective.draw_times(batch.index),
            keyed_normal(0, "noise", batch.index, (4, 8, 8)),
            objective.conditioning(batch),
        )
    assert all(term.isfinite().all() for term in terms)
    assert torch.allclose(terms.feature, torch.full((3,), len(objective.pairs) * 2000.0**2), rtol=0.02)
    sum(terms).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in student.parameters())


def test_times_are_drawn_as_asked() -> None:
    index, student, teacher = torch.arange(4000), make_student(), make_teacher()
    drawn = {
        kind: make_objective(student, teacher, timesteps=kind, taps=()).draw_times(index)
        for kind in ("uniform", "teacher_grid", "mixed")
    }
    grid = torch.tensor([999, 749, 499, 249])
    assert drawn["uniform"].unique().numel() > 900
    assert drawn["uniform"].float().mean().item() == pytest.approx(499.5, abs=15)
    values, counts = drawn["teacher_grid"].unique(return_counts=True)
    assert values.tolist() == [249, 499, 749, 999]
    assert ((counts - 1000).abs() < 100).all()
    on_grid = drawn["mixed"] == drawn["teacher_grid"]
    assert on_grid.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(drawn["mixed"][~on_grid], drawn["uniform"][~on_grid])
    assert torch.isin(drawn["mixed"][on_grid], grid).all()
    assert on_grid[drawn["uniform"] < 500].float().mean().item() == pytest.approx(0.5, abs=0.04), (
        "independent"
    )
    again = make_objective(student, teacher, timesteps="mixed", taps=()).draw_times(index[1000:1100])
    assert torch.equal(again, drawn["mixed"][1000:1100])
    eight = make_objective(student, teacher, timesteps="teacher_grid", teacher_steps=8, taps=())
    assert eight.draw_times(index).unique().numel() == 8


def test_the_noise_level_reported_is_that_of_the_time() -> None:
    objective, batch = make_objective(timesteps="teacher_grid", weight="min_snr"), make_batch()
    t = objective.draw_times(batch.index)
    abar = SCHEDULE.alphas_cumprod[t]
    level = objective(batch).noise_level
    assert torch.allclose(level, ((1 - abar) / abar).log() / 2, atol=1e-5)


def test_a_weight_holds_for_task_and_output() -> None:
    student, teacher, batch = make_student(), make_teacher(), make_batch()
    plain, weighted = (make_objective(student, teacher, weight=kind) for kind in ("none", "min_snr"))
    t, noise = torch.tensor([5, 500, 990]), keyed_normal(0, "noise", batch.index, (4, 8, 8))
    given = plain.conditioning(batch)
    first, second = (each.terms(batch.latents, t, noise, given) for each in (plain, weighted))
    weight = SCHEDULE.weight(t, "min_snr")
    assert weight[0] < 0.1
    assert torch.allclose(second.task, weight * first.task)
    assert torch.allclose(second.output, weight * first.output)
    assert torch.equal(second.feature, first.feature)


def test_what_is_looked_at_draws_nothing_of_the_run_s() -> None:
    """`loss_at` and `teacher_error_at` against direct calls; captions kept, the same noise for any seed."""
    student, teacher, batch = make_student(), make_teacher(), make_batch()
    objective = make_objective(student, teacher, caption_drop=0.9, seed=4)
    level = torch.tensor([-1.0, 0.5, 2.0])
    t, noise = SCHEDULE.nearest(level), held_out_noise(batch)
    z, given = SCHEDULE.add_noise(batch.latents, noise, t), Conditioning(SMALL_SDXL)(batch)
    with torch.no_grad():
        ours, theirs = (network(z, t, **given).sample for network in (student, teacher))
        assert torch.allclose(objective.loss_at(batch, level), (ours - noise).square().mean(dim=(1, 2, 3)))
        distance = (ours - theirs).square().mean(dim=(1, 2, 3))
        assert torch.allclose(objective.teacher_error_at(batch, level), distance)
    assert student.training


def test_a_student_without_the_mid_block_learns_without_its_taps() -> None:
    objective = make_objective(spec=KOALA_700M)
    assert len(objective.pairs) == 9 + 2
    assert all(gradient is not None for gradient in gradients(objective))


def test_unknown_words_are_refused() -> None:
    student, teacher = make_student(), make_teacher()
    with pytest.raises(
        RecipeError, match=r"objective.feature_scale 'big': unknown. Use none, teacher_power, per"
    ):
        make_objective(student, teacher, feature_scale="big")
    with pytest.raises(
        RecipeError, match=r"objective.timesteps 'late': unknown. Use uniform, teacher_grid, mixed"
    ):
        make_objective(student, teacher, timesteps="late")
    with pytest.raises(RecipeError, match=r"objective.weight_cap 5: has no effect"):
        make_objective(student, teacher, weight_cap=5.0)


def test_a_few_step_network_is_no_teacher() -> None:
    """Told no guidance, it would answer all the same, and teach something that nobody asked for."""
    with pytest.raises(RecipeError, match="the network that it was distilled from"):
        make_objective(teacher=with_guidance_embedding(make_teacher()))


def train(objective: DistillationObjective, steps: range) -> list[float]:
    """Steps of plain gradient descent, two images each."""
    losses = []
    for step in steps:
        objective.zero_grad()
        loss = objective(make_batch(2, first=2 * step)).per_sample.mean()
        loss.backward()
        with torch.no_grad():
            for weight in objective.trained.parameters():
                weight -= 0.01 * weight.grad
        losses.append(loss.item())
    return losses


def test_a_run_in_two_halves_is_the_run_in_one() -> None:
    """Bit for bit, with nothing carried over but the student's weights."""
    options: dict[str, Any] = {"timesteps": "mixed", "caption_drop": 0.5, "feature_scale": "teacher_power"}
    whole = make_objective(**options)
    losses = train(whole, range(4))
    first = make_objective(**options)
    begun = train(first, range(2))
    torch.manual_seed(99)
    second = make_objective(make_student(shaken=0.3), **options)
    second.trained.load_state_dict(first.trained.state_dict())
    assert begun + train(second, range(2, 4)) == losses
    for ours, theirs in zip(second.trained.parameters(), whole.trained.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_one_batch_is_learned_by_heart() -> None:
    """A fresh student, all three losses, on images that the teacher denoises (nearly) without an error.

    Those are x_0 = F_T(z_t(x_0)): where a teacher is wrong, task and output loss cannot both vanish.
    """
    torch.manual_seed(0)
    student = UNet2DConditionModel(**student_config(SMALL_SDXL, KOALA_1B))
    schedule = NoiseSchedule(SCHEDULE.alphas_cumprod, "sample")
    pairs = tap_pairs(dict(student.config), SMALL_SDXL, KOALA_1B, KOALA_TAPS)
    conditioning = Conditioning(SMALL_SDXL)
    objective = DistillationObjective(student, make_teacher(), schedule, conditioning, pairs, seed=0)
    batch = make_batch(2)
    t, noise = objective.draw_times(batch.index), keyed_normal(0, "noise", batch.index, (4, 8, 8))
    for _ in range(10):
        z = schedule.add_noise(batch.latents, noise, t)
        batch = replace(batch, latents=objective.ask_teacher(z, t, conditioning(batch)).output)
    optimizer = torch.optim.Adam(objective.trained.parameters(), 1e-2)
    start = objective(batch).per_sample.mean().item()
    for _ in range(200):
        loss = objective(batch).per_sample.mean()
        if loss.item() < 0.1 * start:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"{loss.item()} of {start} is left")


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(
    launch: Callable[..., list[Any]], tmp_path: Path, root: Path
) -> None:
    """Replicated and sharded, with gradient checkpointing, every draw on."""
    kinds = ("ddp", "fsdp2")
    out = tmp_path / "found.pt"
    done = launch(2, Path(steps_of_many.__file__), out, *kinds, cwd=tmp_path, PYTHONPATH=str(root))
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    found, alone = torch.load(out), steps_of_many.losses(ALONE, "ddp")
    for kind in kinds:
        assert torch.allclose(torch.tensor(found[kind]), torch.tensor(alone), rtol=1e-4), kind
    assert alone[0] != pytest.approx(alone[1], rel=1e-2)
