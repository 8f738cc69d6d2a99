"""`shoestring store`: what is in a store, and whether every file of it is whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

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
    files = len(list((here / "parted/columns").rglob("*.*")))
    said = command("store", "verify", "parted")
    assert (said.code, said.out) == (0, f"parted: all {files} files match their SHA-256.\n")


@pytest.mark.parametrize("damage", ["changed", "cut short", "gone"])
def test_verify_names_every_damaged_file_and_the_cure(damage: str, here: Path, command: Any) -> None:
    names = ["parted/columns/json/00000.jsonl", "parted/columns/text/00002.safetensors"]
    for name in names:
        content = Path(name).read_bytes()
        Path(name).unlink()
        if damage == "changed":
            Path(name).write_bytes(content[:-2] + b"xx")
        elif damage == "cut short":
            Path(name).write_bytes(content[:-2])
    error = command("store", "verify", "parted").refused()
    assert all(name in error for name in names)
    assert "rm parted/chunks/00000.json parted/chunks/00002.json && shoestring encode photos " in error


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
def test_a_manifest_that_cannot_be_read_has_a_cure_that_works(name: str, here: Path, command: Any) -> None:
    path = here / "parted/manifest.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert (
        "Delete it and run the same `shoestring encode` again" in command("store", name, "parted").refused()
    )
    path.unlink()
    words = ("--held-out", 8, "--size", 16, "--size", 32, "--chunk-rows", 8)
    assert command("encode", "photos", "--out", "parted", *words).code == 0
    assert path.read_bytes() == whole


@COMMANDS
def test_a_store_of_a_newer_version_is_refused(name: str, here: Path, command: Any) -> None:
    path = here / "plain/manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    error = command("store", name, "plain").refused()
    assert error.startswith("plain: store format 2, made by Shoestring ")
    assert "pip install --upgrade shoestring" in error


def test_a_store_can_be_moved(here: Path, command: Any) -> None:
    shutil.move(here / "parted", here / "elsewhere")
    assert command("store", "verify", "elsewhere").code == 0
