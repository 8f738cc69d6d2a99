"""`shoestring train`: what a run leaves, how it goes on after any stop, and what it says to a mistake."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import shoestring
from shoestring.recipes.load import load_recipe


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline/transformer/diffusion_pytorch_model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what a run leaves -----------------------------------------------------------------------------------


def test_a_run_leaves_everything_that_it_promises(here: Path, tiny: Path, metrics: Any) -> None:
    run = here / "runs/tiny"
    assert load_recipe(run / "recipe.yaml") == load_recipe(tiny)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["model"]["depth"] == 1
    told = metrics(run)
    assert [line["text"] for line in told if line["kind"] == "event"] == [
        "phase masked: 192 images",
        "phase dense: 192 images",
    ]
    assert [line["images"] for line in told if line["kind"] == "train"] == list(range(48, 385, 48))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000000000288", "000000000384"]
    ledger = json.loads((run / "ledger.json").read_text())
    assert [(phase["images"], phase["steps"]) for phase in ledger["phases"]] == [(192, 8), (192, 8)]
    assert 0 < ledger["phases"][0]["flops"] < ledger["phases"][1]["flops"], "masked patches cost nothing"
    assert ledger["total"]["flops"] == sum(phase["flops"] for phase in ledger["phases"])
    assert ledger["total"]["peak_memory_bytes"] > 2**20
    assert "<svg" in (run / "report.html").read_text()


def test_previews_show_the_same_held_out_prompts_as_training_goes_on(here: Path) -> None:
    names = ["000000192", "000000384"]
    assert sorted(path.stem for path in (here / "runs/tiny/previews").glob("*.png")) == names
    first, second = (json.loads((here / f"runs/tiny/previews/{name}.json").read_text()) for name in names)
    assert first.keys() == {"prompts", "images", "seed", "steps", "guidance"}
    assert len(first["prompts"]) == 8
    assert (first | {"images": 384}) == second
    pictures = [Image.open(here / f"runs/tiny/previews/{name}.png").tobytes() for name in names]
    assert pictures[0] != pictures[1]


def test_the_held_out_loss_is_followed_while_training(here: Path, command: Any, metrics: Any) -> None:
    told = [line for line in metrics(here / "runs/tiny") if line["kind"] == "held_out"]
    assert [line["images"] for line in told] == [192, 384]
    assert all(line["by_noise"].keys() == {"-1.0", "1.0"} for line in told)
    assert told[1]["loss"] < told[0]["loss"]
    command("evaluate", "runs/tiny")
    rows = json.loads((here / "runs/tiny/evaluation.json").read_text())["rows"]
    (last,) = (
        row["value"]
        for row in rows
        if (row["metric"], row["split"], row["facet"]) == ("held_out_loss", "unseen_scenes", "all")
    )
    assert told[1]["loss"] == pytest.approx(last, rel=1e-5), "the exported network is the one looked at"


def test_an_averaged_network_is_exported_and_the_raw_one_kept_for_resuming(here: Path) -> None:
    from shoestring.training import checkpoint

    saved = checkpoint.newest(here / "runs/tiny/checkpoints", print)
    assert saved is not None
    tensors, exported = saved.tensors(), weights(here / "runs/tiny")
    for name, tensor in exported.items():
        assert torch.equal(tensor, tensors[f"ema/denoiser/0.999/transformer.{name}"])
    assert not torch.equal(exported["proj_out.weight"], tensors["model/denoiser/transformer.proj_out.weight"])


def test_dry_run_prints_the_recipe_and_its_cost_and_writes_nothing(
    empty: Path, tiny: Path, command: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(empty)
    said = command("train", tiny, "--dry-run", "--set", "seed=7")
    assert said.code == 0
    assert yaml.safe_load(said.out) == load_recipe(tiny, ["seed=7"]).model_dump(mode="json")
    ledger = json.loads((here / "runs/tiny/ledger.json").read_text())
    assert f"# parameters: {ledger['parameters']:,}\n" in said.out
    assert "# phase masked: 192 images of 32 px, mask 0.5: " in said.out
    assert "# all phases: 384 images, " in said.out
    assert list(empty.iterdir()) == []


def test_dry_run_of_a_store_that_is_not_there_yet_says_so(empty: Path, tiny: Path, command: Any) -> None:
    said = command("train", tiny, "--dry-run", "--set", "data.store=later")
    assert said.code == 0
    assert "# cost: unknown until the store is there. later: no such store." in said.out
    assert list(empty.iterdir()) == []


def test_dry_run_refuses_a_store_that_is_there_and_does_not_fit(
    here: Path, tiny: Path, command: Any, tree: Any
) -> None:
    before = tree(here)
    store = next((here / "stores").iterdir())
    sets = (f"data.store={store}", "data.scenes=null", "data.text_encoder=google/flan-t5-base")
    words = ("train", tiny, "--name", "other", *(word for each in sets for word in ("--set", each)))
    said = command(*words, "--dry-run")
    assert (said.code, said.err) == (2, command(*words).err)
    assert "made with the text encoder hashing" in said.err
    assert tree(here) == before


def test_bfloat16_trains_with_float32_weights(here: Path, tiny: Path, command: Any) -> None:
    words = ("train", tiny, "--name", "half", "--dtype", "bfloat16", "--set", "phases.1.images=24")
    assert command(*words).code == 0
    assert json.loads((here / "runs/half/ledger.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in weights(here / "runs/half").values()} == {torch.float32}


# --- stopping and going on -------------------------------------------------------------------------------


def test_resuming_a_finished_run_changes_nothing(here: Path, tiny: Path, command: Any, tree: Any) -> None:
    before = tree(here)
    for words in ((tiny,), ("runs/tiny",)):
        said = command("train", *words, "--resume")
        assert (said.code, said.out) == (0, "runs/tiny is finished: 384 images.\n")
    assert tree(here) == before


def test_resuming_from_any_checkpoint_gives_the_same_run(
    here: Path, tiny: Path, command: Any, metrics: Any
) -> None:
    """Figures and weights equal the unbroken run's bit for bit; what was written after it is replaced."""
    run = here / "runs/tiny"
    shutil.copytree(run, here / "unbroken")
    shutil.rmtree(run / "checkpoints/000000000384")
    (run / "checkpoints/.000000000384.123.partial/tensors").mkdir(parents=True)  # as kill -9 leaves it
    said = command("train", tiny, "--resume")
    assert said.code == 0
    assert "Resuming runs/tiny after 288 images." in said.err
    assert metrics(run) == metrics(here / "unbroken")
    assert same(run, here / "unbroken")
    assert not list(run.rglob("*.partial"))


