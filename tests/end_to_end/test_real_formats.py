"""The same pictures and captions in every form a data set comes in give the same store."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shoestring.cli.main import main
from shoestring.data.store import Store

Rows = list[tuple[bytes, list[str]]]


@pytest.fixture(scope="module", params=["drawings", "emoji"])
def rows(request: pytest.FixtureRequest) -> Rows:
    """Encoded pictures with two captions each: drawn shapes always, emoji where they are."""
    source: Path = request.getfixturevalue(request.param)
    if request.param == "drawings":
        records = [json.loads(line) for line in (source / "metadata.jsonl").open()]
        return [((source / each["file_name"]).read_bytes(), each["text"]) for each in records]
    return [
        (each["image"]["bytes"], [each["text"], f"emoji: {each['text']}"])
        for each in pq.read_table(source).to_pylist()
    ]


def _pictures(rows: Rows, folder: Path) -> list[str]:
    names = [f"{number:03d}.png" for number in range(len(rows))]
    for name, (image, _) in zip(names, rows, strict=True):
        (folder / name).write_bytes(image)
    return names


def sidecars(rows: Rows, folder: Path) -> Path:
    for name, (_, captions) in zip(_pictures(rows, folder), rows, strict=True):
        (folder / name).with_suffix(".txt").write_text("\n".join(captions))
    return folder


def metadata_jsonl(rows: Rows, folder: Path) -> Path:
    names = _pictures(rows, folder)
    lines = [
        json.dumps({"file_name": n, "text": captions}) for n, (_, captions) in zip(names, rows, strict=True)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def metadata_csv(rows: Rows, folder: Path) -> Path:
    """A line for each caption, since a cell holds one."""
    names = _pictures(rows, folder)
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption"])
        writer.writerows((n, text) for n, (_, texts) in zip(names, rows, strict=True) for text in texts)
    return folder


def metadata_parquet(rows: Rows, folder: Path) -> Path:
    names, captions = _pictures(rows, folder), [texts for _, texts in rows]
    pq.write_table(pa.table({"file_name": names, "captions": captions}), folder / "metadata.parquet")
    return folder


def tars(rows: Rows, folder: Path) -> Path:
    """WebDataset, two shards, one with captions as text and one as JSON."""
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * len(rows) // 2, (shard + 1) * len(rows) // 2):
                image, captions = rows[number]
                text = ("txt", "\n".join(captions)) if shard else ("json", json.dumps({"captions": captions}))
                for extension, data in (("png", image), (text[0], text[1].encode())):
                    entry = tarfile.TarInfo(f"./{number:06d}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return folder


def parquet_of_bytes(rows: Rows, folder: Path) -> Path:
    table = pa.table({"jpg": [image for image, _ in rows], "text": [captions for _, captions in rows]})
    pq.write_table(table, folder / "part.parquet", row_group_size=7)
    return folder / "part.parquet"


def parquet_of_the_hub(rows: Rows, folder: Path) -> Path:
    """As `push_to_hub` writes it: {bytes, path}, files named after the split."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (folder / "data").mkdir()
    for part in range(2):
        some = rows[part * len(rows) // 2 : (part + 1) * len(rows) // 2]
        images = pa.array([{"bytes": image, "path": None} for image, _ in some], kind)
        table = pa.table({"image": images, "text": [captions for _, captions in some]})
        pq.write_table(table, folder / "data" / f"train-{part:05d}-of-00002.parquet")
        pq.write_table(table, folder / "data" / f"test-{part:05d}-of-00002.parquet")
    return folder


def saved_by_datasets(rows: Rows, folder: Path) -> Path:
    """`save_to_disk` of a set with splits."""
    import datasets

    pictures = {"image": [{"bytes": image, "path": None} for image, _ in rows]}
    captions = {"text": [captions for _, captions in rows]}
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    train = datasets.Dataset.from_dict(pictures | captions, features=kinds)
    datasets.disable_progress_bars()
    datasets.DatasetDict(train=train, test=train.select(range(3))).save_to_disk(str(folder / "set"))
    return folder / "set"


FORMS = [
    sidecars,
    metadata_jsonl,
    metadata_csv,
    metadata_parquet,
    tars,
    parquet_of_bytes,
    parquet_of_the_hub,
    saved_by_datasets,
]


def encode(folder: Path, *words: object) -> Store:
    """A store of what the words name, by the command line."""
    with contextlib.chdir(folder), pytest.raises(SystemExit) as ended:
        main(["encode", *map(str, words), "--out", "store"])
    assert not ended.value.code
    return Store.open(folder / "store")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_the_same_pictures_and_all_captions(
    form: Callable[[Rows, Path], Path], rows: Rows, tmp_path: Path
) -> None:
    """Against Pillow reading the files and the captions as they were given; nothing is left out."""
    (tmp_path / "set").mkdir()
    store = encode(tmp_path, form(rows, tmp_path / "set"), "--chunk-rows", 20)
    assert len(store) == len(rows)
    assert [store.captions(row) for row in range(len(rows))] == [captions for _, captions in rows]
    for number in range(0, len(rows), 9):
        picture = Image.open(io.BytesIO(rows[number][0])).convert("RGB")
        small = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC))
        values = ((store.latents(32, np.array([number]))[0] + 1) * 127.5).round()
        assert np.array_equal(values.permute(1, 2, 0).numpy(), small)


