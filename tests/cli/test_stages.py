"""A cascade through the command line: all stages from one recipe, or one by one; exact resumes; mistakes."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shoestring
from shoestring.models.autoencoders import load_autoencoder
from shoestring.models.wuerstchen_autoencoder import WuerstchenAutoencoder
from shoestring.recipes.load import load_stages
from shoestring.training.checkpoint import Checkpoint
from tests.cli.conftest import run as command_line

STAGES = Path(__file__).with_name("stages.yaml")
LETTERS = ("a", "b", "c")


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all three stages were trained by one command; not to be changed."""
    folder = tmp_path_factory.mktemp("cascade")
    with contextlib.chdir(folder):
        assert command_line("train", STAGES) == 0
    return folder


@pytest.fixture
def here(cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to work in."""
    shutil.copytree(cascade, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def tensors(run: Path, images: int) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds: weights, statistics, optimisers, averages."""
    return Checkpoint(run / f"checkpoints/{images:012d}", {}).tensors()


def test_one_command_trains_all_stages_each_a_run_of_its_own(cascade: Path) -> None:
    for stage, parts in zip(
        LETTERS, ({"vqgan"}, {"decoder", "compressor", "vqgan"}, {"prior_prior"}), strict=True
    ):
        run = cascade / f"runs/cascade-{stage}"
        assert parts <= {path.name for path in (run / "pipeline").iterdir()}
        assert (run / "report.html").is_file()
        assert [path.stem for path in sorted((run / "previews").glob("*.png"))] == ["000000032"]
        ledger = json.loads((run / "ledger.json").read_text())
        assert ledger["total"]["images"] == 40
        assert ledger["total"]["flops"] > 0


@pytest.mark.parametrize("stage", LETTERS)
def test_a_stage_resumes_bit_for_bit(stage: str, here: Path) -> None:
    """Both turns of Stage A, batch statistics and dropout of Stage B, averages of Stage C."""
    run = here / f"runs/cascade-{stage}"
    unbroken = tensors(run, 40)
    for images in (32, 40):
        shutil.rmtree(run / f"checkpoints/{images:012d}")
    assert command_line("train", run, "--resume") == 0
    again = tensors(run, 40)
    assert again.keys() == unbroken.keys()
    assert all(torch.equal(again[name], unbroken[name]) for name in again)
    turns = {name.split("/")[1] for name in again}
    assert (
        turns == {"a": {"generator", "discriminator"}, "b": {"decoder", "previewer"}, "c": {"prior"}}[stage]
    )


def test_the_cascade_draws_and_is_measured(here: Path, command: Any) -> None:
    assert command("sample", "runs/cascade-c", "a red circle", "--count", 2).code == 0
    assert len(list((here / "samples").glob("0*.png"))) == 2
    for stage in LETTERS:
        assert command("evaluate", f"runs/cascade-{stage}").code == 0
        rows = json.loads((here / f"runs/cascade-{stage}/evaluation.json").read_text())["rows"]
        metrics = {
            row["metric"]: row for row in rows if row["split"] == "unseen_scenes" and row["facet"] == "all"
        }
        assert {"reconstruction_psnr", "reconstruction_ssim", "reconstruction_accuracy"} <= metrics.keys()
        assert ("scene_accuracy" in metrics) == (stage == "c")
        spatial, elements = (4, 12) if stage == "a" else (16, 48)
        assert metrics["compression_spatial"]["value"] == spatial
        assert metrics["compression_elements"]["value"] == elements
        assert metrics["held_out_loss"]["value"] > 0


def test_stage_c_learns_codes_of_mean_0_and_deviation_1_and_gives_back_raw_ones(cascade: Path) -> None:
    pipeline = shoestring.load(cascade / "runs/cascade-c")
    autoencoder = load_autoencoder(str(cascade / "runs/cascade-b"))
    assert isinstance(autoencoder, WuerstchenAutoencoder)
    assert isinstance(pipeline.vae, WuerstchenAutoencoder)
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    codes = autoencoder.encode(pictures).latent
    torch.testing.assert_close(pipeline.vae.encode(pictures).latent, codes, atol=1e-6, rtol=0)
    mean, std = torch.tensor(pipeline.config.latents_mean), torch.tensor(pipeline.config.latents_std)
    assert mean.shape == std.shape == (16,)
    assert (std > 0).all()


def test_training_again_needs_resume_and_then_leaves_finished_stages_alone(here: Path, command: Any) -> None:
    assert "there is a run of this name already" in command("train", STAGES).refused()
    before = {path: path.stat().st_mtime_ns for path in here.rglob("COMMITTED")}
    shutil.rmtree(here / "runs/cascade-c")
    before = {path: time for path, time in before.items() if path.exists()}
    said = command("train", STAGES, "--resume")
    assert said.code == 0
    assert [line.split(":")[0] for line in said.out.splitlines()] == [
        *("runs/cascade-a is finished", "runs/cascade-b is finished", "runs/cascade-c"),
    ]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_stage_whose_predecessor_is_missing_says_which_command_trains_it(empty: Path, command: Any) -> None:
    for stage, needed in (("b", "a"), ("c", "b")):
        error = command("train", STAGES, "--stage", stage).refused()
        assert f"cascade-{stage}: needs stage {needed}, which has no weights yet" in error
        assert f"shoestring train {STAGES} --stage {needed}" in error
    assert "has no such stage. Allowed: a, b, c." in command("train", STAGES, "--stage", "d").refused()
    assert "demo has no such stage. It has none" in command("train", "demo", "--stage", "a").refused()
    assert not list(empty.rglob("recipe.yaml"))


def test_a_prior_is_refused_on_codes_of_another_compressor(here: Path, command: Any) -> None:
    """The store says whose codes it holds; a Stage B trained anew under the same name makes others."""
    store = next(
        path.parent for path in here.glob("stores/*/manifest.json") if "runs/cascade-b" in path.read_text()
    )
    file = here / "runs/cascade-b/pipeline/compressor/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(
        {name: tensor * 1.5 if tensor.is_floating_point() else tensor for name, tensor in weights.items()},
        file,
    )
    sets = [f"data={{store: {store}, autoencoder: runs/cascade-b, normalise: measured}}"]
    words = [word for each in sets for word in ("--set", f"stages.c.{each}")]
    error = command("train", STAGES, "--stage", "c", "--name", "other", *words)
    assert error.code == 2, error.err
    assert "was made with other weights of the autoencoder" in error.err


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["stages.b.phases.0.size=72", "data.scenes.size=72"], "72 px"),
        (["stages.b.model.vqgan=stage:c"], "stages.b: stage:c names no earlier stage"),
        (
            ["phases.0.mask=0.5"],
            "--set stages.a.phases.0.mask: a wuerstchen_vqgan trains on whole pictures",
        ),
        (
            ["stages.c.phases.0.mask=0.5"],
            "stages.c.phases.0.mask: a wuerstchen_prior trains on whole pictures",
        ),
        (["stages.b.data.autoencoder=somewhere"], "stages.b.data.autoencoder: somewhere"),
        (
            ["stages.c.objective={kind: edm}"],
            "stages.c.objective.kind: edm does not train a wuerstchen_prior",
        ),
        (["stages.a.sampling={scheduler: cosine_ddpm}"], "stages.a.sampling: has no effect"),
        (["stages.c.sampling=null"], "stages.c.sampling: missing"),
        (["stages.b.model.nhead=[-1, 3]"], "3 heads do not divide the width 16"),
        (["stages.a.objective.adversarial_start=40"], "but the run ends after 40"),
        (["stages.a.phases.0.objective.mse=2"], "objective reconstruction is the same in all phases"),
        (["train.activation_checkpointing=true"], "stages.a.train.activation_checkpointing: has no effect"),
        (["stages=3"], "stages: must be a section"),
    ],
)
def test_mistakes_in_a_recipe_of_stages_name_the_stage(
    sets: list[str], told: str, empty: Path, command: Any
) -> None:
    words = [word for each in sets for word in ("--set", each)]
    assert told in command("train", STAGES, "--dry-run", *words).refused()