def test_a_damaged_checkpoint_is_passed_over_with_a_word(
    here: Path, tiny: Path, command: Any, metrics: Any
) -> None:
    run = here / "runs/tiny"
    shutil.copytree(run, here / "unbroken")
    (shard,) = (run / "checkpoints/000000000384/tensors").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    said = command("train", tiny, "--resume")
    assert said.code == 0
    assert "is damaged (sha256 differs). Trying the one before it." in said.err
    assert metrics(run) == metrics(here / "unbroken")


def test_a_run_stopped_before_its_first_checkpoint_begins_again(
    here: Path, tiny: Path, command: Any, metrics: Any
) -> None:
    run = here / "runs/tiny"
    shutil.copytree(run, here / "unbroken")
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "pipeline")
    said = command("train", "runs/tiny", "--resume")
    assert said.code == 0
    assert "no valid checkpoint yet; starting from the beginning" in said.err
    assert same(run, here / "unbroken")


def test_resuming_with_a_changed_recipe_names_the_keys(
    here: Path, tiny: Path, command: Any, tree: Any
) -> None:
    before = tree(here)
    sets = ("--set", "phases.1.lr=1e-3", "--set", "model.depth=2")
    error = command("train", tiny, "--resume", *sets).refused()
    assert "model.depth: 1 -> 2; phases.1.lr: 0.002 -> 0.001." in error
    assert "start a new run with --name" in error
    assert tree(here) == before


def start(recipe: Path, folder: Path, *words: str) -> subprocess.Popen[str]:
    """A training in a process of its own, long enough to be stopped."""
    sets = [f"phases.{i}.images=960" for i in (0, 1)]
    command = [sys.executable, "-m", "shoestring", "train", str(recipe), *words]
    for each in (*sets, "train.log_every=24", "train.preview_every=null"):
        command += ["--set", each]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def images_seen(folder: Path) -> int:
    """Images of the last line of runs/tiny/metrics.jsonl that is whole."""
    path = folder / "runs/tiny/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [json.loads(line)["images"] for line in lines if line.endswith("\n")]
    return int(whole[-1]) if whole else 0


