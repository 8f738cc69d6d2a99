"""A report holds everything a run left, needs nothing else, and survives any file missing or broken."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shoestring.storage import RunFolder, read_json, write_json
from shoestring.training.report import write_report


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of two phases with everything that training and evaluation leave."""
    run = RunFolder(tmp_path / "tiny")
    run.root.mkdir()
    run.recipe.write_text("name: tiny <run>\nphases:\n- name: masked\n", encoding="utf-8")
    phases = [
        {
            "name": "masked",
            "size": 32,
            "mask": 0.5,
            "images": 600,
            "steps": 60,
            "flops": 2e12,
            "seconds": 30.0,
        },
        {
            "name": "dense",
            "size": 32,
            "mask": 0.0,
            "images": 400,
            "steps": 40,
            "flops": 3e12,
            "seconds": 35.0,
        },
    ]
    records: list[dict[str, object]] = [
        {"kind": "train", "images": n, "phase": "masked" if n <= 600 else "dense", "loss": 1 / n, "lr": 1e-3}
        | {"grad_norm": 0.5, "images_per_second": 20.0, "seconds": n / 20, "mask": 0.5 if n <= 600 else 0.0}
        | {"data_wait": 0.125, "memory_bytes": 2**30 + n, "by_noise": {"-2": 0.2, "1": 0.6, "-6": 0.1}}
        for n in range(10, 1001, 10)
    ]
    for record in records[::2]:  # few images are drawn at this noise level
        del record["by_noise"]["-6"]  # type: ignore[attr-defined]
    for record in records[1:80:2]:
        del record["by_noise"]["-6"]  # type: ignore[attr-defined]
    records.append({"kind": "held_out", "images": 500, "loss": 0.3, "by_noise": {"-2.0": 0.1, "1.0": 0.5}})
    records.append({"kind": "held_out", "images": 1000, "loss": 0.2, "by_noise": {"-2.0": 0.1, "1.0": 0.3}})
    records.append({"kind": "event", "images": 600, "text": "resumed & went on"})
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    total = {"images": 1000, "steps": 100, "flops": 5e12, "seconds": 65.0, "peak_memory_bytes": 2**30}
    machine = {"hardware": "Abacus 3000 x 2", "device": "cpu", "threads": 2, "dtype": "float32"}
    write_json(run.ledger, machine | {"parameters": 2_000_000, "phases": phases, "total": total, "extra": {}})
    facets = ("shape", "colour", "place", "count", "background", "all")
    row = {"split": "unseen_scenes", "value": 0.9, "low": 0.85, "high": 0.93, "n": 256, "status": "exact"}
    rows = [row | {"metric": "scene_accuracy", "facet": facet} for facet in facets]
    rows.append(row | {"metric": "parser_ceiling", "facet": "all", "value": 0.995})
    rows.append(row | {"metric": "held_out_loss", "facet": "all", "value": 0.1234})
    write_json(run.evaluation, {"rows": rows, "settings": {}})
    folder = run.samples / "unseen_scenes"
    folder.mkdir(parents=True)
    index = []
    for k, right in enumerate((True, False)):
        Image.fromarray(np.full((8, 8, 3), 99 * k, np.uint8)).save(folder / f"0000{k}.png")
        entry = {"file": f"0000{k}.png", "prompt": f"prompt <{k}>", "seed": 0}
        index.append(entry | {"facets": {"shape": right, "count": True, "all": right}})
    write_json(folder / "index.json", index)
    run.previews.mkdir()
    Image.fromarray(np.zeros((700, 700, 3), np.uint8)).save(run.previews / "000000500.png")
    write_json(run.previews / "000000500.json", {"prompts": ["a preview prompt"], "images": 500})
    return run


def report_of(run: RunFolder) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_report_tells_what_every_file_holds(run: RunFolder) -> None:
    text = report_of(run)
    for told in [
        "tiny &lt;run&gt;",
        "Abacus 3000 x 2",
        "90.0 %",
        "85.0 – 93.0",
        "99.5 %",
        "0.1234",
        "prompt &lt;0&gt;",
        "✓ right",
        "✗ wrong shape",
        "500 images",
        "a preview prompt",
        "log σ -2",
        "resumed &amp; went on",
        "5 TFLOP",
        "1.00 GiB",
        "1:05",
        "2,000,000 parameters",
        "- name: masked",
    ]:
        assert told in text, told


def test_report_is_one_file_of_sound_html(run: RunFolder, sources_of: Any) -> None:
    assert len(sources_of(report_of(run))) == 3


def figures(run: RunFolder) -> dict[str, str]:
    """The report's curves by their titles."""
    found = re.findall(r'<figure class="chart"><figcaption>(.*?)</figcaption>(.*?)</figure>', report_of(run))
    return dict(found)


