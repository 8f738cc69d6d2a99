"""Teachers and students through the command line: one recipe for all, exact resumes, stock pipelines."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook

import shoestring
from shoestring import build
from shoestring.build import koala
from shoestring.data.store import Store
from shoestring.models.unet_lora_training import merged
from shoestring.models.unet_students import StudentSpec, preset_spec, teacher_key
from shoestring.pipelines.calls import as_decoded
from shoestring.pipelines.generate import generate
from shoestring.pipelines.unet import UNetPipeline
from shoestring.recipes.load import load_recipe
from shoestring.storage import RunFolder
from shoestring.training.checkpoint import Checkpoint
from shoestring.training.optimizers import BOUNDARY, parameter_roles
from tests.cli.conftest import run as command_line

RECIPE = Path(__file__).with_name("students.yaml")
STAGES = ("teacher", "features", "lcm", "lora")
CPU = torch.device("cpu")
CUT = ("--set", "model={preset: null, layers_per_block: 1, depth: [1, 1, 1], mid: drop}")
SHORT = (
    *("--set", "phases=[{name: only, size: 32, images: 16, batch: 8, lr: 1.0e-3}]"),
    *("--set", "train={microbatch: null, checkpoint_every: 16, log_every: 8, preview_every: null}"),
    *("--set", "ema=null", "--set", "sampling={steps: 2}"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a teacher and three students were trained by one command; not to be changed."""
    folder = tmp_path_factory.mktemp("students")
    with contextlib.chdir(folder):
        assert command_line("train", RECIPE) == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to work in."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def store(empty: Path, captioned: Any, command: Any, sdxl_folder: Path) -> str:
    """A store that was encoded with a tiny SDXL's own encoders, below the working folder."""
    captioned(empty / "photos", 24)
    encoders = ("--autoencoder", sdxl_folder, "--text-encoder", sdxl_folder, "--pad", "encoder")
    said = command("encode", "photos", "--out", "s", "--size", 32, "--held-out", 4, *encoders)
    assert said.code == 0, said.err
    return "s"


def words(teacher: Path | str, encoders: Path, recipe: str = "koala-700m") -> tuple[Any, ...]:
    """Arguments of `train` for a recipe of SDXL's students and a tiny teacher."""
    sets = {
        "teacher": teacher,
        "data.store": "s",
        "data.autoencoder": encoders,
        "data.text_encoder": encoders,
    }
    return ("train", recipe, *(w for k, v in sets.items() for w in ("--set", f"{k}={v}")), *CUT, *SHORT)


def system_of(run: Path | str, *sets: str) -> Any:
    """What a run's recipe trains, with keys changed; the working folder is that of its stores."""
    recipe = load_recipe(RunFolder(Path(run)).recipe, sets)
    return build.system_of(recipe, build.open_store(recipe, device=CPU, log=print))