def test_two_runs_average_into_one(here: Path, command: Any) -> None:
    assert command("train", STAGES, "--stage", "c", "--name", "second", "--set", "seed=1",
                   "--set", "stages.c.data.autoencoder=runs/cascade-b").code == 0  # fmt: skip
    runs = ["runs/cascade-c", "runs/second-c"]
    said = command("average", *runs, "--out", "both")
    assert said.out.startswith("both: prior_prior averaged over 2 runs")
    name = "pipeline/prior_prior/diffusion_pytorch_model.safetensors"
    first, second = (load_file(here / run / name) for run in runs)
    mean = load_file(here / "both/prior_prior/diffusion_pytorch_model.safetensors")
    for key in mean:
        assert torch.allclose(mean[key], (first[key] + second[key]) / 2, atol=1e-7)
    assert command("sample", "both", "a red circle").code == 0
    assert "is there already" in command("average", *runs, "--out", "both").refused()
    assert "not the same network" in command("average", runs[0], "runs/cascade-a", "--out", "odd").refused()
    assert not (here / "odd").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", LETTERS)
def test_two_processes_see_the_batches_of_one_and_resume_bit_for_bit(
    stage: str, here: Path, launch: Any, tmp_path: Path
) -> None:
    """Batch statistics are summed over both; dropout, which is drawn by process, is off."""
    sets = ["stages.b.model.dropout=0", "train.preview_every=null", "stages.c.model.dropout=0"]
    words = [word for each in sets for word in ("--set", each)]
    losses = {}
    for processes in (1, 2):
        name = f"by{processes}"
        extra = [
            "--set",
            f"stages.{stage}.{'data.autoencoder' if stage == 'c' else 'model.vqgan'}=runs/cascade-b",
        ]
        command = [
            "train",
            STAGES,
            "--stage",
            stage,
            "--name",
            name,
            *words,
            *(extra if stage != "a" else []),
        ]
        done = launch(processes, "-m", "shoestring", *command, cwd=here)
        assert [each.returncode for each in done] == [0] * processes, [each.stderr for each in done]
        lines = (here / f"runs/{name}-{stage}/metrics.jsonl").read_text().splitlines()
        losses[processes] = [line["loss"] for line in map(json.loads, lines) if line["kind"] == "train"]
    assert losses[2] == pytest.approx(losses[1], rel=2e-3)
    unbroken = tensors(here / f"runs/by2-{stage}", 40)
    for images in (32, 40):
        shutil.rmtree(here / f"runs/by2-{stage}/checkpoints/{images:012d}")
    done = launch(2, "-m", "shoestring", "train", f"runs/by2-{stage}", "--resume", cwd=here)
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    again = tensors(here / f"runs/by2-{stage}", 40)
    assert all(torch.equal(again[name], unbroken[name]) for name in unbroken)


