"""`shoestring encode`: four kinds of source, bad rows among good ones, and what it says to a mistake."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoestring.data.store import Store


def latents(store: Path) -> dict[str, bytes]:
    """Each caption with its picture's latents, whatever the order."""
    opened = Store.open(store)
    return {opened.captions(i)[0]: opened.latents(32, [i]).numpy().tobytes() for i in range(len(opened))}


def to_tar(folder: Path, out: Path) -> None:
    with tarfile.open(out, "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)


def to_parquet(folder: Path, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = sorted(folder.glob("*.png"))
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in pictures]
    captions = [path.with_suffix(".txt").read_text().strip() for path in pictures]
    pq.write_table(pa.table({"image": images, "text": captions}), out)


def to_metadata(folder: Path, out: Path) -> None:
    out.mkdir()
    lines = []
    for path in sorted(folder.glob("*.png")):
        (out / path.name).write_bytes(path.read_bytes())
        text = path.with_suffix(".txt").read_text().strip()
        lines.append(json.dumps({"file_name": path.name, "text": text}))
    (out / "metadata.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("convert", "name"), [(to_tar, "photos.tar"), (to_parquet, "photos.parquet"), (to_metadata, "photos2")]
)
def test_every_kind_of_source_gives_the_same_store(
    convert: Callable[[Path, Path], None], name: str, here: Path, command: Any
) -> None:
    convert(here / "photos", here / name)
    said = command("encode", name, "--out", "s")
    assert said.code == 0
    assert said.out.startswith("s: 24 images of 32 px (24 train), ")
    assert said.out.endswith("Next: shoestring train RECIPE --set data.store=s\n")
    assert latents(here / "s") == latents(here / "plain")


def test_scenes_have_their_held_out_splits(empty: Path, command: Any) -> None:
    said = command("encode", "scenes", "--out", "s", "--images", 50, "--held-out", 10, "--level", "free")
    assert "70 images of 32 px (50 train, 10 unseen_scenes, 10 unseen_pairs)" in said.out
    assert Store.open(empty / "s").record(69)["scene"]["level"] == "free"


def test_bad_images_among_good_ones_are_counted_listed_and_left_out(
    empty: Path, captioned: Any, command: Any
) -> None:
    captioned(empty / "photos", 30)
    (empty / "photos/003.png").write_bytes(b"not a picture")
    whole = (empty / "photos/007.png").read_bytes()
    (empty / "photos/007.png").write_bytes(whole[: len(whole) // 2])
    (empty / "photos/011.txt").unlink()
    words = ("encode", "photos", "--out", "s")
    error = command(*words).refused()
    assert "3 of 30 rows are bad, more than the 5% allowed" in error
    assert "To go on without them: --max-bad 0.10" in error
    assert not (empty / "s/manifest.json").exists()
    said = command(*words, "--max-bad", 0.1)
    assert said.code == 0
    assert "27 images of 32 px" in said.out
    assert "(listed in s/skipped.jsonl)" in said.err
    listed = [json.loads(line) for line in (empty / "s/skipped.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in listed] == ["003.png", "007.png", "011.png"]
    told = command("store", "info", "s").out
    assert "left out" in told
    assert "1 no caption" in told


def test_captions_too_long_are_warned_of_once_with_the_tokens_cut(here: Path, command: Any) -> None:
    said = command("encode", "photos", "--out", "s", "--max-tokens", 4)
    assert said.code == 0
    (line,) = (line for line in said.err.splitlines() if "warning" in line)
    assert line == ("warning: 24 captions are longer than the text encoder's 4 tokens; 48 tokens were cut")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "nowhere: no such file or folder"),
        (("void",), "void: "),
        (("uncaptioned",), "uncaptioned: 2 images and no captions. Put NAME.txt beside each image"),
        (("photos", "--size", 0), "sizes (0,): give one or more sizes in pixels, such as --size 32."),
        (("photos", "--size", 64), "no usable row among 24: 24 too small. Take a smaller --size, or enlarge"),
        (("photos", "--held-out", 24), "held_out 24: there are 24 usable rows. Hold out fewer."),
        (("photos", "--text-encoder", "nobody/none"), "nobody/none"),
        (("photos", "--autoencoder", "nobody/none"), "nobody/none"),
        (("photos", "--device", "tpu"), "device 'tpu': unknown."),
        (("photos", "--pad", "left"), "left"),
        (("nobody/no-such-set",), "nobody/no-such-set"),
    ],
)
def test_a_mistake_is_one_line_and_seals_no_store(
    words: tuple[object, ...], message: str, here: Path, command: Any
) -> None:
    (here / "void").mkdir()
    (here / "uncaptioned").mkdir()
    for name in ("000.png", "001.png"):
        (here / "uncaptioned" / name).write_bytes((here / "photos" / name).read_bytes())
    assert message in command("encode", *words, "--out", "s").refused()
    assert not (here / "s/manifest.json").exists()
    assert not list(here.rglob("*.partial"))


def test_other_settings_for_a_finished_store_are_refused(here: Path, command: Any, tree: Any) -> None:
    before = tree(here / "plain")
    error = command("encode", "photos", "--out", "plain", "--size", 16).refused()
    assert error.startswith("plain: was begun with other settings: ")
    assert tree(here / "plain") == before


@pytest.mark.parametrize("word", ["begun", "latents-32/00001", "chunks/00001", "manifest"])
def test_a_disk_that_fills_up_is_told_and_encoding_goes_on_afterwards(
    word: str, here: Path, command: Any, full_disk: Callable[[str], Any]
) -> None:
    words = ("encode", "photos", "--out", "s", "--size", 16, "--size", 32, "--chunk-rows", 8)
    with full_disk(word.replace("/", "/.")):
        error = command(*words).refused()
    assert error.startswith("s/")
    assert "the disk is full (" in error
    assert not (here / "s/manifest.json").exists()
    assert not list(here.rglob("*.partial"))
    first = here / "s/chunks/00000.json"
    stamp = first.stat().st_mtime_ns if first.exists() else None
    assert (stamp is not None) == (word != "begun")
    assert command(*words).code == 0
    assert stamp in (None, first.stat().st_mtime_ns), "a finished chunk is not encoded again"
    assert latents(here / "s") == latents(here / "plain")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_is_told(
    code: int, here: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def refusing(self: Path, *arguments: Any, **named: Any) -> None:
        if self.name == "locked":
            raise OSError(code, os.strerror(code), str(self))
        mkdir(self, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", refusing)
    error = command("encode", "photos", "--out", "locked").refused()
    assert error == (
        f"locked: cannot be written ({os.strerror(code)}). Choose another folder or change its permissions."
    )


def test_a_picture_truncated_inside_a_tar_is_left_out(here: Path, command: Any) -> None:
    with tarfile.open("photos.tar", "w") as tar:
        for path in sorted((here / "photos").iterdir()):
            content = path.read_bytes()
            content = content[:100] if path.name == "005.png" else content
            entry = tarfile.TarInfo(path.name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    assert "23 images" in command("encode", "photos.tar", "--out", "s").out
