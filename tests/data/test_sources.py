"""Every kind of source gives the same rows, whole or in pieces, and says what it cannot read."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoestring.data.rows import Row, SequentialSource, Source
from shoestring.data.sources import open_source
from shoestring.errors import SourceError

COUNT = 7


def write_images(folder: Path, pngs: Callable[..., bytes], names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(pngs(number))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def everything(source: Source) -> list[Row]:
    return list(source.rows(0, 10**6))


@pytest.fixture
def sidecars(tmp_path: Path, pngs: Callable[..., bytes]) -> Path:
    folder = tmp_path / "sidecars"
    write_images(folder, pngs, [f"{i:02d}.png" for i in range(COUNT)])
    for i in range(COUNT):
        (folder / f"{i:02d}.txt").write_text(f"caption {i}\n\nagain {i}\n")
    return folder


@pytest.fixture
def tables(tmp_path: Path, pngs: Callable[..., bytes]) -> Path:
    """Two Parquet files of several row groups, as `datasets` writes them."""
    folder = tmp_path / "tables"
    folder.mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for part, numbers in enumerate(([0, 1, 2, 3, 4], [5, 6])):
        images = pa.array([{"bytes": pngs(i), "path": None} for i in numbers], kind)
        texts = pa.array([[f"caption {i}", f"again {i}"] for i in numbers])
        pq.write_table(
            pa.table({"id": numbers, "image": images, "captions": texts}),
            folder / f"train-{part}.parquet",
            row_group_size=2,
        )
    return folder


@pytest.fixture
def tars(tmp_path: Path, pngs: Callable[..., bytes]) -> Path:
    folder = tmp_path / "tars"
    for part, numbers in enumerate(([0, 1, 2], [3, 4, 5, 6])):
        members = []
        for i in numbers:
            members += [(f"{i:02d}.png", pngs(i)), (f"{i:02d}.txt", f"caption {i}\nagain {i}".encode())]
        write_tar(folder / f"{part:05d}.tar", members)
    return folder


KINDS = ("sidecars", "tables", "tars")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_pictures_and_captions(
    kind: str, request: pytest.FixtureRequest, pngs: Callable[..., bytes]
) -> None:
    rows = everything(open_source(str(request.getfixturevalue(kind))))
    assert [row.image for row in rows] == [pngs(i) for i in range(COUNT)]
    assert [row.captions for row in rows] == [(f"caption {i}", f"again {i}") for i in range(COUNT)]
    assert len({row.key for row in rows}) == COUNT
    assert all(row.problem is None for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_any_stretch_equals_the_whole(kind: str, request: pytest.FixtureRequest) -> None:
    """In order, backwards, with gaps and beyond the end."""
    path = str(request.getfixturevalue(kind))
    whole = everything(open_source(path))
    source = open_source(path)
    for start, stop in [(0, 2), (2, 3), (5, 7), (1, 4), (6, 20), (7, 9), (0, 7), (3, 5)]:
        assert list(source.rows(start, stop)) == whole[start:stop]
    assert source.num_rows == COUNT


@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_copy_is_the_same_source_and_a_changed_one_is_not(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path: Path = request.getfixturevalue(kind)
    before = open_source(str(path)).describe()["files"]
    moved = path.rename(tmp_path / "moved")
    assert open_source(str(moved)).describe()["files"] == before
    sorted(each for each in moved.iterdir() if each.suffix in (".txt", ".tar", ".parquet"))[-1].unlink()
    assert open_source(str(moved)).describe()["files"] != before


# --- folders ---------------------------------------------------------------------------------------------


def _jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


def _csv(path: Path, records: list[dict[str, Any]]) -> None:
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def _parquet(path: Path, records: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(records), path.with_suffix(".parquet"))


@pytest.mark.parametrize("write", [_jsonl, _csv, _parquet])
def test_metadata_files_caption_images(
    write: Callable[[Path, list[dict[str, Any]]], None], tmp_path: Path, pngs: Callable[..., bytes]
) -> None:
    """Captions by file name; repeats add captions; images without one and files not there are told."""
    write_images(tmp_path, pngs, ["a.png", "b.png", "sub/c.png", "d.png"])
    records = [
        {"file_name": "b.png", "text": 'bee, "quoted"\nin two lines'},
        {"file_name": "sub/c.png", "text": "sea"},
        {"file_name": "b.png", "text": "another bee"},
        {"file_name": "gone.png", "text": "gone"},
    ]
    write(tmp_path / "metadata", records)
    (tmp_path / "a.txt").write_text("from its own file")
    rows = {row.key: row for row in everything(open_source(str(tmp_path)))}
    assert rows["b.png"].captions == ('bee, "quoted"\nin two lines', "another bee")
    assert rows["sub/c.png"].captions == ("sea",)
    assert rows["a.png"].captions == ("from its own file",)
    assert rows["d.png"].captions == ()
    assert rows["gone.png"].problem == "missing file"


def test_metadata_in_a_subfolder_names_files_there(tmp_path: Path, pngs: Callable[..., bytes]) -> None:
    write_images(tmp_path, pngs, ["one/a.png", "two/a.png"])
    _jsonl(tmp_path / "one/metadata", [{"file_name": "a.png", "caption": "first"}])
    _jsonl(tmp_path / "two/metadata", [{"file_name": "a.png", "caption": "second"}])
    rows = everything(open_source(str(tmp_path)))
    assert [(row.key, row.captions) for row in rows] == [
        ("one/a.png", ("first",)),
        ("two/a.png", ("second",)),
    ]


def test_columns_may_be_named(tmp_path: Path, pngs: Callable[..., bytes]) -> None:
    write_images(tmp_path, pngs, ["a.png"])
    _jsonl(tmp_path / "metadata", [{"image": "a.png", "alt": "alt text", "long": ["one", "two"]}])
    source = open_source(str(tmp_path), image_column="image", caption_columns=["long", "alt"])
    assert everything(source)[0].captions == ("one", "two", "alt text")
    assert source.words[1:] == [
        "--image-column",
        "image",
        "--caption-column",
        "long",
        "--caption-column",
        "alt",
    ]


def test_images_without_any_caption_are_refused_at_once(tmp_path: Path, pngs: Callable[..., bytes]) -> None:
    write_images(tmp_path, pngs, ["a.png", "b.png"])
    with pytest.raises(SourceError, match=r"2 images and no captions\. Put NAME\.txt beside"):
        open_source(str(tmp_path))


def test_a_broken_metadata_line_is_named(tmp_path: Path, pngs: Callable[..., bytes]) -> None:
    write_images(tmp_path, pngs, ["a.png"])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": \n')
    with pytest.raises(SourceError, match=r"metadata\.jsonl, line 2: not JSON"):
        open_source(str(tmp_path))


def test_metadata_without_captions_lists_its_columns(tmp_path: Path, pngs: Callable[..., bytes]) -> None:
    write_images(tmp_path, pngs, ["a.png"])
    _jsonl(tmp_path / "metadata", [{"file_name": "a.png", "label": "x"}])
    with pytest.raises(SourceError, match=r"no caption column.*file_name, label.*--caption-column"):
        open_source(str(tmp_path))
    with pytest.raises(SourceError, match=r"no column 'image' naming the image files.*file_name, label"):
        open_source(str(tmp_path), image_column="image")


def test_split_folders_are_kept_apart(tmp_path: Path, pngs: Callable[..., bytes]) -> None:
    """Where every top folder is a split; a folder that only happens to be called train changes nothing."""
    for name in ("train/a", "test/b"):
        write_images(tmp_path, pngs, [f"{name}.png"])
        (tmp_path / f"{name}.txt").write_text("x")
    assert [row.key for row in everything(open_source(str(tmp_path)))] == ["train/a.png"]
    test = open_source(str(tmp_path), split="test")
    assert [row.key for row in everything(test)] == ["test/b.png"]
    assert test.words[1:] == ["--split", "test"]
    with pytest.raises(SourceError, match="no files of split 'validation'; there are: test, train"):
        open_source(str(tmp_path), split="validation")
    write_images(tmp_path, pngs, ["bus/c.png"])
    assert len(everything(open_source(str(tmp_path)))) == 3


# --- Parquet ---------------------------------------------------------------------------------------------


def test_options_without_effect_are_refused(tmp_path: Path, pngs: Callable[..., bytes]) -> None:
    (tmp_path / "0.png").write_bytes(pngs(0))
    (tmp_path / "0.txt").write_text("one")
    for options, message in (
        ({"split": "test"}, "not all named after splits, so --split test has no effect"),
        ({"caption_columns": ["text"]}, "so --caption-column text has no effect"),
        ({"image_column": "name"}, "so --image-column name has no effect"),
    ):
        with pytest.raises(SourceError, match=message):
            open_source(str(tmp_path), **options)
    with pytest.raises(SourceError, match="is one file, so --split test has no effect"):
        open_source(str(tmp_path / "0.png"), split="test")
    with pytest.raises(SourceError, match="--caption-column has no effect on scenes"):
        open_source("scenes", caption_columns=["text"])


def test_parquet_of_several_splits_reads_train(tables: Path) -> None:
    pq.write_table(pq.read_table(tables / "train-1.parquet"), tables / "test-0.parquet")
    assert open_source(str(tables)).num_rows == COUNT
    assert open_source(str(tables), split="test").num_rows == 2
    assert open_source(str(tables / "test-0.parquet")).num_rows == 2
    assert open_source(str(tables / "train-*.parquet")).num_rows == COUNT


def test_parquet_with_plain_bytes_or_paths(tmp_path: Path, pngs: Callable[..., bytes]) -> None:
    write_images(tmp_path, pngs, ["files/0.png"])
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    paths = pa.array([{"bytes": None, "path": "files/0.png"}, {"bytes": None, "path": "no.png"}, None], kind)
    pq.write_table(pa.table({"picture": paths, "prompt": ["a", "b", "c"]}), tmp_path / "p.parquet")
    rows = everything(open_source(str(tmp_path / "p.parquet")))
    assert [(row.image, row.problem) for row in rows] == [
        (pngs(0), None),
        (b"", "missing file"),
        (b"", "no image"),
    ]
    pq.write_table(pa.table({"jpg": [pngs(1)], "text": ["a"]}), tmp_path / "b.parquet")
    assert everything(open_source(str(tmp_path / "b.parquet")))[0].image == pngs(1)


def test_parquet_without_captions_or_images_lists_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "label": ["y"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"no caption column.*text columns are: label"):
        open_source(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"text": ["y"], "n": [1]}), tmp_path / "b.parquet")
    with pytest.raises(SourceError, match=r"no image column.*columns are: text, n.*--image-column"):
        open_source(str(tmp_path / "b.parquet"))
    with pytest.raises(SourceError, match="no text column 'nope'; there are: label"):
        open_source(str(tmp_path / "a.parquet"), caption_columns=["nope"])


def test_parquet_that_is_none_or_differs_is_named(tables: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "text": ["y"]}), tables / "train-2.parquet")
    with pytest.raises(SourceError, match=r"train-2\.parquet: its columns differ from those of train-0"):
        open_source(str(tables))
    (tables / "train-2.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(SourceError, match=r"train-2\.parquet: not a Parquet file"):
        open_source(str(tables))


def test_the_real_emoji_set_opens(data: Path) -> None:
    source = open_source(str(data / "emoji"))
    assert source.num_rows == 3629
    row = next(source.rows(0, 1))
    assert row.captions == ("1st place medal",)
    assert row.image[:4] == b"\x89PNG"  # type: ignore[comparison-overlap]


# --- tars ------------------------------------------------------------------------------------------------


def test_tars_take_captions_from_json_too(tmp_path: Path, pngs: Callable[..., bytes]) -> None:
    record = json.dumps({"caption": "from json", "alt": "other"}).encode()
    members = [("dir/0.jpg", b"jpeg"), ("dir/0.json", record), ("dir/1.json", record), ("dir/2.png", pngs(2))]
    write_tar(tmp_path / "a.tar", members)
    rows = everything(open_source(str(tmp_path)))
    assert [(row.key, row.captions, row.problem) for row in rows] == [
        ("a.tar/dir/0", ("from json",), None),
        ("a.tar/dir/1", ("from json",), "no image"),
        ("a.tar/dir/2", (), None),
    ]
    named = open_source(str(tmp_path / "a.tar"), caption_columns=["alt"])
    assert everything(named)[0].captions == ("other",)


@pytest.mark.parametrize("damage", ["cut", "header", "garbage"])
def test_a_damaged_tar_gives_what_comes_before_and_says_so(damage: str, tars: Path) -> None:
    """tarfile itself stops at a damaged header without a word."""
    path = tars / "00001.tar"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "header":
        position = data.index(b"04.txt")
        data[position : position + 512] = b"\xff" * 512
    else:
        data[:] = b"garbage" * 300
    path.write_bytes(data)
    rows = everything(open_source(str(tars)))
    assert [row.problem for row in rows[:3]] == [None] * 3
    assert rows[-1].problem == "damaged tar"
    assert 4 <= len(rows) <= 7


def test_tars_without_captions_are_refused(tmp_path: Path, pngs: Callable[..., bytes]) -> None:
    write_tar(tmp_path / "a.tar", [("0.png", pngs(0)), ("0.cls", b"3")])
    with pytest.raises(SourceError, match=r"the first sample \(0\) has png, cls and no caption"):
        open_source(str(tmp_path))
    with pytest.raises(SourceError, match="tars have no columns"):
        open_source(str(tmp_path), image_column="png")


# --- the hub and scenes ----------------------------------------------------------------------------------


def hub_rows(pngs: Callable[..., bytes], **options: Any) -> Any:
    import datasets

    from shoestring.data.tables import HubSource

    columns = {
        "image": [{"bytes": pngs(i), "path": None} for i in range(COUNT)],
        "text": [f"caption {i}" for i in range(COUNT)],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    streamed = datasets.Dataset.from_dict(columns, features=features).to_iterable_dataset(num_shards=2)
    return HubSource(streamed, "owner/name", **options)


def test_a_streamed_data_set_is_read_without_decoding(pngs: Callable[..., bytes]) -> None:
    source = hub_rows(pngs)
    assert source.num_rows is None
    whole = everything(source)
    assert source.num_rows == COUNT
    assert [(row.image, row.captions) for row in whole] == [
        (pngs(i), (f"caption {i}",)) for i in range(COUNT)
    ]
    for start, stop in [(0, 2), (4, 6), (3, 5), (6, 9)]:
        assert list(source.rows(start, stop)) == whole[start:stop]
    with pytest.raises(SourceError, match="no text column 'nope'; there are: text"):
        hub_rows(pngs, caption_columns=["nope"])


def test_a_hub_id_that_cannot_be_had_says_both_readings() -> None:
    with pytest.raises(SourceError, match=r"nobody/nothing: no such file or folder, and as a hub data set"):
        open_source("nobody/nothing")


def test_scenes_are_a_source() -> None:
    source = open_source("scenes", scenes={"images": 5, "size": 32, "held_out": 2, "seed": 3})
    rows = everything(source)
    assert [row.split for row in rows] == ["train"] * 5 + ["unseen_scenes"] * 2 + ["unseen_pairs"] * 2
    assert source.num_rows == 9
    assert all(row.image.shape == (32, 32, 3) for row in rows)  # type: ignore[union-attr]
    assert rows[0].extra["scene"]["level"] == "cells"
    assert list(source.rows(6, 8)) != []
    assert [row.key for row in source.rows(6, 8)] == [row.key for row in rows[6:8]]
    assert source.words[:3] == ["scenes", "--level", "cells"]


# --- nothing there ---------------------------------------------------------------------------------------


def test_a_missing_path_says_what_a_source_is(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no such file or folder\. A source is an image folder"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match="no files there"):
        open_source(str(tmp_path / "*.parquet"))


def test_an_empty_or_foreign_folder_says_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no files there\. A source is an image folder"):
        open_source(str(tmp_path))
    (tmp_path / "a.zip").write_bytes(b"")
    (tmp_path / ".hidden.png").write_bytes(b"")
    with pytest.raises(SourceError, match=r"only \.zip files there"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.csv",
            b"file_name,text\n00.png,a red ball, on grass\n",
            "line 2: more values than columns",
        ),
        ("metadata.csv", "file_name,text\n00.png,caf\xe9\n".encode("latin-1"), "not UTF-8"),
        ("metadata.parquet", b"PAR1 no table", "cannot be read"),
    ],
)
def test_metadata_that_would_lose_captions_is_refused(
    tmp_path: Path, pngs: Callable[..., bytes], name: str, content: bytes, message: str
) -> None:
    write_images(tmp_path, pngs, ["00.png"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        everything(open_source(str(tmp_path)))


def test_a_stream_entered_beyond_its_end_knows_its_length() -> None:
    """A worker whose first chunk lies beyond the end must not take the place it skipped to for the end."""

    class Stream(SequentialSource):
        def _base(self, start: int) -> int:
            return start

        def _records(self, base: int) -> Iterator[int]:
            return iter(range(base, COUNT))

        def _load(self, number: int, record: int) -> Row:
            return Row(str(record), b"", ("a",))

    stream = Stream("stream")
    assert list(stream.rows(100, 200)) == []
    assert stream.num_rows == COUNT
