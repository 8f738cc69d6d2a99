"""Few-step students, against diffusers' schedulers and pipelines, transcriptions and a closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from shoestring.distill.few_step import (
    LcmObjective,
    boundary_scalings,
    ddim_step,
    phase_edges,
    pseudo_huber,
    solver_grid,
)
from shoestring.errors import RecipeError
from shoestring.interfaces import Batch
from shoestring.models.unet_guidance import guidance_embedding, with_guidance_embedding
from shoestring.models.unet_lora_training import add_lora, lora_state, merged
from shoestring.objectives.noise import Conditioning, NoiseSchedule
from shoestring.processes import ALONE
from shoestring.runtime import keyed_normal, keyed_uniform
from shoestring.training.ema import EMA
from shoestring.training.optimizers import Optimizers, OptimizerSettings, make_optimizers
from tests.distill import few_steps_of_many
from tests.distill.small_sdxl import BETAS, CONFIG, TEXT, given, make_batch, make_pipeline, make_unet

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SEED = 5


def schedule(prediction: str = "epsilon") -> NoiseSchedule:
    return NoiseSchedule.from_config({**BETAS, "prediction_type": prediction})


def make_objective(
    unet: nn.Module | None = None, *, prediction: str = "epsilon", **options: Any
) -> LcmObjective:
    """A student with a guidance embedding (unless one is given) and the teacher it was made from."""
    if unet is None:
        unet = awake(with_guidance_embedding(make_unet(), 16))
    conditioning = Conditioning(CONFIG, seed=SEED)
    return LcmObjective(unet, make_unet(), schedule(prediction), conditioning, seed=SEED, **options)


def awake(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The student away from its teacher, its guidance embedding heeded."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in unet.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return unet


def untold(batch: Batch) -> dict[str, Any]:
    """SDXL's unconditional input: zeros."""
    zeros = {"text_embeds": torch.zeros_like(batch.extra["pooled"])}
    told = given(batch)
    return {
        "encoder_hidden_states": torch.zeros_like(batch.text),
        "added_cond_kwargs": {**told["added_cond_kwargs"], **zeros},
    }