def wait_for(folder: Path, images: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while images_seen(folder) < images:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(
    empty: Path, tiny: Path, metrics: Any, command: Any
) -> None:
    process = start(tiny, empty)
    wait_for(empty, 300, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    last = err.splitlines()[-1]
    assert "Traceback" not in err
    assert last.startswith("Stopped after ")
    assert last.endswith("a checkpoint is saved. Go on with: shoestring train runs/tiny --resume")
    seen = int(last.split()[2].replace(",", ""))
    assert (empty / f"runs/tiny/checkpoints/{seen:012d}/COMMITTED").is_file()
    assert command("train", "runs/tiny", "--resume").code == 0
    other = start(tiny, empty, "--name", "unbroken")
    assert other.wait() == 0
    assert metrics(empty / "runs/tiny") == metrics(empty / "runs/unbroken")
    assert same(empty / "runs/tiny", empty / "runs/unbroken")


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(empty: Path, tiny: Path, metrics: Any) -> None:
    """SIGKILL at three places, then --resume: figures and weights are those of an unbroken run."""
    unbroken = start(tiny, empty, "--name", "unbroken")
    assert unbroken.wait() == 0
    process = start(tiny, empty)
    for images in (200, 700, 1300):
        wait_for(empty, images, process)
        process.kill()
        process.wait()
        process = start(tiny, empty, "--resume")
    assert process.wait() == 0
    assert metrics(empty / "runs/tiny") == metrics(empty / "runs/unbroken")
    assert same(empty / "runs/tiny", empty / "runs/unbroken")
    assert not list(empty.rglob("*.partial"))


# --- data that are no scenes -----------------------------------------------------------------------------


def test_two_sizes_of_one_store_train_in_one_command(here: Path, tiny: Path, command: Any) -> None:
    """EDM at 16 px, then at 32 px with positions scaled by 2, as the published recipe does."""
    recipe = here / "edm.yaml"
    recipe.write_text(
        f"""
base: {tiny}
data: {{store: parted}}
objective: {{kind: edm, sigma_data: 0.5}}
phases:
  - {{name: small, size: 16, images: 48, batch: 24, mask: 0.75, lr: 1.0e-3}}
  - {{name: large, size: 32, images: 48, batch: 24, lr: 1.0e-3, position_scale: 2}}
model: {{positions: sincos, qk_norm: hidden}}
sampling: {{scheduler: edm_heun}}
train: {{preview_every: 48}}
"""
    )
    assert command("train", recipe).code == 0
    run = here / "runs/edm"
    sides = [Image.open(run / f"previews/{n:09d}.png").size for n in (48, 96)]
    assert sides[0][0] > 0
    pipeline = shoestring.load(run)
    assert pipeline.transformer.config.sample_size == 32
    assert pipeline.transformer.config.pos_interp_scale == 2
    assert pipeline("some grey noise").images[0].size == (32, 32)
    ledger = json.loads((run / "ledger.json").read_text())
    assert [(phase["size"], phase["images"]) for phase in ledger["phases"]] == [(16, 48), (32, 48)]


def test_the_emoji_set_trains_and_samples(
    data: Path, empty: Path, tiny: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(data / "emoji/train.parquet").slice(0, 120)
    pq.write_table(rows, empty / "emoji.parquet")
    said = command("encode", "emoji.parquet", "--out", "emoji", "--size", 32, "--held-out", 20)
    assert "120 images of 32 px (20 held_out, 100 train)" in said.out
    sets = ("--set", "data.store=emoji", "--set", "phases.1.images=24")
    assert command("train", tiny, "--name", "emoji", *sets).code == 0
    assert command("sample", "runs/emoji", "a grinning face").code == 0
    assert Image.open("samples/00000.png").size == (32, 32)
    assert command("evaluate", "runs/emoji").code == 0


def test_a_corrupt_shard_is_named_with_its_cure_which_works(
    here: Path, tiny: Path, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damage is met in the middle of training; the printed command mends it and the run goes on."""
    shard = here / "parted/columns/latents-32/00002.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    sets = ("--name", "new", "--set", "data.store=parted")
    error = command("train", tiny, *sets).refused()
    assert "parted/columns/latents-32/00002.safetensors does not match its checksum" in error
    cure = error.split("again with: ")[1]
    assert cure.startswith("rm -f parted/chunks/00002.json && shoestring encode photos ")
    remove, encode = cure.split(" && ")
    subprocess.run(remove.split(), check=True)
    assert command(*encode.split()[1:]).code == 0
    assert shard.read_bytes() == good
    resume = ("--resume",) if (here / "runs/new").exists() else ()
    assert command("train", tiny, *sets, *resume).code == 0


def test_corruption_met_in_the_middle_of_training_leaves_a_run_to_resume(
    here: Path, tiny: Path, command: Any, monkeypatch: pytest.MonkeyPatch, metrics: Any
) -> None:
    from shoestring.data.loader import Loader
    from shoestring.errors import CorruptStoreError

    batch = Loader.batch

    def broken(self: Loader, start: int, stop: int) -> Any:
        if start >= 240:
            raise CorruptStoreError("shard x does not match")
        return batch(self, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "batch", broken)
        assert command("train", tiny, "--name", "new").refused() == "shard x does not match"
    assert command("train", tiny, "--name", "new", "--resume").code == 0
    assert metrics(here / "runs/new") == metrics(here / "runs/tiny")


# --- mistakes: one line, exit code 2, nothing half-written -----------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{tiny}", "--set", "model.depht=3"), "--set model.depht: unknown key. Did you mean 'depth'?"),
        (("{tiny}", "--set", "phases.0.batch=many"), "--set phases.0.batch: 'many' is not allowed: must be"),
        (("{tiny}", "--set", "seed=1.5"), "--set seed: 1.5 is not allowed: must be a whole number."),
        (("nowhere.yaml",), "recipe nowhere.yaml: no such file. Built-in recipes: demo, "),
        (("runs",), "is a folder. Give a YAML file"),
        (
            ("{tiny}", "--name", "x", "--set", "data.store=nowhere"),
            "nowhere: no such store. Make one with `shoestring encode",
        ),
        (
            ("{tiny}", "--name", "x", "--set", "data.store=photos"),
            "photos: not a store (no manifest.json in it)",
        ),
        (
            ("{tiny}", "--name", "x", "--set", "data.store=plain", "--set", "data.text_encoder=some/clip"),
            "plain: made with the text encoder hashing, the recipe asks for some/clip. Change the recipe, or",
        ),
        (
            ("{tiny}", "--name", "x", "--set", "data.store=plain", "--set", "data.autoencoder=some/vae"),
            "plain: made with the autoencoder pixels, the recipe asks for some/vae",
        ),
        (
            ("{tiny}", "--name", "x", "--set", "data.store=plain", "--set", "data.max_tokens=5"),
            "plain: made with the max tokens 64, the recipe asks for 5",
        ),
        (
            ("{tiny}", "--name", "x", "--set", "data.store=plain", "--set", "data.pad=encoder"),
            "plain: made with the pad none, the recipe asks for encoder",
        ),
        (
            ("{tiny}", "--name", "x", "--set", "data.store=plain", "--set", "phases.1.size=24"),
            "plain: holds images of 16, 32 pixels, not 24. Use one of these sizes, or make another store",
        ),
        (("{tiny}",), "runs/tiny: there is a run of this name already. Add --resume to go on with it, or"),
        (("{tiny}", "--name", "x", "--resume"), "runs/x: nothing to resume, there is no run."),
        (("{tiny}", "--name", "a/b"), "--set name: 'a/b' is not allowed: must be letters"),
        (
            ("{tiny}", "--set", "sampling.scheduler=flow_hoin"),
            "sampling.scheduler: 'flow_hoin' does not fit objective flow. Allowed: flow_euler, flow_heun.",
        ),
        (
            ("{tiny}", "--set", "sampling.steps=0"),
            "--set sampling.steps: 0 is not allowed: must be at least 1.",
        ),
        (("{tiny}", "--set", "phases.0.images=-5"), "--set phases.0.images: -5 is not allowed: must be"),
        (
            ("{tiny}", "--name", "x", "--set", "data.store=plain", "--set", "model.patch_size=5"),
            "model.patch_size: 5 does not divide the 32 x 32 latents of 32 px. Use a size that is a multiple",
        ),
        (("{tiny}", "--device", "tpu"), "device 'tpu': unknown. Use auto, cpu, cuda, cuda:N or mps."),
        (("{tiny}", "--device", "meta"), "device 'meta': not available here. Use --device cpu or auto."),
        (("{tiny}", "--dtype", "float8"), "--set train.dtype: 'float8' is unknown."),
    ],
)
def test_a_mistake_is_one_line_and_leaves_everything_as_it_was(
    words: tuple[str, ...], message: str, here: Path, tiny: Path, command: Any, tree: Any
) -> None:
    before = tree(here)
    error = command("train", *(word.format(tiny=tiny) for word in words)).refused()
    assert message in error
    assert tree(here) == before


def test_a_missing_tracker_is_said_before_anything_is_written(
    here: Path, tiny: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = ("train", tiny, "--name", "new", "--set", "train.trackers=[wandb]")
    assert "pip install 'shoestring[wandb]'" in command(*words).refused()
    assert not (here / "runs/new").exists()


@pytest.mark.parametrize(
    ("word", "place", "seen"),
    [
        ("recipe.yaml", "runs/new/recipe.yaml", 0),
        ("transformer", "runs/new/pipeline", 0),  # as a whole
        ("ledger", "runs/new/ledger.json", 0),
        ("000000000192", "runs/new/checkpoints/000000000192", 96),  # PyTorch's writer, in the middle
        ("previews", "runs/new/previews/000000192.png", 96),
    ],
)
def test_a_disk_that_fills_up_is_told_and_the_run_goes_on_afterwards(
    word: str,
    place: str,
    seen: int,
    here: Path,
    tiny: Path,
    command: Any,
    full_disk: Callable[[str], Any],
    metrics: Any,
) -> None:
    words = ("train", tiny, "--name", "new")
    with full_disk(word):
        error = command(*words).refused()
    assert error.startswith(f"{place}: the disk is full (")
    assert "Nothing half-written was kept; free some space" in error
    assert not list(here.rglob("*.partial"))
    assert [int(path.name) for path in here.glob("runs/new/checkpoints/*")] == ([seen] if seen else [])
    if word == "000000000192":
        assert command(*words, "--resume").code == 0
        assert metrics(here / "runs/new") == metrics(here / "runs/tiny")
        assert same(here / "runs/new", here / "runs/tiny")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_files_that_the_system_refuses_to_grow_are_told(here: Path, tiny: Path) -> None:
    """A real refusal (RLIMIT_FSIZE) through PyTorch's and safetensors' own writers."""
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    words = [sys.executable, "-m", "shoestring", "train", str(tiny), "--name", "new"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: runs/new/")
    assert "cannot be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(here.rglob("*.partial"))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_is_said_before_training(
    code: int, here: Path, tiny: Path, command: Any, monkeypatch: pytest.MonkeyPatch, tree: Any
) -> None:
    mkdir = Path.mkdir

    def refusing(self: Path, *arguments: Any, **named: Any) -> None:
        if self.name == "new":
            raise OSError(code, os.strerror(code), str(self))
        mkdir(self, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", refusing)
    before = tree(here)
    error = command("train", tiny, "--name", "new").refused()
    assert error.startswith("runs/new/")
    assert f"cannot be written ({os.strerror(code)}). Choose another folder" in error
    assert tree(here) == before


def test_a_store_may_move_but_not_change_under_a_run(
    here: Path, tiny: Path, command: Any, metrics: Any
) -> None:
    """Checkpoints know the hashes of what they were trained on."""
    words = ("train", tiny, "--set", "phases.0.size=32", "--set", "train.keep=9")
    for name in ("stays", "moves"):
        assert command(*words, "--set", "data.store=plain", "--name", name).code == 0
    for checkpoint in (here / "runs" / "moves" / "checkpoints").glob("[0-9]*"):
        if int(checkpoint.name) > 192:
            (checkpoint / "COMMITTED").unlink()
    error = command(*words, "--set", "data.store=parted", "--name", "moves", "--resume").refused()
    assert "was trained on other data than parted holds now" in error
    shutil.move("plain", "elsewhere")
    assert command(*words, "--set", "data.store=elsewhere", "--name", "moves", "--resume").code == 0
    assert metrics(Path("runs/moves")) == metrics(Path("runs/stays"))