def test_every_kind_of_record_has_its_curve_and_phases_are_named_in_it(run: RunFolder) -> None:
    drawn = figures(run)
    assert list(drawn) == [
        "Loss",
        "Loss by noise level",
        "Held-out loss by noise level",
        "Loss by training time",
        "Gradient norm",
        "Learning rate",
        "Images a second",
        "Waiting for data, % of the time",
        "Peak memory of the phase, GiB",
    ]
    for title, figure in drawn.items():
        named = [f"<title>{name}</title>" in figure for name in ("masked", "dense")]
        assert all(named) if title != "Loss by training time" else not any(named)


def test_a_noise_level_met_too_seldom_is_no_curve(run: RunFolder) -> None:
    assert re.findall(r"</i>(.*?)</span>", figures(run)["Loss by noise level"]) == ["log σ -2", "log σ 1"]


def with_records(run: RunFolder, records: list[dict[str, Any]]) -> None:
    with open(run.metrics, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_a_mask_that_changes_within_a_phase_is_drawn(run: RunFolder) -> None:
    assert "Patches left out, %" not in figures(run)
    with_records(run, [{"kind": "train", "images": 1010, "phase": "dense", "loss": 1.0, "mask": 0.25}])
    figure = figures(run)["Patches left out, %"]
    (path,) = re.findall(r'class="line s0" d="M(.*?)"', figure)
    heights = [float(point.split()[1]) for point in path.split("L")]
    assert min(heights) == heights[0], "half of the patches is the most"
    assert heights[-1] == pytest.approx((heights[0] + heights[-2]) / 2, abs=0.1), "a quarter lies halfway"


def test_experts_are_drawn_layer_by_layer_where_there_are_any(run: RunFolder) -> None:
    titles = {"Tokens that no expert takes, %", "Tokens that three or more take, %"}
    assert not titles & set(figures(run))
    load = {"unused": 0.2, "many": 0.1, "heaviest": 2.0, "lightest": 0.25}
    experts = {"patch_mixer.1": load, "transformer_blocks.1": load | {"lightest": 0.5}}
    more = {"loss": 0.1, "by_noise": {"-2.0": 0.1}, "experts": experts}
    with_records(run, [{"kind": "held_out", "images": images, **more} for images in (1010, 1020)])
    drawn = figures(run)
    assert titles < set(drawn)
    both = drawn["Heaviest and lightest expert, 1 is even"]
    assert both.count('class="line') == 4
    assert re.findall(r"</i>(.*?)</span>", both) == ["patch_mixer.1", "transformer_blocks.1"]


def test_cost_tells_waiting_and_the_time_besides_the_steps(run: RunFolder) -> None:
    ledger = read_json(run.ledger)
    ledger["phases"][0] |= {"data_wait_seconds": 1.5, "mask": 0.75, "mask_end": 0.5}
    ledger["total"]["data_wait_seconds"] = 1.5
    ledger["extra"] = {"checkpoint_seconds": 5.0, "preview_seconds": 30.0}
    ledger["processes"] = 4
    write_json(run.ledger, ledger)
    text = report_of(run)
    for told in (
        "75 % → 50 %",
        "5.0 %",  # of the first phase
        "2.3 %",  # of the whole
        "checkpoint 0:05 (5.0 %), preview 0:30 (30.0 %); 1:40 in all",
        "4 processes",
    ):
        assert told in text, told


def test_a_run_in_progress_is_ahead_of_its_ledger(run: RunFolder) -> None:
    """The ledger is written at checkpoints; the head and the bands go by the newest record."""
    with_records(
        run, [{"kind": "train", "images": 1500, "phase": "third", "loss": 0.1, "seconds": 80, "flops": 9e12}]
    )
    text = report_of(run)
    assert "<b>1,500</b>" in text
    assert "<b>1:20</b>" in text
    assert "<b>9 TFLOP</b>" in text
    assert "The 500 images since the last checkpoint are not in it yet." in text
    assert "<title>third</title>" in text


@pytest.mark.parametrize(
    "gone", ["recipe.yaml", "metrics.jsonl", "ledger.json", "evaluation.json", "samples", "previews"]
)
@pytest.mark.parametrize("how", ["missing", "broken"])
def test_any_file_may_be_missing_or_broken(run: RunFolder, gone: str, how: str, sources_of: Any) -> None:
    path = run.root / gone
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.unlink() if how == "missing" else file.write_bytes(b'{"half": [1, \xff')
    text = report_of(run)
    sources_of(text)
    assert ("2,000,000 parameters" in text) == (gone != "ledger.json")
    assert ("90.0 %" in text) == (gone != "evaluation.json")
    assert ("✓ right" in text) == (gone != "samples")


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    assert "Nothing has been recorded" in report_of(RunFolder(tmp_path))


def test_figures_that_are_not_finite_do_not_break_the_curves(run: RunFolder) -> None:
    with open(run.metrics, "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "images": 1010, "loss": NaN, "lr": null, "seconds": Infinity}\n')
    assert "nan" not in "".join(re.findall(r"<path.*?>", report_of(run))).lower()


def test_large_pictures_are_made_small(run: RunFolder) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3)).astype(np.uint8)
    Image.fromarray(noise).save(run.previews / "000001000.png")
    assert (run.previews / "000001000.png").stat().st_size > 3e6
    assert len(report_of(run)) < 1e6