def tensors(run: Path, images: int) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds: weights, optimisers, averages, an averaged target."""
    return Checkpoint(run / f"checkpoints/{images:012d}", {}).tensors()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_resumes_bit_for_bit(stage: str, here: Path) -> None:
    """Kernels under Muon, dropped captions, mixed times, the target of a few-step student, an adapter."""
    run = here / f"runs/students-{stage}"
    unbroken = tensors(run, 40)
    for images in (32, 40):
        shutil.rmtree(run / f"checkpoints/{images:012d}")
    assert command_line("train", run, "--resume") == 0
    again = tensors(run, 40)
    assert again.keys() == unbroken.keys()
    assert all(torch.equal(again[name], unbroken[name]) for name in again)
    assert any("target" in name for name in again) == (stage == "lcm")


def test_every_kind_draws_is_measured_and_stands_beside_its_teacher(here: Path, command: Any) -> None:
    for stage in STAGES:
        run = f"runs/students-{stage}"
        assert command("sample", run, "a red circle", "--out", stage).code == 0
        assert command("evaluate", run).code == 0
        rows = json.loads((here / run / "evaluation.json").read_text())["rows"]
        found = {(row["metric"], row["facet"]): row["value"] for row in rows if row["split"] == "network"}
        metrics = {row["metric"] for row in rows}
        assert {"scene_accuracy", "held_out_loss"} <= metrics
        beside = {each for each in metrics if each.startswith(("teacher_", "cut_"))}
        of_teacher = {"teacher_scene_accuracy", "teacher_error"} if stage != "teacher" else set()
        of_cut = {"cut_scene_accuracy", "cut_teacher_error"} if stage == "features" else set()
        assert beside == of_teacher | of_cut
        told = "error to the teacher" in (here / run / "report.html").read_text()
        assert told == (stage != "teacher")
        if stage == "features":
            student = UNet2DConditionModel.from_pretrained(here / run / "pipeline/unet")
            teacher = UNet2DConditionModel.from_pretrained(here / "runs/students-teacher/pipeline/unet")
            assert found["parameters", "student"] == student.num_parameters()
            assert found["parameters", "teacher"] == teacher.num_parameters()
            assert found["forward_flops", "student"] < found["forward_flops", "teacher"]
            assert found["forward_ms", "student"] > 0
            report = (here / run / "report.html").read_text()
            assert "Beside its teacher" in report
            assert f"{student.num_parameters():,}" in report


def test_what_stands_beside_a_student_is_read_once(
    here: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For two held-out splits, pictures and times alike: a teacher is gigabytes on a disk."""
    read: list[str] = []

    def note(name: str) -> None:
        call = getattr(koala, name)
        monkeypatch.setattr(koala, name, lambda *words, **more: read.append(name) or call(*words, **more))

    note("load_unet")
    note("copy_weights")
    assert command("evaluate", "runs/students-features").code == 0
    assert sorted(read) == ["copy_weights", "load_unet"]


def test_the_teacher_beside_a_student_draws_as_it_does_alone(here: Path) -> None:
    """With its own scheduler, steps and guidance."""
    prompts, seeds = ["a red circle", "a blue square on a white background"], [3, 4]
    for stage, teacher in (("features", "teacher"), ("lcm", "features"), ("lora", "features")):
        beside = dict(system_of(f"runs/students-{stage}").references())
        expected = list(generate(shoestring.load(f"runs/students-{teacher}"), prompts, seeds))
        found = list(generate(beside["teacher"], prompts, seeds))
        assert found[0].scheduler == expected[0].scheduler != "LCMScheduler"
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one.image, other.image)


@pytest.mark.parametrize(("stage", "names"), [("features", ["teacher", "cut"]), ("lcm", [])])
def test_a_teacher_without_a_pipeline_draws_as_a_student_of_many_steps(
    stage: str, names: list[str], here: Path
) -> None:
    system = system_of(f"runs/students-{stage}", "teacher=runs/students-teacher/pipeline/unet")
    beside = dict(system.references())
    assert list(beside) == names
    assert all(type(each.scheduler).__name__ == "EulerDiscreteScheduler" for each in beside.values())


def test_networks_are_timed_in_one_number_type_whatever_the_teacher_trains_in(here: Path) -> None:
    run = RunFolder(Path("runs/students-features"))
    system = system_of(run.root, "objective.teacher_dtype=bfloat16")
    types = set()

    def note(module: Any, inputs: Any) -> None:
        if isinstance(module, UNet2DConditionModel):
            types.add((module.dtype, torch.is_autocast_enabled("cpu")))

    networks = system.opened(run).networks
    hook = register_module_forward_pre_hook(note)
    rows = system.network_rows(networks, CPU)
    hook.remove()
    assert types == {(torch.float32, False)}
    assert {row["facet"] for row in rows} == {"teacher", "student"}
    (part,) = system.parts(system.networks(system.recipe.phases[0]))
    assert part.objective.frozen["teacher"].dtype == torch.bfloat16


def test_signals_enter_and_leave_every_student_at_the_boundary(here: Path) -> None:
    """Where Muon takes kernels, those of the first and last convolution are AdamW's, few-step or not."""
    for stage in STAGES:
        system = system_of(f"runs/students-{stage}")
        roles = parameter_roles(system.networks(system.recipe.phases[0])["unet"])
        assert roles["conv_in.weight"] == roles["conv_out.weight"] == BOUNDARY