def ddim(prediction: str, steps: int) -> DDIMScheduler:
    """diffusers' solver on the same grid: it ends at abar_0."""
    theirs = DDIMScheduler(
        **BETAS,
        prediction_type=prediction,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    theirs.set_timesteps(steps)
    return theirs


# --- the maths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_solver_step_is_diffusers_ddim(prediction: str, steps: int) -> None:
    ours, theirs, grid = schedule(prediction), ddim(prediction, steps), solver_grid(1000, steps)
    assert theirs.timesteps.tolist() == grid.flip(0).tolist()
    z, output = torch.randn(2, steps, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    found = ddim_step(ours, output, z, grid, torch.cat([torch.zeros(1, dtype=torch.long), grid[:-1]]))
    for number, t in enumerate(grid.tolist()):
        expected = theirs.step(output[number], t, z[number]).prev_sample
        assert torch.allclose(found[number], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [7, 50, 1000])
def test_the_grid_is_that_of_the_samplers(steps: int) -> None:
    theirs = LCMScheduler(original_inference_steps=steps)
    theirs.set_timesteps(steps)
    assert solver_grid(1000, steps).tolist() == theirs.timesteps.flip(0).tolist()


@pytest.mark.parametrize("phases", range(1, 13))
def test_phases_end_where_the_next_step_of_the_sampler_begins(phases: int) -> None:
    theirs, grid = TCDScheduler(original_inference_steps=50), solver_grid(1000, 50)
    theirs.set_timesteps(phases)
    starts = theirs.timesteps.tolist()
    expected = [next((start for start in starts if start < t), 0) for t in grid.tolist()]
    assert phase_edges(grid, phases).tolist() == expected


@pytest.mark.parametrize("scaling", [10.0, 3.0])
def test_boundary_scalings_are_the_schedulers(scaling: float) -> None:
    theirs, times = LCMScheduler(timestep_scaling=scaling), torch.tensor([0, 1, 19, 499, 999])
    c_skip, c_out = boundary_scalings(times, timestep_scaling=scaling)
    expected = torch.tensor([theirs.get_scalings_for_boundary_condition_discrete(t) for t in times.tolist()])
    assert torch.allclose(torch.stack([c_skip, c_out], dim=1), expected, atol=1e-7)
    assert (c_skip[0], c_out[0]) == (1, 0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("phases", [1, 4])
def test_at_the_end_of_its_way_the_function_is_the_identity(phases: int, prediction: str) -> None:
    objective, batch = make_objective(prediction=prediction, phases=phases), make_batch(4)
    step = torch.tensor([0, 13, 25, 49])
    w = torch.full((4,), 5.0)
    unet, end = objective.trained["unet"], objective.edges[step]
    with torch.no_grad():
        found = objective.consistent(unet, batch.latents, end, step, w, given(batch))
        before = objective.consistent(unet, batch.latents, objective.grid[step], step, w, given(batch))
    assert torch.allclose(found, batch.latents, atol=2e-5)
    assert (before - batch.latents).abs().mean() > 0.01


def test_pseudo_huber_is_square_near_zero_and_absolute_far_off() -> None:
    error = torch.tensor([[1e-5, -1e-5], [3.0, -5.0]], dtype=torch.float16)
    near, far = pseudo_huber(error, 1e-3)
    assert near == pytest.approx(0.5 * float(error[0, 0]) ** 2 / 1e-3, rel=0.05)
    assert far == pytest.approx(4.0 - 1e-3, rel=1e-4)


# --- the teacher's step and the loss -----------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_teachers_step_is_a_guided_pipelines(prediction: str) -> None:
    """guidance_scale = w + 1, as StableDiffusionXLPipeline guides, then diffusers' DDIM."""
    objective, batch, theirs = make_objective(prediction=prediction), make_batch(3), ddim(prediction, 50)
    step, w = torch.tensor([0, 20, 49]), torch.tensor([3.0, 7.5, 15.0])
    found = objective.teacher_step(batch.latents, step, w, given(batch), untold(batch))
    teacher, t = objective.frozen["teacher"], objective.grid[step]
    with torch.no_grad():
        conditional = teacher(batch.latents, t, **given(batch)).sample
        unconditional = teacher(batch.latents, t, **untold(batch)).sample
    guided = unconditional + (w + 1)[:, None, None, None] * (conditional - unconditional)
    for row in range(3):
        expected = theirs.step(guided[row], int(t[row]), batch.latents[row]).prev_sample
        assert torch.allclose(found[row], expected, atol=2e-5, rtol=1e-4)


def test_the_walk_is_a_guided_pipelines_whole_loop() -> None:
    objective, batch, theirs = make_objective(solver_steps=5), make_batch(2), ddim("epsilon", 5)
    w, step = torch.tensor([2.0, 4.0]), torch.tensor([4, 2])
    found = objective.walk(batch.latents, step, w, given(batch), untold(batch))
    expected = batch.latents
    for number, t in reversed(list(enumerate(objective.grid.tolist()))):
        with torch.no_grad():
            conditional = objective.frozen["teacher"](expected, t, **given(batch)).sample
            unconditional = objective.frozen["teacher"](expected, t, **untold(batch)).sample
        guided = unconditional + (w + 1)[:, None, None, None] * (conditional - unconditional)
        moved = theirs.step(guided, t, expected).prev_sample
        expected = torch.where((number <= step)[:, None, None, None], moved, expected)
    assert torch.allclose(found, expected, atol=1e-4)


def reference_loss(objective: LcmObjective, batch: Batch) -> Tensor:
    """The published loss, image by image, by diffusers' DDIMScheduler and LCMScheduler."""
    prediction, student = objective.schedule.prediction, objective.trained["unet"]
    target = objective.trained["target" if "target" in objective.trained else "unet"]
    solver, sampler = ddim(prediction, 50), LCMScheduler(**BETAS, prediction_type=prediction)
    sampler.set_timesteps(50)
    times = (keyed_uniform(SEED, "noise_level", batch.index) * 50).long() * 20 + 19
    ws = 3 + 12 * keyed_uniform(SEED, "guidance", batch.index)
    noise = keyed_normal(SEED, "noise", batch.index, batch.latents.shape[1:])
    losses = []
    for row, (t, w) in enumerate(zip(times.tolist(), ws, strict=True)):
        one = next(part for number, part in enumerate(batch.parts(len(batch))) if number == row)
        told = {**given(one), "timestep_cond": guidance_embedding(w[None], 16)}

        def follow(network: Any, z: Tensor, t: int, told: Mapping[str, Any] = told) -> Tensor:
            sampler._step_index = 0
            return sampler.step(network(z, t, **told).sample, t, z).denoised

        z = solver.add_noise(one.latents, noise[row : row + 1], torch.tensor([t]))
        with torch.no_grad():
            teacher: Any = objective.frozen["teacher"]
            conditional = teacher(z, t, **given(one)).sample
            guided = conditional + w * (conditional - teacher(z, t, **untold(one)).sample)
            below = follow(target, solver.step(guided, t, z).prev_sample, max(t - 20, 0))
        error = follow(student, z, t) - below
        c = objective.huber_c
        square = error.square()
        losses.append((square if objective.loss == "l2" else (square + c**2).sqrt() - c).mean())
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("prediction", "loss", "target_decay"),
    [
        ("epsilon", "huber", 0.0),
        ("epsilon", "l2", 0.9),
        ("v_prediction", "huber", 0.9),
        ("sample", "l2", 0.0),
    ],
)
def test_the_loss_and_its_gradient_are_the_published_ones(
    prediction: str, loss: str, target_decay: float
) -> None:
    objective = make_objective(prediction=prediction, loss=loss, target_decay=target_decay)
    if target_decay:
        awake(objective.trained["target"])  # so that it is not the student
    batch, weights = make_batch(3), list(objective.trained["unet"].parameters())
    found = objective(batch)
    expected = reference_loss(objective, batch)
    assert torch.allclose(found.per_sample, expected, rtol=2e-3, atol=1e-5)
    ours = torch.autograd.grad(found.per_sample.sum(), weights)
    theirs = torch.autograd.grad(expected.sum(), weights)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm() + 1e-5
    t = (keyed_uniform(SEED, "noise_level", batch.index) * 50).long() * 20 + 19
    assert torch.equal(found.noise_level, objective.schedule.log_sigma(t))


@pytest.mark.parametrize("phases", [1, 4])
def test_an_images_loss_does_not_depend_on_its_batch(phases: int) -> None:
    objective = make_objective(phases=phases)
    together = objective(make_batch(5)).per_sample
    apart = torch.cat([objective(part).per_sample for part in make_batch(5).parts(3)])
    assert torch.allclose(together, apart, rtol=1e-4, atol=1e-6)


def test_w_and_the_steps_are_spread_over_their_ranges() -> None:
    objective, seen = make_objective(guidance=(3.0, 15.0)), []
    objective.target = lambda z, step, w, *_: seen.append((step, w)) or z  # type: ignore[method-assign]
    for first in range(0, 4096, 512):
        objective.consistent = lambda unet, z, *_: z  # type: ignore[method-assign]
        objective(make_batch(512, first))
    step, w = (torch.cat(part) for part in zip(*seen, strict=True))
    assert (step.bincount(minlength=50) > 4096 / 50 / 2).all()
    assert step.max() == 49
    assert w.min() < 3.1
    assert w.max() > 14.9
    assert abs(w.mean() - 9) < 0.2


def test_the_teacher_stays_as_it_is_and_is_never_in_training_mode() -> None:
    objective = make_objective().train()
    before = {name: tensor.clone() for name, tensor in objective.frozen.state_dict().items()}
    objective(make_batch()).per_sample.mean().backward()
    assert not objective.frozen["teacher"].training
    assert objective.trained["unet"].training
    assert all(weight.grad is None for weight in objective.frozen.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in objective.frozen.state_dict().items())


def test_without_guidance_the_teacher_is_asked_once() -> None:
    objective, asked = make_objective(make_unet(), guidance=(0.0, 0.0)), []
    objective.frozen["teacher"].register_forward_hook(lambda *_: asked.append(1))
    objective(make_batch())
    assert len(asked) == 1


def test_under_autocast_every_weight_still_has_a_gradient() -> None:
    """The weights that autocast keeps from the target's pass, made without gradients, must not lose them."""
    objective, batch = make_objective(), make_batch(8)
    weights = dict(objective.trained["unet"].named_parameters())
    exact = torch.autograd.grad(objective(batch).per_sample.mean(), list(weights.values()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(batch).per_sample.mean()
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, list(weights.values()))
    ours, theirs = (torch.cat([tensor.flatten() for tensor in gradients]) for gradients in (found, exact))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.8


def test_a_teacher_in_bfloat16_says_nearly_the_same() -> None:
    objective, batch = make_objective(guidance=(3.0, 3.0)), make_batch()
    exact = objective(batch).per_sample
    objective.frozen["teacher"].to(torch.bfloat16)
    assert torch.allclose(objective(batch).per_sample, exact, rtol=0.2)


# --- the target, and resuming ------------------------------------------------------------------------------


def train(objective: LcmObjective, optimizers: Optimizers, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        optimizers.set_lr(1e-3)
        optimizers.zero_grad()
        objective(make_batch(2, 2 * step)).per_sample.mean().backward()
        optimizers.step()
        objective.after_step()


def optimizers_of(objective: LcmObjective) -> Optimizers:
    return make_optimizers(objective.trained, OptimizerSettings())


@pytest.mark.parametrize("target_decay", [0.0, 0.9])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(target_decay: float) -> None:
    unbroken = make_objective(target_decay=target_decay)
    train(unbroken, optimizers_of(unbroken), 0, 2)
    first = make_objective(target_decay=target_decay)
    before = optimizers_of(first)
    train(first, before, 0, 1)
    saved = {name: tensor.clone() for name, tensor in first.trained.state_dict().items()}
    moments = {name: tensor.clone() for name, tensor in before.state().items()}
    second = make_objective(with_guidance_embedding(make_unet(7), 16), target_decay=target_decay)
    after = optimizers_of(second)
    second.trained.load_state_dict(saved)
    after.prepare(list(moments))
    for name, tensor in after.state().items():
        tensor.copy_(moments[name])
    train(second, after, 1, 1)
    for name, tensor in unbroken.trained.state_dict().items():
        assert torch.equal(second.trained.state_dict()[name], tensor), name


def test_the_target_is_an_average_that_nobody_optimises() -> None:
    objective = make_objective(target_decay=0.9)
    optimizers, expected = optimizers_of(objective), None
    optimised = {id(parameter) for parameter in optimizers.parameters()}
    assert optimised == {id(parameter) for parameter in objective.trained["unet"].parameters()}
    for step in range(3):
        if expected is None:
            expected = {name: w.detach().clone() for name, w in objective.trained["unet"].named_parameters()}
        train(objective, optimizers, step, 1)
        for name, weight in objective.trained["unet"].named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * weight.detach()
    assert expected is not None
    for name, weight in objective.trained["target"].named_parameters():
        assert torch.allclose(weight, expected[name], atol=1e-7), name
    averaged = EMA(objective.trained, [0.9]).average(0)
    assert all(name.startswith("unet.") for name in averaged)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_student_and_target_as_one_does(
    kind: str, launch: Callable[..., list[Any]], root: Path, tmp_path: Path
) -> None:
    script = Path(few_steps_of_many.__file__)
    done = launch(2, script, tmp_path / "found.pt", kind, cwd=tmp_path, PYTHONPATH=str(root))
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    found, alone = torch.load(tmp_path / "found.pt", weights_only=True), few_steps_of_many.train(ALONE)
    assert found.keys() == alone.keys()
    for name, tensor in alone.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name


def test_losses_to_look_at_have_their_closed_forms() -> None:
    """`loss_at` is against the image as f leaves it, `teacher_error_at` against the teacher's walk."""
    objective, batch = make_objective(solver_steps=10, phases=2), make_batch(3)
    told, noise = given(batch), keyed_normal(0, "held_out_noise", batch.index, (4, 8, 8))
    step, edge = torch.tensor([0, 4, 9]), torch.tensor([0, 0, 499])
    level = objective.schedule.log_sigma(objective.grid[step]) + 0.01
    z = objective.schedule.add_noise(batch.latents, noise, objective.grid[step])
    image = objective.schedule.add_noise(batch.latents, noise, edge)
    with torch.no_grad():
        for w, wanted, found in (
            (3.0, image, objective.loss_at(batch, level)),
            (
                9.0,
                objective.walk(z, step, torch.full((3,), 9.0), told, untold(batch)),
                objective.teacher_error_at(batch, level),
            ),
        ):
            unet, ws = objective.trained["unet"], torch.full((3,), w)
            one = objective.consistent(unet, z, objective.grid[step], step, ws, told)
            assert torch.allclose(found, (one - wanted).square().flatten(1).mean(1), rtol=1e-4)


def test_a_run_is_looked_at_without_its_teacher() -> None:
    objective = make_objective()
    expected = objective.loss_at(make_batch(), torch.zeros(4))
    objective.frozen.to_empty(device="meta")
    assert torch.equal(objective.loss_at(make_batch(), torch.zeros(4)), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver_steps": 2000}, "solver_steps 2000: the teacher's schedule has 1000 steps. Use 1 to 1000"),
        ({"phases": 51}, "phases 51: use 1 to solver_steps, here 50"),
        ({"loss": "l1"}, "loss 'l1': unknown. Use huber or l2"),
        ({"guidance": (9.0, 3.0)}, "guidance 9 to 3: give two numbers from 0 up, rising"),
        ({"unet": make_unet()}, "guidance 3 to 15: this student has no guidance embedding"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_a_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_objective(**options)


def test_a_few_step_network_is_no_teacher() -> None:
    few_step = with_guidance_embedding(make_unet())
    with pytest.raises(RecipeError, match="the network that it was distilled from"):
        LcmObjective(make_unet(), few_step, schedule(), Conditioning(CONFIG), seed=0, guidance=(7.0, 7.0))


# --- in stock pipelines ------------------------------------------------------------------------------------


def sample(pipeline: StableDiffusionXLPipeline, **options: Any) -> Tensor:
    return pipeline(
        "a red fox",
        num_inference_steps=4,
        height=8,
        width=8,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
        **options,
    ).images


def encoded(pipeline: StableDiffusionXLPipeline) -> dict[str, Any]:
    text, _, pooled, _ = pipeline.encode_prompt("a red fox", do_classifier_free_guidance=False)
    ids = torch.tensor([[8, 8, 0, 0, 8, 8]]).float()
    return {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("embedded", [True, False])
def test_a_trained_student_runs_in_the_stock_pipeline_as_it_was_trained(
    embedded: bool, prediction: str, tmp_path: Path
) -> None:
    """Four steps of StableDiffusionXLPipeline with LCMScheduler are f and fresh noise, four times."""
    unet = None if embedded else awake(make_unet())
    objective = make_objective(unet, prediction=prediction, guidance=(3.0, 15.0) if embedded else (7.0, 7.0))
    train(objective, optimizers_of(objective), 0, 2)
    objective.trained["unet"].save_pretrained(tmp_path)
    student = UNet2DConditionModel.from_pretrained(tmp_path)
    pipeline = make_pipeline(student, LCMScheduler(**BETAS, prediction_type=prediction))
    found = sample(pipeline, guidance_scale=8.0 if embedded else 1.0)
    generator = torch.Generator().manual_seed(11)
    z = torch.randn(1, 4, 8, 8, generator=generator)
    told, times = encoded(pipeline), [999, 759, 499, 259]
    for t, after in zip(times, [*times[1:], None], strict=True):
        with torch.no_grad():
            step = torch.tensor([(t + 1) // 20 - 1])
            z = objective.consistent(student, z, torch.tensor([t]), step, torch.tensor([7.0]), told)
        if after is not None:
            noise = torch.randn(z.shape, generator=generator)
            z = objective.schedule.add_noise(z, noise, torch.tensor([after]))
    assert torch.allclose(found, z, atol=1e-3, rtol=1e-3)


def test_a_student_in_phases_runs_in_the_stock_pipeline_as_it_was_trained() -> None:
    """Four steps with TCDScheduler, whose eta the pipeline sets to 0, lead from edge to edge."""
    objective = make_objective(phases=4)
    train(objective, optimizers_of(objective), 0, 2)
    pipeline = make_pipeline(objective.trained["unet"].eval(), TCDScheduler(**BETAS))
    found = sample(pipeline, guidance_scale=8.0)
    z, told = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(11)), encoded(pipeline)
    for t in (999, 759, 499, 259):
        step = torch.tensor([(t + 1) // 20 - 1])
        with torch.no_grad():
            z = objective.consistent(
                objective.trained["unet"], z, torch.tensor([t]), step, torch.tensor([7.0]), told
            )
    assert torch.allclose(found, z, atol=1e-3, rtol=1e-3)


def test_an_adapter_learns_by_itself_and_runs_in_the_stock_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    objective = make_objective(add_lora(make_unet(), 4), guidance=(7.0, 7.0))
    unet = objective.trained["unet"]
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    train(objective, optimizers_of(objective), 0, 3)
    changed = {name for name, tensor in unet.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed
    assert all("lora_" in name for name in changed)
    folded = sample(make_pipeline(merged(unet), LCMScheduler(**BETAS)), guidance_scale=1.0)
    stock = make_pipeline(make_unet(), LCMScheduler(**BETAS))
    plain = sample(stock, guidance_scale=1.0)
    layers = {name.removeprefix("unet."): tensor for name, tensor in lora_state(unet).items()}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert torch.allclose(sample(stock, guidance_scale=1.0), folded, atol=1e-3, rtol=1e-3)
    assert (folded - plain).abs().max() > 1e-2


# --- it works: a teacher in closed form --------------------------------------------------------------------

KINDS, SPREAD = 4, 0.25


class Mixture(nn.Module):
    """The best denoiser of images N(m_k, SPREAD^2) for kinds k: given k, and without it (text all zero)."""

    def __init__(self) -> None:
        super().__init__()
        self.config = dict(CONFIG)
        centres = torch.randn(KINDS, 4, 1, 1, generator=torch.Generator().manual_seed(2))
        self.centres = nn.Parameter(centres)
        self.schedule = schedule()

    def forward(
        self, z: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool, **_: Any
    ) -> tuple[Tensor]:
        abar = self.schedule.alphas_cumprod[t][:, None, None, None]
        kinds = encoder_hidden_states[:, 0, :KINDS]
        variance = abar * SPREAD**2 + 1 - abar
        distance = (z[:, None] - abar[:, None].sqrt() * self.centres).square().flatten(2).sum(2)  # (B, K)
        posterior = (-distance / (2 * variance.flatten()[:, None])).softmax(1)
        known = kinds.sum(1, keepdim=True) > 0
        mean = torch.einsum("bk,kchw->bchw", torch.where(known, kinds, posterior), self.centres)
        return ((1 - abar).sqrt() * (z - abar.sqrt() * mean) / variance,)


class Corrected(nn.Module):
    """The teacher and a small network that corrects it, by nothing at first: a student with a good start."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {**CONFIG, "time_cond_proj_dim": None}
        self.teacher = Mixture().requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.correction = nn.Sequential(
                nn.Linear(4 + KINDS + 8, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 4)
            )
        nn.init.zeros_(self.correction[-1].weight)

    def forward(self, z: Tensor, t: Tensor, **told: Any) -> tuple[Tensor]:
        (output,) = self.teacher(z, t, **told)
        kinds = told["encoder_hidden_states"][:, 0, :KINDS]
        phase = (t.float() / 1000)[:, None] * torch.pi * torch.tensor([0.5, 1, 2, 4])
        known = torch.cat([kinds, phase.sin(), phase.cos()], dim=1)[:, None, None].expand(
            -1, *z.shape[2:], -1
        )
        change = self.correction(torch.cat([z.movedim(1, -1), known], dim=-1)).movedim(-1, 1)
        return (output + change,)


def drawn(count: int, first: int = 0) -> Batch:
    """Images of the mixture (count, 4, 2, 2), their kinds as one-hot text."""
    index = torch.arange(first, first + count)
    kinds = (keyed_uniform(SEED, "kind", index) * KINDS).long()
    text = torch.zeros(count, 2, TEXT)
    text[torch.arange(count), :, kinds] = 1.0
    images = Mixture().centres.detach()[kinds] + SPREAD * keyed_normal(SEED, "image", index, (4, 2, 2))
    extra = {"pooled": torch.zeros(count, 12), "size_crop": torch.zeros(count, 6)}
    return Batch(index=index, latents=images, text=text, text_mask=None, extra=extra)


def few_steps(objective: LcmObjective, follow: Any, steps: int) -> Tensor:
    """What `steps` steps of the sampler make of 512 noises, the same each time; `follow` takes (z, step)."""
    z = keyed_normal(1, "start", torch.arange(512), (4, 2, 2))
    times = [49 - 50 * number // steps for number in range(steps)]
    for number, step in enumerate(times):
        z = follow(z, torch.full((512,), step))
        if objective.phases == 1 and number + 1 < steps:
            noise = keyed_normal(1, f"fresh{number}", torch.arange(512), (4, 2, 2))
            z = objective.schedule.add_noise(z, noise, objective.grid[torch.full((512,), times[number + 1])])
    return z


def errors(objective: LcmObjective) -> dict[int, float]:
    """How far few-step samples are from those of the teacher, which walks each step's way in many."""
    batch = drawn(512)
    told, without = objective.conditioning(batch), objective.conditioning.unconditional(batch)
    w = torch.full((512,), objective.guidance[0])

    def exact(z: Tensor, step: Tensor) -> Tensor:
        return objective.walk(z, step, w, told, without)

    def learned(z: Tensor, step: Tensor) -> Tensor:
        return objective.consistent(objective.trained["unet"], z, objective.grid[step], step, w, told)

    with torch.no_grad():
        return {
            steps: float(
                (few_steps(objective, learned, steps) - few_steps(objective, exact, steps)).square().mean()
            )
            for steps in ((1, 2, 4) if objective.phases == 1 else (objective.phases,))
        }


def learn(options: dict[str, Any], steps: int = 300) -> tuple[dict[int, float], dict[int, float]]:
    """`errors` before and after a few seconds of training."""
    conditioning = Conditioning(CONFIG, seed=SEED)
    objective = LcmObjective(
        Corrected(), Mixture(), schedule(), conditioning, seed=SEED, guidance=(2.0, 2.0), **options
    )
    before = errors(objective)
    optimizer = torch.optim.Adam([w for w in objective.trained["unet"].parameters() if w.requires_grad])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        objective(drawn(64, 64 * step)).per_sample.mean().backward()
        optimizer.step()
        objective.after_step()
    return before, errors(objective)


@pytest.mark.parametrize("target_decay", [0.0, 0.8])
def test_few_steps_come_near_to_what_many_guided_steps_of_the_teacher_give(target_decay: float) -> None:
    """Unguided at first, the student learns guidance and all steps in one: 1 to 4 passes, not 100."""
    before, after = learn({"target_decay": target_decay})
    assert after[1] < before[1] / 8
    assert after[2] < 0.85 * before[2]
    assert after[4] < 0.95 * before[4]


def test_a_student_in_phases_follows_the_teachers_own_path() -> None:
    """Four passes without fresh noise end where the teacher's walk from the same noise ends."""
    before, after = learn({"phases": 4})
    assert after[4] < 0.6 * before[4]
