"""Runs side by side: every figure of each, what differs, and nothing that would mislead."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoestring.errors import CheckpointError, OutputError, RecipeError
from shoestring.storage import RunFolder, read_json, write_json
from shoestring.training.compare import LETTERS, read_runs, text_table, write_comparison
from shoestring.training.comparison import cautions, comparison

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(name, images=..., ...)`: a run of two phases of that many images, half and half."""

    def make(
        name: str,
        images: int = 1000,
        loss: float = 1.0,
        done: int | None = None,
        folder: str = "",
        **recipe: Any,
    ) -> Path:
        run = RunFolder(tmp_path / "runs" / (folder or name))
        run.root.mkdir(parents=True)
        phases = [
            {"name": part, "size": 32, "images": images // 2, "lr": 0.001} for part in ("masked", "dense")
        ]
        whole = {"name": name, "model": {"depth": 4, "mlp_ratio": [0.5, 4.0]}, "phases": phases, **recipe}
        run.recipe.write_text(yaml.safe_dump(whole))
        seen = images if done is None else done
        with open(run.metrics, "w") as file:
            for n in range(10, seen + 1, 10):
                masked = n <= images // 2
                record = {
                    "kind": "train",
                    "images": n,
                    "step": n // 10,
                    "phase": "masked" if masked else "dense",
                }
                record |= {
                    "loss": loss * (2 if masked else 1),
                    "lr": 0.001,
                    "grad_norm": 0.5,
                    "data_wait": 0.25,
                }
                record |= {
                    "images_per_second": 20.0,
                    "seconds": n / 20,
                    "flops": n * 1e9,
                    "memory_bytes": 2**30,
                }
                file.write(json.dumps(record | {"by_noise": {"-2": loss, "1": 2 * loss}}) + "\n")
                if n % 100 == 0:
                    by_noise = {"-2.0": loss / 2, "1.0": loss}
                    record = {"kind": "held_out", "images": n, "loss": 0.75 * loss, "by_noise": by_noise}
                    file.write(json.dumps(record) + "\n")
        total = {"images": seen, "steps": seen // 10, "flops": seen * 1e9, "seconds": seen / 20}
        total |= {"data_wait_seconds": seen / 100, "peak_memory_bytes": 2**31}
        machine = {"hardware": "Abacus 3000", "device": "cpu", "threads": 2, "dtype": "float32"}
        extra = {"checkpoint_seconds": 61.0}
        write_json(
            run.ledger, machine | {"parameters": 2_000_000, "phases": [], "total": total, "extra": extra}
        )
        row = {
            "metric": "scene_accuracy",
            "split": "unseen_scenes",
            "facet": "all",
            "status": "exact",
            "n": 9,
        }
        rows = [row | {"value": 0.9, "low": 0.85, "high": 0.93}]
        rows.append(row | {"metric": "parser_ceiling", "value": 1.0, "low": 0.9, "high": 1.0})
        rows.append(row | {"metric": "held_out_loss", "value": loss / 3, "low": 0.1, "high": None})
        write_json(run.evaluation, {"rows": rows, "settings": {"steps": 8, "seeds": 3}})
        return run.root

    return make


def cells(*paths: Path) -> dict[str, list[str]]:
    """Every row of the comparison by its label."""
    return {label: found for block in comparison(read_runs(paths)) for label, found in block.rows}


def charts(out: Path) -> dict[str, str]:
    found = re.findall(r'<figure class="chart"><figcaption>(.*?)</figcaption>(.*?)</figure>', out.read_text())
    return {f"{title} {number}": figure for number, (title, figure) in enumerate(found)}


def test_the_table_tells_what_each_run_is_and_cost(make_run: MakeRun) -> None:
    rows = cells(make_run("one"), make_run("two", images=2000, loss=3.0))
    for label, expected in {
        "progress": ["finished", "finished"],
        "images": ["1,000", "2,000"],
        "steps": ["100", "200"],
        "parameters": ["2M", "2M"],
        "training loss at the end": ["1", "3"],
        "training loss at 1,000 images": ["1", "6"],
        "held-out loss, the last": ["0.75", "2.25"],
        "  after images": ["1,000", "2,000"],
        "scene accuracy, unseen scenes": ["90.0 % (85.0 – 93.0)"] * 2,
        "held out loss, unseen scenes": ["0.3333", "1"],
        "time in steps": ["0:50", "1:40"],
        "  checkpoint": ["1:01", "1:01"],
        "images/s": ["20", "20"],
        "computation": ["1 TFLOP", "2 TFLOP"],
        "FLOP/s": ["20 GFLOP/s", "20 GFLOP/s"],
        "waiting for data": ["20.0 %", "20.0 %"],
        "peak memory": ["2.00 GiB", "2.00 GiB"],
        "machine": ["Abacus 3000", "Abacus 3000"],
        "how": ["cpu, float32, 2 threads"] * 2,
    }.items():
        assert rows[label] == expected, label
    assert not [label for label in rows if "ceiling" in label]


def test_only_settings_that_differ_are_told_and_phases_go_by_name(make_run: MakeRun) -> None:
    one = make_run("one", seed=1, train={"keep": 2, "ema": None})
    phases = [
        {"name": "warm", "size": 32, "images": 100, "lr": 0.1, "mask": {"start": 0.75}},
        {"name": "masked", "size": 32, "images": 500, "lr": 0.002},
        {"name": "dense", "size": 32, "images": 500, "lr": 0.001},
    ]
    two = make_run("two", seed=1, train={"keep": 3}, model={"depth": 4, "mlp_ratio": [1, 4.0]}, phases=phases)
    (settings, *_) = comparison(read_runs([one, two]))
    assert settings.title == "Recipe, where it differs"
    assert dict(settings.rows) == {
        "model.mlp_ratio": ["[0.5, 4.0]", "[1, 4.0]"],
        "train.ema": ["null", "–"],
        "train.keep": ["2", "3"],
        "phases.masked.lr": ["0.001", "0.002"],
        "phases.warm": ["–", 'size 32, images 100, mask {"start": 0.75}, lr 0.1'],
    }


def test_runs_of_one_recipe_have_no_block_of_settings(make_run: MakeRun) -> None:
    assert comparison(read_runs([make_run("one"), make_run("two")]))[0].title == "Training"


def test_curves_of_all_runs_share_their_axes(make_run: MakeRun, tmp_path: Path, sources_of: Any) -> None:
    runs = read_runs([make_run("one"), make_run("two", images=2000), make_run("bare <b>", done=0)])
    out = write_comparison(runs, tmp_path / "compare.html")
    assert sources_of(out.read_text()) == []
    drawn = charts(out)
    titles = [title.rsplit(" ", 1)[0] for title in drawn]
    assert titles == [
        *("Loss", "Loss by training time", "Loss by computation", "Held-out loss", "Gradient norm"),
        *("Learning rate", "Images a second", "Waiting for data, % of the time"),
        *("log σ -2", "log σ 1", "log σ -2", "log σ 1"),
    ]
    for title, figure in drawn.items():
        labels = re.findall(r'<text class="end (r\d)"[^>]*>(\w)</text>', figure)
        assert sorted(labels) == [("r0", "A"), ("r1", "B")], title
        assert [name for name in ("one", "two") if f"<title>{name}</title>" in figure] == ["one", "two"]
        assert figure.count("<circle") == 2, "a ring where the first phase ends"
    loss = drawn["Loss 0"]
    ends = {
        run: path.split("L")[-1].split() for run, path in re.findall(r'class="line (r\d)" d="M(.*?)"', loss)
    }
    assert float(ends["r0"][0]) - 52 == pytest.approx((float(ends["r1"][0]) - 52) / 2, abs=0.2), "half as far"
    assert ends["r0"][1] == ends["r1"][1], "the same loss at the same height"
    text = out.read_text()
    for told in ("bare &lt;b&gt;", "nothing recorded yet", "minutes", "TFLOP", "In numbers"):
        assert told in text, told


def test_runs_of_very_different_lengths_are_drawn_on_a_logarithmic_axis(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = read_runs([make_run("short", images=100), make_run("long", images=10_000)])
    figure = charts(write_comparison(runs, tmp_path / "compare.html"))["Loss 0"]
    ticks = re.findall(r'text-anchor="middle">([\w.]+)</text>', figure)
    assert ticks == ["10", "100", "1k", "10k", "images"]
    starts = {run: float(x) for run, x in re.findall(r'class="line (r\d)" d="M([\d.]+) ', figure)}
    assert starts["r0"] == 52
    short = re.findall(r'class="line r0" d="M(.*?)"', figure)[0].split("L")[-1]
    assert float(short.split()[0]) == pytest.approx(52 + (420 - 12 - 52) / 3, abs=1), "100 of 10 to 10,000"


def test_a_run_in_progress_goes_by_its_newest_record(make_run: MakeRun) -> None:
    """The ledger of the last checkpoint stands behind; a line that is being written is passed over."""
    path = make_run("going", images=2000, done=1500)
    ledger = read_json(path / "ledger.json")
    ledger["total"] |= {"images": 1000, "seconds": 50.0, "flops": 1e12, "steps": 100}
    write_json(path / "ledger.json", ledger)
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "images": 15')
    rows = cells(path, make_run("other", images=2000))
    assert rows["progress"] == ["75 % of 2,000", "finished"]
    assert rows["images"] == ["1,500", "2,000"]
    assert rows["steps"] == ["150", "200"]
    assert rows["time in steps"] == ["1:15", "1:40"]
    assert rows["computation"] == ["1.5 TFLOP", "2 TFLOP"]
    assert rows["training loss at 1,500 images"] == ["1", "1"]


@pytest.mark.parametrize("gone", ["metrics.jsonl", "ledger.json", "evaluation.json"])
@pytest.mark.parametrize("how", ["missing", "broken"])
def test_what_a_run_has_not_is_a_dash(
    make_run: MakeRun, tmp_path: Path, gone: str, how: str, sources_of: Any
) -> None:
    one, two = make_run("one"), make_run("two")
    if how == "missing":
        (two / gone).unlink()
    else:
        (two / gone).write_bytes(b'{"rows": [1, \xff')
    known = {
        "metrics.jsonl": ("training loss at the end", "held-out loss, the last"),
        "ledger.json": ("parameters", "  checkpoint", "machine", "how"),
        "evaluation.json": ("scene accuracy, unseen scenes", "held out loss, unseen scenes"),
    }
    rows = cells(one, two)
    for file, labels in known.items():
        for label in labels:
            assert (rows[label][1] == "–") == (file == gone), label
            assert rows[label][0] != "–"
    runs = read_runs([one, two])
    sources_of(write_comparison(runs, tmp_path / "compare.html").read_text())
    assert text_table(runs)


def test_two_runs_that_have_only_begun_can_be_compared(make_run: MakeRun, tmp_path: Path) -> None:
    paths = [make_run("one"), make_run("two")]
    for path in paths:
        for file in ("metrics.jsonl", "ledger.json", "evaluation.json"):
            (path / file).unlink()
    runs = read_runs(paths)
    assert "<h2>Curves</h2>" not in write_comparison(runs, tmp_path / "compare.html").read_text()
    assert text_table(runs).splitlines()[-1].split() == ["progress", *["0", "%", "of", "1,000"] * 2]


def test_what_cannot_be_compared_as_it_stands_is_said(make_run: MakeRun, tmp_path: Path) -> None:
    one = make_run("one", objective={"kind": "edm"}, data={"store": "a"})
    two = make_run("two", objective={"kind": "flow"}, data={"store": "b"}, evaluation={"loss_images": 8})
    alike = make_run("alike", objective={"kind": "edm"}, data={"store": "a"})
    write_json(two / "ledger.json", read_json(two / "ledger.json") | {"hardware": "Other"})
    evaluation = read_json(two / "evaluation.json")
    write_json(two / "evaluation.json", evaluation | {"settings": {"steps": 16, "seeds": 3}})
    assert cautions(read_runs([one, alike])) == []
    runs = read_runs([one, two])
    told = cautions(runs)
    assert [re.findall(r"objectives|data,|Held-out|different settings|machines", each) for each in told] == [
        *(["objectives"], ["data,"], ["Held-out"], ["different settings"], ["machines"])
    ]
    assert cells(one, two)["measured with steps"] == ["8", "16"]
    assert "measured with seeds" not in cells(one, two)
    page = write_comparison(runs, tmp_path / "compare.html").read_text()
    assert all(each in page and f"Caution: {each}" in text_table(runs) for each in told)


def test_the_text_is_a_table_of_aligned_columns(make_run: MakeRun) -> None:
    paths = [make_run(f"run-{k}", model={"kind": "long " * k * 9}) for k in range(8)]
    lines = text_table(read_runs(paths)).splitlines()
    starts = [lines[0].index(f"{letter} run-{k}") for k, letter in enumerate(LETTERS)]
    (images,) = [line for line in lines if line.startswith("  images  ")]
    assert [images.index("1,000", start) for start in starts] == starts
    assert all(line[start - 1] == " " for line in lines for start in starts if len(line) >= start)
    assert "…" in next(line for line in lines if "model.kind" in line)


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run: MakeRun) -> None:
    runs = read_runs([make_run("demo", folder="here/demo"), make_run("demo", folder="there/demo")])
    head = text_table(runs).splitlines()[0].split()
    assert head == ["A", str(runs[0].folder.root)[:21] + "…", "B", str(runs[1].folder.root)[:21] + "…"]


def test_what_cannot_be_compared_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    one = make_run("one")
    (tmp_path / "link").symlink_to(one)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="1 run to compare: give two to 8"):
        read_runs([one])
    with pytest.raises(RecipeError, match="9 runs to compare: give two to 8"):
        read_runs([make_run(f"run-{k}") for k in range(9)])
    with pytest.raises(RecipeError, match=r"link: the same run as .*one\. Give each run once"):
        read_runs([one, tmp_path / "link"])
    with pytest.raises(CheckpointError, match=r"empty: not a run folder \(no recipe.yaml in it\)"):
        read_runs([one, tmp_path / "empty"])


def test_a_folder_is_never_overwritten_by_the_page(make_run: MakeRun, tmp_path: Path) -> None:
    runs = read_runs([make_run("one"), make_run("two")])
    with pytest.raises(OutputError, match=r"runs: is a folder\. Give --out a file, such as .*compare.html"):
        write_comparison(runs, tmp_path / "runs")
    assert (tmp_path / "runs/one/recipe.yaml").is_file()