def test_previews_are_drawn_by_as_many_pixels_as_decode_at_once(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, run = system_of("runs/students-features"), RunFolder(Path("runs/other"))
    networks = system.networks(system.recipe.phases[0])
    drawn, counts = system.product(networks), []
    vae = drawn.pipeline.vae
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, **more: counts.append(len(z)) or decode(z, **more))
    for pixels, expected in ((1024**2, [8]), (3 * 32**2, [3, 3, 2]), (1, [1] * 8)):
        monkeypatch.setattr("shoestring.build.looks.PREVIEW_PIXELS", pixels)
        drawn.preview(run, 8, CPU)
        assert counts == expected
        counts.clear()


def test_an_adapter_is_folded_in_for_the_moment_alone(here: Path) -> None:
    """Beside the network and its adapter no second copy stays in memory from look to look."""
    system, run = system_of("runs/students-lora"), RunFolder(Path("runs/other"))
    networks = system.networks(system.recipe.phases[0])
    unet = networks["unet"].eval()
    unet.register_to_config(sample_size=99)  # a teacher's, of other pictures
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if ".lora_B." in name:
                weight.fill_(0.1)
    product = system.product(networks)
    for look in (lambda: product.export(run), lambda: product.preview(run, 8, CPU)):
        look()
        assert all(weight.is_meta for weight in product.drawn.pipeline.unet.parameters())
    exported = UNet2DConditionModel.from_pretrained(run.pipeline / "unet")
    assert exported.config.sample_size == system.store.latent_shape(32)[1]
    expected, found = merged(unet).state_dict(), exported.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_distilling_brings_the_student_nearer_to_its_teacher(here: Path, command: Any) -> None:
    """The figures are those of the exported weights: a run of no steps would stay where its cut is."""
    only = "{task_weight: 0, feature_weight: 0, taps: []}"  # the teacher of a few steps knows no task
    more = (
        *("--name", "longer", "--set", "stages.features.phases.0.images=640", "--set", "ema=null"),
        *("--set", f"stages.features.objective={only}"),
    )
    sets = ("--set", "stages.features.teacher=runs/students-teacher")
    assert command("train", RECIPE, "--stage", "features", *more, *sets).code == 0
    assert command("evaluate", "runs/longer-features").code == 0
    rows = json.loads((here / "runs/longer-features/evaluation.json").read_text())["rows"]
    for split in ("unseen_scenes", "unseen_pairs"):
        error = {r["metric"]: r["value"] for r in rows if (r["split"], r["facet"]) == (split, "all")}
        assert error["teacher_error"] < 0.9 * error["cut_teacher_error"]