def test_a_split_is_chosen_by_name(rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    place = saved_by_datasets(rows, tmp_path / "set")
    assert len(encode(tmp_path, place, "--split", "test")) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--split", "validation"), "no split 'validation'; there are: train, test. Use --split."),
        (("--caption-column", "alt"), "no text column 'alt'; there are: text."),
    ],
)
def test_what_a_saved_set_does_not_hold_is_refused(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    white = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(white, "PNG")
    place = saved_by_datasets([(white.getvalue(), ["white"])] * 4, tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["encode", str(place), "--out", str(tmp_path / "store"), *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_damaged_saved_set_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        main(["encode", str(tmp_path), "--out", str(tmp_path / "store")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a data set saved by `datasets` that cannot be read" in line


# --- odd pictures ----------------------------------------------------------------------------------------


def _files(folder: Path) -> dict[str, Any]:
    """One red picture in many guises, three that must be left out among them."""
    red, exif = Image.new("RGB", (48, 40), (255, 0, 0)), Image.Exif()
    exif[0x0112] = 6
    clear = Image.new("RGBA", (48, 40), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 48, 40))
    guises: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "plain.png": (red, {}),
        "palette.png": (red.quantize(4), {}),
        "palette.gif": (red.quantize(4), {}),
        "alpha.png": (clear, {}),
        "alpha.webp": (clear, {"lossless": True}),
        "animated.gif": (red, {"save_all": True, "append_images": [Image.new("RGB", (48, 40), "blue")]}),
        "turned.png": (red, {"exif": exif}),
        "cmyk.jpg": (red.convert("CMYK"), {"quality": 95}),
        "photo.JPG": (red, {"quality": 95}),
        "mapped.bmp": (red, {}),
        "strips.tiff": (red, {}),
        "wide.png": (red.resize((4000, 32)), {}),
        "small.png": (red.resize((31, 31)), {}),
        "float.tif": (Image.new("F", (48, 40), 0.5), {}),
    }
    for name, (picture, options) in guises.items():
        picture.save(folder / name, **options)
    (folder / "cut.png").write_bytes((folder / "plain.png").read_bytes()[:80])
    return guises


def test_odd_pictures_are_read_rightly_or_named(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    names = [*_files(tmp_path / "odd"), "cut.png"]
    for name in names:
        (tmp_path / "odd" / name).with_suffix(".txt").write_text(f"red, {name}")
    store = encode(tmp_path, "odd", "--max-bad", 0.5)
    listed = [json.loads(line) for line in (tmp_path / "store/skipped.jsonl").read_text().splitlines()]
    assert {each["key"]: each["reason"] for each in listed} == {
        "small.png": "too small",
        "float.tif": "more than 16 bits a value",
        "cut.png": "truncated image",
    }
    good = [store.record(row)["key"] for row in range(len(store))]
    assert sorted([*good, *(each["key"] for each in listed)]) == sorted(names)
    pixels = store.latents(32, np.arange(len(store)))
    red = np.array([1.0, -1.0, -1.0]).reshape(3, 1, 1)
    far = {name: np.abs(values.numpy() - red).max() for name, values in zip(good, pixels, strict=True)}
    assert {name: gap for name, gap in far.items() if gap > 0.03} == {}