def test_the_cost_of_a_stage_whose_predecessor_is_missing_is_unknown(empty: Path, command: Any) -> None:
    said = command("train", STAGES, "--dry-run")
    assert said.code == 0
    told = [line for line in said.out.splitlines() if line.startswith("# cost: unknown")]
    assert [line.split(", which")[0] for line in told] == [
        "# cost: unknown. cascade-b: needs stage a",
        "# cost: unknown. cascade-c: needs stage b",
    ]
    assert not (empty / "runs").exists()


def test_a_setting_for_all_stages_lies_on_top_of_each_and_their_own_on_top_of_it() -> None:
    sets = ["phases.0.images=8", "train.log_every=4", "stages.b.train.log_every=2", "seed=3"]
    stages = load_stages(STAGES, [*sets, "stages.a.objective.adversarial_start=0"])
    assert [each.phases[0].images for each in stages.values()] == [8, 8, 8]
    assert [each.train.log_every for each in stages.values()] == [4, 2, 4]
    assert [each.seed for each in stages.values()] == [3, 3, 3]
    assert [each.name for each in stages.values()] == ["cascade-a", "cascade-b", "cascade-c"]


def test_runs_that_differ_in_more_than_their_weights_are_not_averaged(here: Path, command: Any) -> None:
    """Equal shapes, other codes or other heads: a mean of such weights would be of nothing."""
    for key, value, told in (
        ("latents_of", "another", "of other latents"),
        ("latents_std", [1.0] * 16, "of other latents"),
    ):
        shutil.copytree("runs/cascade-c/pipeline", key)
        index = Path(key, "model_index.json")
        index.write_text(json.dumps(json.loads(index.read_text()) | {key: value}))
        assert told in command("average", "runs/cascade-c", key, "--out", "both").refused()
    shutil.copytree("runs/cascade-c/pipeline", "heads")
    config = Path("heads/prior_prior/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"nhead": 4}))
    file = config.with_name("diffusion_pytorch_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert "nhead differs" in command("average", "runs/cascade-c", "heads", "--out", "both").refused()
    assert not Path("both").exists()


def test_stage_b_resumes_with_its_own_stage_a_alone(here: Path, command: Any) -> None:
    file = here / "runs/cascade-a/pipeline/vqgan/diffusion_pytorch_model.safetensors"
    shutil.rmtree(here / "runs/cascade-b/checkpoints/000000000040")
    weights = load_file(file)
    save_file({name: tensor * 2 for name, tensor in weights.items()}, file)
    error = command("train", "runs/cascade-b", "--resume").refused()
    assert "model.vqgan is no longer the network that the run was trained with" in error
    save_file(weights, file)
    assert command("train", "runs/cascade-b", "--resume").code == 0


def test_stages_that_draw_no_prompts_say_so(here: Path, command: Any) -> None:
    assert "one stage of a cascade" in command("sample", "runs/cascade-b", "a red circle").refused()
    assert "--steps: has no effect" in command("evaluate", "runs/cascade-b", "--steps", 3).refused()


def test_a_report_of_a_stage_that_reconstructs_speaks_of_pictures(cascade: Path) -> None:
    for stage, told in (("a", "what became of it"), ("b", "what became of it"), ("c", "The same prompts")):
        assert told in (cascade / f"runs/cascade-{stage}/report.html").read_text()
