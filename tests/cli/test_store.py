"""`shoestring store`: what is in a store, and whether every file of it is whole."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shoestring.data.manifest import FORMAT, signed
from shoestring.data.store import Store

COMMANDS = pytest.mark.parametrize("name", ["info", "verify"])


def test_info_says_what_there_is(here: Path, command: Any) -> None:
    said = command("store", "info", "parted")
    assert said.code == 0
    told = {line[:14].strip(): line[14:] for line in reversed(said.out.splitlines())}
    assert told["rows"] == "24 in 3 chunks"
    assert told["splits"] == "held_out 8, train 16"
    assert told["source"] == "folder photos"
    assert told["32 px"] == "latents 3 x 32 x 32, uint8 (x = value / 127.5 - 1)"
    assert told["latents-32"].startswith("3,")
    assert told["left out"] == "nothing"


def test_verify_passes_a_whole_store(here: Path, command: Any) -> None:
    shards = len(list((here / "parted/columns").rglob("*.*")))
    files = shards + len(["manifest", "settings", "list of what was left out"]) + len(["marker"] * 3)
    said = command("store", "verify", "parted")
    assert (said.code, said.out) == (0, f"parted: all {files} files match their SHA-256.\n")


@pytest.mark.parametrize("damage", ["changed", "cut short", "gone"])
def test_verify_names_every_damaged_file_and_one_cure(damage: str, here: Path, command: Any) -> None:
    names = ["parted/columns/json/00000.jsonl", "parted/columns/text/00002.safetensors"]
    for name in names:
        content = Path(name).read_bytes()
        Path(name).unlink()
        if damage == "changed":
            Path(name).write_bytes(content[:-2] + b"xx")
        elif damage == "cut short":
            Path(name).write_bytes(content[:-2])
    said = command("store", "verify", "parted")
    error = said.refused()
    assert all(name in error for name in names)
    assert "rm -f parted/chunks/00000.json parted/chunks/00002.json && shoestring encode photos " in error
    lines = said.err.splitlines()[:-1]
    what = "is missing" if damage == "gone" else "does not match its checksum"
    assert sorted(line.split(what)[0] for line in lines) == [f"{name} " for name in names]


SMALL = ("phases=[{name: all, size: 32, images: 48, batch: 12, lr: 1e-3}]", "train.log_every=12")

DAMAGES = {
    "a shard changed": ("columns/latents-16/00001.safetensors", "flip"),
    "a shard gone": ("columns/json/00002.jsonl", "remove"),
    "another chunk's shard": ("columns/text/00001.safetensors", "columns/text/00000.safetensors"),
    "a marker changed": ("chunks/00001.json", "flip"),
    "a marker gone": ("chunks/00000.json", "remove"),
    "the settings changed": ("begun.json", "flip"),
    "the settings gone": ("begun.json", "remove"),
    "the list changed": ("skipped.jsonl", "flip"),
    "the manifest changed": ("manifest.json", "flip"),
    "the manifest cut short": ("manifest.json", "cut"),
    "an added shard changed": ("columns/latents-32/00001.safetensors", "flip"),
    "an added marker gone": ("chunks/latents-32/00000.json", "remove"),
    "the settings of an addition changed": ("added/latents-32.json", "flip"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_cure_cures(damage: str, here: Path, command: Any, tree: Any) -> None:
    """What the message says, done word for word: every shard is as it was, and `verify` is content."""
    name, how = DAMAGES[damage]
    (here / "photos/000.png").write_bytes(b"a broken picture, left out")
    words = ("encode", "photos", "--out", "mine", "--size", 16, "--chunk-rows", 8, "--held-out", 8)
    assert command(*words).code == 0
    assert command("store", "add", "mine", "--size", 32).code == 0
    before = tree(here / "mine/columns")
    path = here / "mine" / name
    content = path.read_bytes()
    if how == "remove":
        path.unlink()
    elif how in ("flip", "cut"):
        half = len(content) // 2
        path.write_bytes(
            content[:half] + (bytes([content[half] ^ 1]) + content[half + 1 :]) * (how == "flip")
        )
    else:
        shutil.copy(here / "mine" / how, path)
    error = command("store", "verify", "mine").refused()
    assert f"mine/{name}" in error
    for step in error.split(" with: ")[1].split(" && "):
        verb, *rest = shlex.split(step)
        assert verb in ("rm", "shoestring")
        if verb == "rm":
            subprocess.run(["rm", *rest], check=True)
        else:
            assert command(*rest).code == 0
    assert command("store", "verify", "mine").code == 0
    assert tree(here / "mine/columns") == before
    assert Store.open("mine").sizes == (16, 32)


def test_what_is_no_part_of_a_store_is_reported_and_no_error(here: Path, command: Any) -> None:
    (here / "parted/columns/latents-16/notes.txt").write_text("mine")
    said = command("store", "verify", "parted")
    assert said.code == 0
    assert said.err == (
        "note: parted/columns/latents-16/notes.txt is no part of the store; nothing reads it.\n"
    )


def test_copy_makes_a_store_and_goes_on(here: Path, command: Any) -> None:
    said = command("store", "copy", "parted", "local/parted")
    assert (said.code, said.out) == (0, "local/parted: 24 rows, 0.00 GB, every file checked.\n")
    assert command("store", "verify", "local/parted").code == 0
    assert command("store", "copy", "parted", "local/parted").code == 0
    assert (
        "holds something other than a copy of plain"
        in command("store", "copy", "plain", "local/parted").refused()
    )


def test_a_copy_gains_what_was_added_since_and_loses_nothing(here: Path, command: Any, tree: Any) -> None:
    """A copy with an addition of its own is left alone, as is a copy of a store of other encoders."""
    assert command("encode", "photos", "--out", "mine", "--size", 16).code == 0
    assert command("store", "copy", "mine", "copied").code == 0
    assert command("store", "add", "mine", "--size", 32).code == 0
    assert command("store", "copy", "mine", "copied").code == 0
    assert Store.open("copied").sizes == (16, 32)
    assert command("store", "verify", "copied").code == 0
    assert tree(here / "mine/columns") == tree(here / "copied/columns")

    assert command("store", "add", "copied", "--size", 8).code == 0
    assert command("encode", "photos", "--out", "other", "--size", 16, "--text-dtype", "int8").code == 0
    assert command("store", "copy", "mine", "copied").refused().startswith("copied: holds something other")
    assert command("store", "copy", "other", "copied").refused().startswith("copied: holds something other")
    assert Store.open("copied").sizes == (8, 16, 32)


def test_the_cure_of_a_copy_of_format_1_cures(here: Path, command: Any, tree: Any) -> None:
    path = here / "parted/manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("sha256", "records"):
        del manifest[name]
    path.write_text(json.dumps(manifest | {"format": 1}, indent=1) + "\n")
    assert command("store", "copy", "parted", "copied").code == 0
    before = tree(here / "copied/columns")
    (here / "copied/columns/text/00001.safetensors").write_bytes(b"?")
    error = command("store", "verify", "copied").refused()
    remove, encode = (shlex.split(step) for step in error.split(" with: ")[1].split(" && "))
    subprocess.run(remove, check=True)
    assert command(*encode[1:]).code == 0
    assert tree(here / "copied/columns") == before


@pytest.mark.parametrize("words", [("copy", "plain", "s3://bucket/mine"), ("add", "s3://bucket/mine")])
def test_what_writes_refuses_a_url(words: tuple[str, ...], here: Path, command: Any) -> None:
    options = ("--size", 8) if words[0] == "add" else ()
    assert command("store", *words, *options).refused().startswith("s3://bucket/mine: is a URL. ")
    assert not (here / "s3:").exists()


def test_a_store_at_a_url_is_told_about_verified_and_copied(
    here: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOESTRING_CACHE", str(here / "cache"))
    url = (here / "parted").as_uri()
    local = command("store", "info", "parted").out
    assert command("store", "info", url).out == local
    assert command("store", "verify", url).out.startswith(f"{url}: all ")
    assert command("store", "copy", url, "copied").code == 0
    assert command("store", "info", "copied").out == local
    assert "no store there" in command("store", "info", here.as_uri()).refused()


@COMMANDS
def test_what_is_no_store_is_refused(name: str, here: Path, command: Any) -> None:
    assert command("store", name, "nowhere").refused().startswith("nowhere: no such store. Make one with")
    assert command("store", name, "photos").refused().startswith("photos: not a store (no manifest.json in")


@COMMANDS
def test_an_unfinished_store_says_how_to_go_on(name: str, here: Path, command: Any) -> None:
    (here / "parted/manifest.json").unlink()
    (here / "parted/chunks/00002.json").unlink()
    error = command("store", name, "parted").refused()
    assert error.startswith("parted: this store is unfinished (2 chunks done). Go on with: shoestring encode")
    words = error.split("Go on with: shoestring ")[1].split()
    assert command(*words).code == 0
    assert command("store", "verify", "parted").code == 0


@COMMANDS
def test_a_store_of_a_newer_version_is_refused(name: str, here: Path, command: Any) -> None:
    path = here / "plain/manifest.json"
    path.write_text(json.dumps(signed(json.loads(path.read_text()) | {"format": FORMAT + 1})))
    error = command("store", name, "plain").refused()
    assert error.startswith(f"plain: store format {FORMAT + 1}, made by Shoestring ")
    assert "pip install --upgrade shoestring" in error


def test_a_store_can_be_moved(here: Path, command: Any) -> None:
    shutil.move(here / "parted", here / "elsewhere")
    assert command("store", "verify", "elsewhere").code == 0


def test_training_from_a_url_with_a_window_equals_training_from_the_folder(
    here: Path, tiny: Path, command: Any, metrics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses to the bit, on three chunks of which two are mixed at a time; only what trains is downloaded."""
    monkeypatch.setenv("SHOESTRING_CACHE", str(here / "cache"))
    settings = [word for pair in SMALL for word in ("--set", pair)]
    url = (here / "parted").as_uri()
    for name, place, window in (("near", "parted", 2), ("far", url, 2), ("plain", "parted", "null")):
        where = ("--set", f"data.store={place}", "--set", f"data.window={window}", "--name", name)
        assert command("train", tiny, *settings, *where).code == 0
    near, far, plain = (metrics(here / "runs" / name) for name in ("near", "far", "plain"))
    assert near == far
    assert near != plain
    columns = {path.name for path in here.glob("cache/*/files/*")}
    unused = {e["sha256"] for e in Store.open("parted").manifest["files"] if "latents-16" in e["path"]}
    assert columns
    assert not columns & unused