def test_a_student_begins_with_its_teachers_weights_or_those_of_another_run(here: Path, command: Any) -> None:
    """At a learning rate of nearly nothing the exported weights are those that were begun with."""
    still = ("--set", "stages.features.phases.0.lr=1e-30", "--set", "ema=null", "--stage", "features")
    teacher = ("--set", "stages.features.teacher=runs/students-teacher")
    other = load_file(here / "runs/students-features/pipeline/unet/diffusion_pytorch_model.safetensors")
    given = load_file(here / "runs/students-teacher/pipeline/unet/diffusion_pytorch_model.safetensors")
    config = UNet2DConditionModel.load_config(here / "runs/students-teacher/pipeline/unet")
    spec = StudentSpec(layers_per_block=1, depth=(1, 1, 1), mid="drop")
    assert command("train", RECIPE, "--name", "one", *still, *teacher).code == 0
    assert (
        command(
            "train", RECIPE, "--name", "two", *still, *teacher, "--set", "init=runs/students-features"
        ).code
        == 0
    )
    for name, expected in (
        ("one", {key: given[teacher_key(key, spec, config)] for key in other}),
        ("two", other),
    ):
        found = load_file(here / f"runs/{name}-features/pipeline/unet/diffusion_pytorch_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


def test_an_adapter_lies_beside_the_pipeline_that_has_it_folded_in(trained: Path) -> None:
    run = trained / "runs/students-lora"
    pipeline = shoestring.load(run)
    assert isinstance(pipeline, UNetPipeline)
    assert type(pipeline.scheduler).__name__ == "TCDScheduler"
    base = shoestring.load(trained / "runs/students-features")
    base.load_lora_weights(run / "lora")
    base.fuse_lora(components=["unet"])
    base.unload_lora_weights()
    folded, fused = pipeline.unet.state_dict(), base.unet.state_dict()
    assert folded.keys() == fused.keys()
    for name, tensor in folded.items():
        torch.testing.assert_close(tensor, fused[name], atol=1e-6, rtol=1e-5)


def test_one_command_distils_an_sdxl_that_opens_in_plain_diffusers(
    store: str, command: Any, sdxl_folder: Path
) -> None:
    said = command(*words(sdxl_folder, sdxl_folder))
    assert said.code == 0, said.err
    folder = "runs/koala-700m/pipeline"
    for kind in (StableDiffusionXLPipeline, AutoPipelineForText2Image):
        pipeline = kind.from_pretrained(folder)
        assert type(pipeline) is StableDiffusionXLPipeline
        assert pipeline.unet.mid_block is None
        assert pipeline.config.force_zeros_for_empty_prompt
    picture = pipeline("a koala", num_inference_steps=2, output_type="pt").images
    assert torch.isfinite(picture).all()
    again = StableDiffusionXLImg2ImgPipeline(**pipeline.components)
    assert again("a koala", image=picture, num_inference_steps=2, strength=1.0).images
    assert command("train", "runs/koala-700m", "--resume").code == 0
    assert command("sample", "runs/koala-700m", "a koala", "--steps", 2).code == 0


NORMALISED = """
name: plain
system: koala
data: {{store: s, autoencoder: {folder}, normalise: measured, caption_drop: 0}}
model: {{kind: unet, block_out_channels: [8, 16], transformer_depth: [0, 1], head_dim: 8, norm_groups: 4}}
objective: {{kind: noise}}
optimizer: {{kind: adamw}}
phases: [{{name: only, size: 32, images: 16, batch: 8, lr: 1.0e-3}}]
train: {{checkpoint_every: 16, log_every: 8}}
sampling: {{scheduler: ddim, steps: 2}}
"""


def test_normalised_latents_are_undone_in_pictures_and_the_same_for_teacher_and_student(
    empty: Path, captioned: Any, command: Any, sdxl_folder: Path
) -> None:
    captioned(empty / "photos", 24)
    assert command("encode", "photos", "--out", "s", "--size", 32, "--autoencoder", sdxl_folder).code == 0
    Path("plain.yaml").write_text(NORMALISED.format(folder=sdxl_folder))
    said = command("train", "plain.yaml")
    assert said.code == 0, said.err
    pipeline, store, rows = shoestring.load("runs/plain"), Store.open("s"), np.arange(24)
    trained_on = store.normalised("measured", 32).latents(32, rows)
    assert trained_on.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    decoded = as_decoded(pipeline.config, pipeline.vae, trained_on)
    torch.testing.assert_close(decoded, store.latents(32, rows), atol=1e-5, rtol=1e-4)
    Path("student.yaml").write_text(
        "base: plain.yaml\nname: student\nteacher: runs/plain\nmodel: {kind: unet_student, mid: drop}\n"
        "objective: {kind: distillation, taps: [self_attention]}\n"
    )
    told = command("train", "student.yaml", "--set", "data.normalise=autoencoder").refused()
    assert "data.normalise: autoencoder does not fit the teacher" in told
    assert "Use its run's store and `normalise`." in told
    said = command("train", "student.yaml")
    assert said.code == 0, said.err
    assert shoestring.load("runs/student").config.latents_std == pipeline.config.latents_std


def test_a_teacher_on_the_autoencoders_own_scale_refuses_another(
    store: str, command: Any, sdxl_folder: Path
) -> None:
    told = command(*words(sdxl_folder, sdxl_folder), "--set", "data.normalise=measured").refused()
    assert "data.normalise: measured does not fit the teacher" in told
    assert told.endswith("Set it to autoencoder.")


def test_a_few_step_student_has_the_null_caption_that_its_teacher_is_guided_against(
    here: Path, command: Any
) -> None:
    sets = ("stages.lcm.teacher=runs/students-features", "stages.lcm.objective.null_caption=zeros")
    asked = [word for each in sets for word in ("--set", each)]
    told = command("train", RECIPE, "--stage", "lcm", "--name", "new", *asked).refused()
    assert "objective.null_caption: zeros, but the teacher's pipeline is guided against empty." in told
    assert not (here / "runs/new-lcm").exists()


def test_a_stock_teachers_null_caption_is_known_too(store: str, command: Any, sdxl_folder: Path) -> None:
    arguments = words(sdxl_folder, sdxl_folder, "koala-700m-lcm")
    told = command(*arguments, "--set", "objective.null_caption=empty").refused()
    assert "objective.null_caption: empty, but the teacher's pipeline is guided against zeros." in told


def test_another_teacher_under_the_same_name_is_refused_at_the_resume(
    store: str, command: Any, sdxl_folder: Path, empty: Path
) -> None:
    shutil.copytree(sdxl_folder, empty / "mine")
    arguments = words("mine", sdxl_folder)
    assert command(*arguments).code == 0
    file = empty / "mine/unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    told = command("train", "runs/koala-700m", "--resume").refused()
    assert "teacher is no longer the network that the run was trained with" in told
    file.unlink()
    assert command("train", "runs/koala-700m", "--resume").refused().startswith("mine")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("teacher=null",), "teacher: missing: the U-Net to cut and learn from"),
        (("model.mid=drop",), "model.mid: has no effect with preset koala-700m"),
        (("objective.taps=[]",), "objective.taps: none, so feature_weight has no effect"),
        (("objective.taps=[attention]",), "objective.taps.0: 'attention' is unknown. Did you mean"),
        (("objective.teacher_steps=8",), "objective.teacher_steps: has no effect with timesteps uniform"),
        (("objective.weight_cap=5",), "objective.weight_cap: has no effect with weight none"),
        (("model.lora_rank=8",), "model.lora_rank: trains with objective lcm alone"),
        (("phases.0.mask=0.5",), "phases.0.mask: a U-Net trains on whole pictures"),
        (("sampling.scheduler=lcm",), "sampling.scheduler: 'lcm' does not fit objective distillation"),
        (("system=microdit",), "system: 'microdit' does not have a unet_student"),
        (("model={preset: null, depth: [1, [2, 2], 4]}",), "model.depth.1: [2, 2] is not allowed"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    sets: tuple[str, ...], message: str, empty: Path, command: Any
) -> None:
    asked = [word for each in sets for word in ("--set", each)]
    assert message in command("train", "koala-700m", *asked, "--dry-run").refused()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("objective.guidance=[9, 3]",), "from 9 to 3: give the smaller one first"),
        (("sampling.guidance=2",), "sampling.guidance: 2 was not trained. Allowed: 4 to 16"),
        (("sampling.scheduler=tcd",), "objective.phases 1 is sampled with lcm"),
        (("objective.phases=4", "sampling.scheduler=tcd", "sampling.steps=2"), "each phase is one step: 4"),
        (("model.lora_rank=8",), "objective.embed_guidance: an adapter has no place for it"),
        (
            ("sampling.steps=60",),
            "sampling.steps: 60, but the student learns 50 times alone: choose 50 at most",
        ),
        (
            ("objective.phases=60", "sampling={scheduler: tcd, steps: 60, guidance: 8}"),
            "objective.phases: 60, but",
        ),
    ],
)
def test_a_few_step_recipe_that_cannot_be_is_refused(
    sets: tuple[str, ...], message: str, empty: Path, command: Any
) -> None:
    asked = [word for each in sets for word in ("--set", each)]
    assert message in command("train", "koala-700m-lcm", *asked, "--dry-run").refused()


def test_a_teacher_that_is_no_unet_is_one_line(store: str, command: Any, sdxl_folder: Path) -> None:
    assert "AutoencoderKL" in command(*words(sdxl_folder / "vae", sdxl_folder)).refused()
    assert not Path("runs").exists()


def test_a_store_of_other_encoders_than_the_teachers_is_one_line(
    here: Path, command: Any, sdxl_folder: Path
) -> None:
    teacher = ("--set", f"stages.features.teacher={sdxl_folder}", "--name", "new")
    told = command("train", RECIPE, "--stage", "features", *teacher).refused()
    assert "its text is 64 wide, the U-Net reads 40" in told
    assert not (here / "runs/new-features").exists()


def test_the_recipes_presets_are_the_models() -> None:
    from typing import get_args

    from shoestring.models.unet_presets import PRESETS
    from shoestring.recipes.architectures import UNetPreset

    assert set(get_args(UNetPreset)) == set(PRESETS)
    assert all(preset_spec(name) for name in PRESETS)
