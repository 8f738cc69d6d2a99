"""Whatever happens to a store's files is found: no read gives wrong numbers, and a message says the cure."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoestring.data import integrity
from shoestring.data.copying import copy_store
from shoestring.data.manifest import BEGUN, MANIFEST, SKIPPED, signed
from shoestring.data.rows import Row
from shoestring.data.store import Store
from shoestring.errors import CorruptStoreError, StoreError
from shoestring.storage import read_json

MakeStore = Callable[..., Store]
MakeRows = Callable[..., list[Row]]

FLIPS = 300


def flip_a_bit(path: Path, place: int | None = None, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4 if place is None else place] ^= 1 << bit
    path.write_bytes(data)


def everything(store: Store) -> dict[str, Any]:
    """All that can be read from a store."""
    rows = np.arange(len(store))
    read: dict[str, Any] = {f"latents {size}": store.latents(size, rows) for size in store.sizes}
    for choice in (0.0, 0.5, 0.99):
        draws = np.full(len(rows), choice)
        read[f"text {choice}"], read[f"mask {choice}"] = store.padded_text(rows, draws)
        read[f"words {choice}"] = store.chosen_captions(rows, draws)
    read["size_crop"], read["records"] = store.size_crop(rows, store.sizes[0]), store.records(rows)
    read["train"] = store.splits["train"].rows(np.arange(len(store.splits["train"]))).tolist()
    return read


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def covered(store: Store) -> list[Path]:
    """Every file of a store but times taken and what was found whole."""
    files = sorted(path for path in store.path.rglob("*") if path.is_file())
    return [path for path in files if path.parent.name != "work" and path.name != integrity.VERIFIED]


@pytest.fixture
def store(make_store: MakeStore, rows: MakeRows) -> Store:
    """Three chunks and a row that was left out."""
    broken = Row("broken", b"no picture", ("a caption",))
    return make_store([*rows(24), broken], held_out=3, max_bad=0.1)


# --- bits --------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found_and_none_is_read(store: Store) -> None:
    """Hundreds of single bits in shards, markers, settings and manifest: `verify` finds each of them; reading
    gives the very same data or an error of one line.
    """
    original = everything(store)
    files = covered(store)
    assert {path.name for path in files} >= {MANIFEST, BEGUN, SKIPPED, "00002.json", "00002.jsonl"}
    generator = random.Random(0)
    told: dict[str, int] = {}
    for number in range(FLIPS):
        path = files[number % len(files)]
        content = path.read_bytes()
        flip_a_bit(path, generator.randrange(len(content)), generator.randrange(8))
        try:
            with pytest.raises(StoreError) as caught:
                Store.open(store.path).verify()
            assert path.name in str(caught.value)
            assert "\n" not in str(caught.value)
            try:
                assert same(everything(Store.open(store.path)), original), f"wrong data read from {path}"
            except StoreError as error:
                told[type(error).__name__] = told.get(type(error).__name__, 0) + 1
        finally:
            path.write_bytes(content)
    assert told["CorruptStoreError"] > FLIPS / 3, told
    assert same(everything(Store.open(store.path)), original)
    Store.open(store.path).verify()


@pytest.mark.parametrize("damage", ["cut", "gone", "grown", "empty"])
def test_every_file_cut_gone_grown_or_empty_is_found(damage: str, store: Store) -> None:
    original, generator = everything(store), random.Random(damage)
    for path in covered(store):
        content = path.read_bytes()
        if damage == "gone" or not content:
            path.unlink()
        elif damage == "grown":
            path.write_bytes(content + bytes([generator.randrange(256)]))
        else:
            path.write_bytes(content[: generator.randrange(len(content)) * (damage == "cut")])
        try:
            with pytest.raises(StoreError):
                Store.open(store.path).verify()
            with contextlib.suppress(StoreError):
                assert same(everything(Store.open(store.path)), original), f"wrong data read from {path}"
        finally:
            path.write_bytes(content)
    Store.open(store.path).verify()


def test_flips_in_the_list_of_what_was_verified_do_no_harm(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "SETTLED", 0)
    store.verify()
    original, path, generator = everything(store), store.path / integrity.VERIFIED, random.Random(1)
    content = path.read_bytes()
    for _ in range(50):
        flip_a_bit(path, generator.randrange(len(content)), generator.randrange(8))
        assert same(everything(Store.open(store.path)), original)
        path.write_bytes(content)


@pytest.mark.parametrize("column", ["latents-16", "text", "rows", "json"])
def test_one_flipped_bit_is_found_where_it_is_used(
    column: str, make_store: MakeStore, rows: MakeRows
) -> None:
    """At first use of the shard, naming the file and the commands; other chunks still read."""
    store = make_store(rows(25))
    path = next((store.path / "columns" / column).glob("00001.*"))
    flip_a_bit(path)
    opened = Store.open(store.path)

    def read(row: int) -> None:
        opened.latents(16, np.array([row]))
        opened.text(np.array([row]))
        opened.captions(row)

    read(0)
    for _ in range(2):
        with pytest.raises(CorruptStoreError) as caught:
            read(10)
        message = str(caught.value)
        assert message.startswith(f"{path} does not match its checksum. ")
        marker = shlex.quote(str(store.path / "chunks/00001.json"))
        command = f"shoestring encode list --chunk-rows 10 --size 16 --out {shlex.quote(str(store.path))}"
        assert message.endswith(f"rm -f {marker} && {command}")


def test_a_shard_cut_short_or_gone_is_corrupt_too(store: Store) -> None:
    path = store.path / "columns/latents-16/00000.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        CorruptStoreError, match=rf"latents-16/00000\.safetensors .*: 100 bytes instead of {size:,}\."
    ):
        Store.open(store.path).latents(16, np.array([0]))
    path.unlink()
    with pytest.raises(CorruptStoreError, match=r"latents-16/00000\.safetensors is missing\."):
        Store.open(store.path).latents(16, np.array([0]))


def test_a_file_that_cannot_be_opened_is_not_called_damaged(store: Store) -> None:
    """Too many open files is no reason to encode anything again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = Store.open(store.path)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(StoreError, match=r"cannot be read \(Too many open files\)") as caught:
            opened.latents(16, np.array([0]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not isinstance(caught.value, CorruptStoreError)
    opened.latents(16, np.array([0]))


# --- files of elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["latents-16", "text", "rows", "json"])
def test_another_chunks_file_is_named_as_such(column: str, store: Store) -> None:
    one, other = sorted((store.path / "columns" / column).iterdir())[:2]
    shutil.copy(other, one)
    with pytest.raises(CorruptStoreError) as caught:
        Store.open(store.path).verify()
    assert f"{one} holds columns/{column}/{other.name} instead. Encode this chunk again" in str(caught.value)


def test_another_stores_file_is_named_as_such(store: Store, make_store: MakeStore, rows: MakeRows) -> None:
    """The same name, columns and encoders, from another source."""
    other = make_store(rows(25)[::-1], "other")
    name = "columns/text/00001.safetensors"
    shutil.copy(other.path / name, store.path / name)
    with pytest.raises(CorruptStoreError, match=f"{name} belongs to another store: other encoders or"):
        Store.open(store.path).verify()
    with pytest.raises(CorruptStoreError, match="belongs to another store"):
        Store.open(store.path).text(np.array([12]))


def test_files_that_are_no_part_of_the_store_are_reported_and_harmless(store: Store) -> None:
    strange = ["chunks/00003.json", "columns/latents-16/00003.safetensors", "columns/latents-99/a"]
    for name in strange:
        (store.path / name).parent.mkdir(exist_ok=True)
        (store.path / name).write_text("{}")
    assert Store.open(store.path).verify().unexpected == tuple(sorted(strange))


@pytest.fixture
def mixed(make_store: MakeStore, rows: MakeRows, kl_folder: Path) -> Store:
    """A store whose second chunk another autoencoder made: two encodings written into one folder."""
    from diffusers import AutoencoderKL

    store = make_store(rows(25), autoencoder=str(kl_folder))
    torch.manual_seed(1)
    AutoencoderKL.from_config(AutoencoderKL.load_config(kl_folder)).save_pretrained(kl_folder)
    other = make_store(rows(25), "other", autoencoder=str(kl_folder))
    for name in ("chunks/00001.json", "columns/latents-16/00001.safetensors"):
        shutil.copy(other.path / name, store.path / name)
    return store


def test_two_encoders_in_one_store_are_told_apart_when_it_is_sealed(
    mixed: Store, make_store: MakeStore, rows: MakeRows, kl_folder: Path
) -> None:
    from diffusers import AutoencoderKL

    (mixed.path / MANIFEST).unlink()
    torch.manual_seed(0)
    AutoencoderKL.from_config(AutoencoderKL.load_config(kl_folder)).save_pretrained(kl_folder)
    with pytest.raises(CorruptStoreError) as caught:
        make_store(rows(25), autoencoder=str(kl_folder))
    message = str(caught.value)
    assert "columns/latents-16/00001.safetensors was made by other encoders" in message
    assert f"rm -f {mixed.path}/chunks/00001.json && shoestring encode list" in message
    (mixed.path / "chunks/00001.json").unlink()
    make_store(rows(25), autoencoder=str(kl_folder)).verify()


def test_two_encoders_in_one_manifest_are_told_apart_when_it_is_opened(mixed: Store) -> None:
    """Even where the manifest was put together from both and signed."""
    files = {entry["path"]: entry for entry in read_json(mixed.path.parent / "other" / MANIFEST)["files"]}
    name = "columns/latents-16/00001.safetensors"
    entries = [files[name] if e["path"] == name else e for e in mixed.manifest["files"]]
    (mixed.path / MANIFEST).write_text(json.dumps(signed(mixed.manifest | {"files": entries})))
    with pytest.raises(CorruptStoreError, match=f"{name} was made by other encoders"):
        Store.open(mixed.path)


# --- manifests ---------------------------------------------------------------------------------------------


def test_an_edited_manifest_is_refused(store: Store) -> None:
    path = store.path / MANIFEST
    path.write_text(path.read_text().replace('"mirrored": 0', '"mirrored": 1'))
    with pytest.raises(CorruptStoreError) as caught:
        Store.open(store.path)
    message = str(caught.value)
    assert message.startswith(f"{path}: is damaged or was edited: it does not match its own checksum. ")
    assert message.endswith(f"rm -f {path} && {store.manifest['command']} --out {store.path}")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"format": {}}', '{"format": 2}'])
def test_a_manifest_that_is_none_is_refused_in_one_line(text: str, store: Store) -> None:
    (store.path / MANIFEST).write_text(text)
    with pytest.raises(
        CorruptStoreError, match=r"manifest\.json: .*Write it anew from what is there with: rm -f"
    ):
        Store.open(store.path)


@pytest.fixture
def old(store: Store) -> Store:
    """The same store as version 0.1 wrote it: no checksum of the manifest, no records, no origins."""
    new = ("sha256", "records")
    manifest = {key: value for key, value in store.manifest.items() if key not in new}
    files = [{k: v for k, v in entry.items() if k != "origin"} for entry in manifest["files"]]
    (store.path / MANIFEST).write_text(json.dumps(manifest | {"format": 1, "files": files}, indent=1) + "\n")
    return Store.open(store.path)


def test_stores_of_format_1_are_read_and_checked_as_far_as_they_can_be(store: Store, old: Store) -> None:
    assert same(everything(old), everything(store))
    assert old.verify().files == 13  # shards and the manifest
    flip_a_bit(old.path / "columns/text/00002.safetensors")
    with pytest.raises(CorruptStoreError, match="text/00002"):
        Store.open(old.path).verify()


def test_a_copy_of_format_1_can_be_mended(old: Store, tmp_path: Path) -> None:
    """It has the settings and markers that the cure goes by, of which the manifest says nothing."""
    out = tmp_path / "copied"
    for _ in range(2):
        copied = copy_store(str(old.path), out)
    for name in (BEGUN, SKIPPED, *(f"chunks/{chunk:05d}.json" for chunk in range(3))):
        assert (out / name).read_bytes() == (old.path / name).read_bytes()
    assert same(everything(copied), everything(old))
    (old.path / SKIPPED).unlink()  # where one is missing, that is so in the copy
    assert not (copy_store(str(old.path), tmp_path / "another").path / SKIPPED).exists()


def test_what_verify_found_whole_is_remembered_of_format_1_too(old: Store, hashed: list[str]) -> None:
    old.verify()
    hashed.clear()
    integrity._whole.clear()  # as in another process
    everything(Store.open(old.path))
    assert hashed == []
    path = old.path / MANIFEST  # another manifest, another list
    path.write_text(path.read_text().replace('"mirrored": 0', '"mirrored": 1'))
    everything(Store.open(old.path))
    assert len(hashed) == 12


def test_a_manifest_of_format_1_without_a_part_is_refused(old: Store) -> None:
    path = old.path / MANIFEST
    path.write_text(path.read_text().replace('"splits"', '"splitz"'))
    with pytest.raises(CorruptStoreError, match=r"manifest\.json: is damaged"):
        Store.open(old.path)


# --- what is remembered ------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards whose CRC-32 was taken."""
    taken: list[str] = []
    plain = integrity.crc32

    def crc32(path: Path) -> int:
        taken.append(f"{path.parent.name}/{path.name}")
        return plain(path)

    monkeypatch.setattr(integrity, "crc32", crc32)
    monkeypatch.setattr(integrity, "SETTLED", 0)
    return taken


def test_a_shard_is_hashed_once_in_a_process(store: Store, hashed: list[str]) -> None:
    for _ in range(2):
        everything(Store.open(store.path))
    assert len(hashed) == len(set(hashed)) == 12


def test_a_shard_that_changes_is_hashed_again(store: Store, hashed: list[str]) -> None:
    """Even where its size and the time of its last change are put back."""
    everything(Store.open(store.path))
    path = store.path / "columns/rows/00000.safetensors"
    before = path.stat()
    flip_a_bit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CorruptStoreError, match="rows/00000"):
        everything(Store.open(store.path))


