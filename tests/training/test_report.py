"""A report holds everything a run left, needs nothing else, and survives any file missing or broken."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from shoestring.storage import RunFolder, write_json
from shoestring.training.report import write_report
from shoestring.training.svg import Line, bar, chart, short, smoothed, thinned, ticks

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Balanced(HTMLParser):
    """Checks that every element is closed in order, and collects the links and sources."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag closed in itself."""


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
        | {"grad_norm": 0.5, "images_per_second": 20.0, "seconds": n / 20}
        for n in range(10, 1001, 10)
    ]
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


def test_report_is_one_file_of_sound_html(run: RunFolder) -> None:
    text = report_of(run)
    page = Balanced(text)
    assert page.open == []
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "<script" not in text
    assert "http" not in text
    for svg in re.findall(r"<svg.*?</svg>", text):
        ElementTree.fromstring(svg)


def test_phases_are_named_in_every_curve(run: RunFolder) -> None:
    for name in ("masked", "dense"):
        assert report_of(run).count(f"<title>{name}</title>") == 5


@pytest.mark.parametrize(
    "gone", ["recipe.yaml", "metrics.jsonl", "ledger.json", "evaluation.json", "samples", "previews"]
)
@pytest.mark.parametrize("how", ["missing", "broken"])
def test_any_file_may_be_missing_or_broken(run: RunFolder, gone: str, how: str) -> None:
    path = run.root / gone
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.unlink() if how == "missing" else file.write_bytes(b'{"half": [1, \xff')
    text = report_of(run)
    assert Balanced(text).open == []
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


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (0.03, 0.9, True), (3, 3.2, True), (5, 6e6, True)]
)
def test_ticks_are_three_to_seven_round_values_inside(low: float, high: float, log: bool) -> None:
    values = ticks(low, high, log)
    assert 3 <= len(values) <= 7
    assert values == sorted(values)
    assert low <= values[0]
    assert values[-1] <= high * (1 + 1e-9)
    assert all(len(short(value)) <= 6 for value in values)


def test_curves_lie_inside_the_drawing_and_higher_values_are_higher() -> None:
    text = chart("t", [Line([(0, 1.0), (50, 10.0), (100, 100.0)])], log=True)
    (path,) = re.findall(r'class="line s0" d="M(.*?)"', text)
    points = np.array([[float(each) for each in point.split()] for point in path.split("L")])
    assert (np.diff(points[:, 1]) < 0).all()
    assert points[1, 1] == pytest.approx(points[::2, 1].mean(), abs=0.2), "10 is halfway from 1 to 100"
    assert points.min() >= 0
    assert points[:, 0].max() <= 420


def test_a_smoothed_line_stays_straight_and_calms_noise() -> None:
    line = [(float(x), 2.0 * x) for x in range(1000)]
    inner = [(x, y) for x, y in smoothed(line) if 100 < x < 900]
    assert all(y == pytest.approx(2 * x, rel=1e-6) for x, y in inner)
    noise = np.random.default_rng(0).normal(size=1000)
    calm = [y for _, y in smoothed(list(enumerate(noise)))]
    assert np.std(calm) < 0.25


def test_thinning_keeps_highs_and_lows() -> None:
    values = np.random.default_rng(0).normal(size=5000)
    thin = thinned(list(enumerate(values)))
    assert len(thin) <= 700
    assert max(y for _, y in thin) == values.max()
    assert min(y for _, y in thin) == values.min()
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)


def test_a_bar_is_as_long_as_its_share() -> None:
    drawn = ElementTree.fromstring(bar(0.25, 0.2, 0.3))
    track, fill = drawn.findall("rect")
    assert float(fill.attrib["width"]) / float(track.attrib["width"]) == 0.25