def test_what_verify_found_whole_is_not_hashed_until_it_changes(store: Store, hashed: list[str]) -> None:
    store.verify()
    hashed.clear()
    integrity._whole.clear()  # as in another process
    everything(Store.open(store.path))
    assert hashed == []
    flip_a_bit(store.path / "columns/rows/00000.safetensors")
    with pytest.raises(CorruptStoreError, match="rows/00000"):
        everything(Store.open(store.path))
    assert set(hashed) == {"rows/00000.safetensors"}


def test_a_file_changed_a_moment_ago_is_not_remembered(store: Store, hashed: list[str]) -> None:
    """It could change again and show the same time."""
    integrity.SETTLED = 10**12
    store.verify()
    assert read_json(store.path / integrity.VERIFIED)["files"] == {}
    for _ in range(2):
        everything(Store.open(store.path))
    assert len(hashed) == 24


@pytest.mark.parametrize("text", ["", "[]", '{"manifest": "another", "files": {"columns": [1, 2, 3]}}'])
def test_a_list_of_what_was_verified_that_means_nothing_is_ignored(text: str, store: Store) -> None:
    (store.path / integrity.VERIFIED).write_text(text)
    everything(Store.open(store.path))


def test_a_store_that_cannot_be_written_can_be_verified(store: Store) -> None:
    (store.path / integrity.VERIFIED).mkdir()  # as good as read-only, also for root
    assert store.verify().files == 18


def test_verify_tells_every_damaged_file_and_one_cure(store: Store) -> None:
    seen: list[int] = []
    assert store.verify(lambda done, total: seen.append(done)).files == 18
    assert seen == list(range(1, 18))
    flip_a_bit(store.path / "columns/text/00000.safetensors")
    (store.path / "columns/rows/00002.safetensors").unlink()
    lines: list[str] = []
    with pytest.raises(CorruptStoreError) as caught:
        Store.open(store.path).verify(tell=lines.append)
    assert lines == [
        f"{store.path}/columns/text/00000.safetensors does not match its checksum",
        f"{store.path}/columns/rows/00002.safetensors is missing",
    ]
    assert "00000.json" in str(caught.value)
    assert "00002.json" in str(caught.value)
    assert "00001" not in str(caught.value)
