"""A store at a URL reads like a local one; what arrives damaged, late or not at all never becomes data."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from shoestring.data import download
from shoestring.data.copying import copy_store
from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.integrity import Entry
from shoestring.data.loader import Loader
from shoestring.data.manifest import signed
from shoestring.data.store import Store
from shoestring.errors import CorruptStoreError, OutputError, StoreError
from shoestring.storage import read_json

URL = "shaky://bucket/mine"


class Shaky(MemoryFileSystem):
    """Files in memory behind a network that fails as told: `faults` of a file, one for each reading."""

    protocol = "shaky"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    faults: dict[str, list[str]] = {}
    read: list[str] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix("shaky://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode, **options)
        name = path.removeprefix("/bucket/mine/")
        self.read.append(name)
        pending = self.faults.get(name) or self.faults.get("*") or []
        fault = pending.pop(0) if pending else "none"
        if fault == "down":
            raise ConnectionResetError("connection reset by peer\nsecond line")
        content = bytearray(super()._open(path, mode).getvalue())
        if fault == "flipped":
            content[len(content) // 2] ^= 1
        if fault in ("short", "breaks"):
            del content[len(content) // 2 :]
        return Breaking(content) if fault == "breaks" else io.BytesIO(content)


class Breaking(io.BytesIO):
    """Gives all it has, then an error."""

    def read(self, size: int | None = -1) -> bytes:
        if block := super().read(size):
            return block
        raise TimeoutError("timed out")


@pytest.fixture
def bucket(chunked: Path, monkeypatch: pytest.MonkeyPatch) -> type[Shaky]:
    """The store at `URL`."""
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    for name, value in (("store", {}), ("pseudo_dirs", [""]), ("faults", {}), ("read", [])):
        monkeypatch.setattr(Shaky, name, value)
    monkeypatch.setattr(download, "WAITS", (0.0, 0.0))
    Shaky().put(str(chunked), URL, recursive=True)
    Shaky.read.clear()
    return Shaky


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cached(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/files/*"))


def loader(store: Store, **changes: Any) -> Loader:
    return Loader(store, **{"size": 16, "batch_size": 8, "seed": 3, "captions": False, **changes})


def assert_same_batches(one: Loader, other: Loader, stop: int) -> None:
    for mine, theirs in zip(one.batches(0, stop), other.batches(0, stop), strict=True):
        assert torch.equal(mine.latents, theirs.latents)
        assert torch.equal(mine.text, theirs.text)
        assert mine.captions == theirs.captions


# --- reading -----------------------------------------------------------------------------------------------


def test_a_store_at_a_url_reads_like_the_folder(chunked: Path, bucket: type[Shaky], cache: Path) -> None:
    here, there = Store.open(chunked), Store.open(URL + "/")
    assert (there.place, there.path.parent) == (URL, cache)
    assert_same_batches(loader(there, captions=True), loader(here, captions=True), 172)
    assert there.record(200) == here.record(200)
    assert torch.equal(there.size_crop(np.arange(9), 16), here.size_crop(np.arange(9), 16))


def test_each_shard_is_downloaded_once_and_only_columns_in_use(bucket: type[Shaky], cache: Path) -> None:
    for _ in range(2):  # the second time from the cache, as in another process
        list(loader(Store.open(URL)).batches(0, 400))
    read = Counter(bucket.read)
    assert read.pop("manifest.json") == 2
    assert set(read.values()) == {1}
    assert {name.split("/")[1] for name in read} == {"latents-16", "rows", "text"}
    assert len(cached(cache)) == len(read) == 78


def test_the_cache_can_be_named(bucket: type[Shaky], cache: Path, tmp_path: Path) -> None:
    Store.open(URL, cache=tmp_path / "elsewhere").latents(16, np.array([0]))
    assert len(cached(tmp_path / "elsewhere")) == 1
    assert not cache.exists()


def test_file_urls_work_too(chunked: Path) -> None:
    assert_same_batches(loader(Store.open(chunked.as_uri())), loader(Store.open(chunked)), 16)


def test_a_store_that_changes_at_its_url_is_read_anew(
    bucket: type[Shaky], make_store: Callable[..., Store], rows: Callable[..., Any], chunked: Path
) -> None:
    """A reader that has it open stays with what it opened, as far as that is in the cache; and back again."""
    before = Store.open(URL)
    expected = before.latents(16, np.arange(203))
    other = make_store([*rows(195), *rows(8)], chunk_rows=8, held_out=31)
    for place in (other.path, chunked):
        Shaky().rm(URL, recursive=True)
        Shaky().put(str(place), URL, recursive=True)
        bucket.read.clear()
        after = Store.open(URL)
        local = Store.open(place)
        assert torch.equal(after.latents(16, np.arange(203)), local.latents(16, np.arange(203)))
        assert len(bucket.read) == (27 if place == other.path else 1)  # the manifest, and what is new
        assert torch.equal(before.latents(16, np.arange(203)), expected)


def test_files_that_a_store_has_no_more_leave_the_cache(
    bucket: type[Shaky], cache: Path, make_store: Callable[..., Store], rows: Callable[..., Any]
) -> None:
    """Not at once, for who began with the old store may still read them; what is in use stays."""
    Store.open(URL).latents(16, np.arange(203))
    other = make_store([*rows(195), *rows(8)], chunk_rows=8, held_out=31)
    Shaky().rm(URL, recursive=True)
    Shaky().put(str(other.path), URL, recursive=True)
    Store.open(URL).latents(16, np.arange(203))
    both = {path.name for path in cached(cache)}
    named = {entry["sha256"] for entry in other.manifest["files"]}
    assert both - named
    assert both & named
    Store.open(URL)
    assert {path.name for path in cached(cache)} == both
    for path in cached(cache):
        os.utime(path, (0, 0))
    Store.open(URL)
    assert {path.name for path in cached(cache)} == both & named


# --- damage and failure ------------------------------------------------------------------------------------

SHARD = "columns/latents-16/00000.safetensors"


@pytest.mark.parametrize("fault", ["flipped", "short"])
def test_a_damaged_arrival_is_fetched_once_more(fault: str, chunked: Path, bucket: type[Shaky]) -> None:
    bucket.faults[SHARD] = [fault]
    latents = Store.open(URL).latents(16, np.arange(8))
    assert torch.equal(latents, Store.open(chunked).latents(16, np.arange(8)))
    assert bucket.read.count(SHARD) == 2


@pytest.mark.parametrize("fault", ["flipped", "short"])
def test_what_arrives_damaged_twice_is_named_and_not_kept(
    fault: str, bucket: type[Shaky], cache: Path
) -> None:
    bucket.faults[SHARD] = [fault] * 2
    store = Store.open(URL)
    with pytest.raises(CorruptStoreError) as caught:
        store.latents(16, np.arange(8))
    assert str(caught.value).startswith(f"{URL}/{SHARD} arrives damaged: its ")
    assert "(downloaded twice). Upload this file again from where the store was made" in str(caught.value)
    assert cached(cache) == []
    store.latents(16, np.arange(8))  # and sound again, it is read


def test_a_missing_shard_is_named(bucket: type[Shaky]) -> None:
    Shaky().rm(f"{URL}/{SHARD}")
    with pytest.raises(CorruptStoreError, match=f"{URL}/{SHARD} is missing. Upload this file again"):
        Store.open(URL).latents(16, np.arange(8))


@pytest.mark.parametrize("fault", ["down", "breaks"])
def test_a_network_that_comes_back_costs_nothing(fault: str, chunked: Path, bucket: type[Shaky]) -> None:
    bucket.faults["*"] = [fault, fault, "none"] * 100
    assert_same_batches(loader(Store.open(URL)), loader(Store.open(chunked)), 172)


def test_a_network_that_stays_away_is_one_line(bucket: type[Shaky], cache: Path) -> None:
    store = Store.open(URL)
    bucket.faults[SHARD] = ["down"] * 3
    with pytest.raises(StoreError) as caught:
        store.latents(16, np.arange(8))
    assert not isinstance(caught.value, CorruptStoreError)
    assert str(caught.value) == (
        f"{URL}/{SHARD}: cannot be downloaded (ConnectionResetError: connection reset by peer). Check the "
        "network and your access, then run the same command again; what has arrived is kept."
    )
    assert not list(cache.rglob("*.partial"))
    bucket.faults["*"] = ["down"] * 3
    with pytest.raises(StoreError, match=r"manifest\.json: cannot be downloaded"):
        Store.open(URL, cache=cache / "another")


def test_out_of_reach_what_is_in_the_cache_can_be_read(bucket: type[Shaky]) -> None:
    before = Store.open(URL).latents(16, np.arange(8))
    bucket.faults["*"] = ["down"] * 100
    store = Store.open(URL)
    assert torch.equal(store.latents(16, np.arange(8)), before)
    with pytest.raises(StoreError, match="cannot be downloaded"):
        store.latents(16, np.arange(16))


def test_a_damaged_copy_in_the_cache_is_replaced(chunked: Path, bucket: type[Shaky], cache: Path) -> None:
    """By a reader that did not download it itself."""
    Store.open(URL).latents(16, np.arange(8))
    (path,) = cached(cache)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    latents = Store.open(URL).latents(16, np.arange(8))
    assert torch.equal(latents, Store.open(chunked).latents(16, np.arange(8)))
    assert bucket.read.count(SHARD) == 2


@pytest.mark.parametrize("fault", ["flipped", "short"])
def test_a_manifest_is_fetched_once_more_and_then_refused(fault: str, bucket: type[Shaky]) -> None:
    bucket.faults["manifest.json"] = [fault]
    Store.open(URL)
    bucket.faults["manifest.json"] = [fault] * 2
    with pytest.raises(CorruptStoreError, match=f"{URL}/manifest.json: .*Upload it again from where"):
        Store.open(URL)


def test_where_there_is_no_store_that_is_said(bucket: type[Shaky]) -> None:
    with pytest.raises(StoreError, match=r"shaky://bucket/none: no store there \(no manifest\.json\)"):
        Store.open("shaky://bucket/none")
    with pytest.raises(StoreError, match=r"nowhere://x/y: cannot be opened: Protocol not known.* Give a fol"):
        Store.open("nowhere://x/y")


def test_what_a_protocol_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(StoreError, match=r"s3://bucket/mine: cannot be opened: Install s3fs .*\(with pip\)"):
        Store.open("s3://bucket/mine")


@pytest.mark.parametrize("url", ["s3://bucket/mine", "file:///mine", "hf://datasets/owner/name"])
def test_a_store_is_not_encoded_or_copied_into_a_url(
    url: str, chunked: Path, list_source: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=r"is a URL\. Encode into a folder of this machine"):
        encode(list_source(rows(3)), Path(url), EncodeSettings(sizes=(16,)))
    for out in (url, Path(url)):
        with pytest.raises(StoreError, match=r"is a URL\. Copy to a folder of this machine"):
            copy_store(str(chunked), out)
    assert not list(tmp_path.iterdir())


def test_a_newer_store_asks_for_an_upgrade(bucket: type[Shaky], chunked: Path) -> None:
    newer = signed(read_json(chunked / "manifest.json") | {"format": 99})
    Shaky().pipe_file(f"{URL}/manifest.json", json.dumps(newer).encode())
    with pytest.raises(StoreError, match=r"store format 99, made by Shoestring .* Upgrade"):
        Store.open(URL)


def test_a_size_of_the_cache_that_is_none_is_refused(
    bucket: type[Shaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOESTRING_CACHE_SIZE", "much")
    with pytest.raises(StoreError, match=r"SHOESTRING_CACHE_SIZE=much: is no size\. Give one such as 500GB"):
        Store.open(URL)


def test_what_a_killed_process_left_half_downloaded_goes(bucket: type[Shaky], cache: Path) -> None:
    Store.open(URL)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    partial = next(cache.iterdir()) / "files" / f".abc.{dead.pid}.partial"
    partial.write_text("half")
    Store.open(URL)
    assert not partial.exists()


# --- windows -----------------------------------------------------------------------------------------------


def test_with_a_window_the_cache_stays_small(chunked: Path, bucket: type[Shaky], cache: Path) -> None:
    """Two windows of three columns at most, over two epochs; the batches are those of the folder."""
    window, most = 3, 0
    local = loader(Store.open(chunked), window=window).batches(0, 344)
    for batch, expected in zip(loader(Store.open(URL), window=window).batches(0, 344), local, strict=True):
        assert torch.equal(batch.latents, expected.latents)
        assert torch.equal(batch.text, expected.text)
        most = max(most, len(cached(cache)))
    assert 3 * window <= most <= 2 * 3 * window
    assert set(Counter(bucket.read).values()) <= {1, 2}  # once an epoch


def test_a_larger_cache_keeps_chunks_for_the_next_epoch(
    bucket: type[Shaky], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sum(entry["bytes"] for entry in Store.open(URL).manifest["files"])
    for size, kept in ((f"{whole * 2}", True), (f"{whole * 0.3 / 1000}kB", False)):
        shutil.rmtree(cache)
        bucket.read.clear()
        monkeypatch.setenv("SHOESTRING_CACHE_SIZE", size)
        store = Store.open(URL)
        for _ in loader(store, window=3).batches(0, 344):
            pass
        found = sum(path.stat().st_size for path in cached(cache))
        assert (max(Counter(bucket.read).values()) == 1) == kept
        assert kept or found <= whole * 0.3 + 6 * whole / 26  # and two windows
        assert found > whole * 0.2


@pytest.mark.parametrize("times", [1, 4])
def test_a_shard_that_another_process_removes_is_fetched_again(
    times: int, chunked: Path, bucket: type[Shaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its download and its use, as a process does that is ahead by a window."""
    store, other, removals = Store.open(URL), Store.open(URL), [None] * times
    local = store.files.local

    def raced(entry: Entry) -> Path:
        path = local(entry)
        if removals:
            removals.pop()
            other.files.leave([entry])
        return path

    monkeypatch.setattr(store.files, "local", raced)
    latents = store.latents(16, np.arange(8))
    assert torch.equal(latents, Store.open(chunked).latents(16, np.arange(8)))
    assert bucket.read.count(SHARD) == times + 1


def test_leftovers_of_an_earlier_run_make_room(
    bucket: type[Shaky], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a size, files of a run before count, and the oldest of them go first."""
    monkeypatch.setenv("SHOESTRING_CACHE_SIZE", "1")
    Store.open(URL).latents(16, np.arange(203))
    assert len(cached(cache)) == 26
    store = Store.open(URL)
    store.hold(store.columns(16), [0])
    store.release(store.columns(16), [0], drop=True)
    assert len(cached(cache)) <= 3  # but for what was on its way


def test_many_threads_and_stores_download_a_shard_once(bucket: type[Shaky]) -> None:
    """Two stores as in two processes, four threads each, one cache."""
    stores = [Store.open(URL) for _ in range(2)]
    found: list[torch.Tensor] = []

    def read(store: Store) -> None:
        found.append(store.latents(16, np.arange(203)))

    threads = [threading.Thread(target=read, args=(store,)) for store in stores * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(each, found[0]) for each in found)
    assert Counter(name for name in bucket.read if name.startswith("columns")).most_common(1)[0][1] == 1


READ = """
import sys
import fsspec, numpy as np
from fsspec.implementations.local import LocalFileSystem
from shoestring.data.store import Store

class Logged(LocalFileSystem):
    protocol = "logged"

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("logged://")

    def _open(self, path, mode="rb", **options):
        with open(sys.argv[2], "a") as log:
            log.write(path + chr(10))
        return super()._open(path, mode, **options)

fsspec.register_implementation("logged", Logged)
store = Store.open("logged://" + sys.argv[1])
print(float(store.latents(16, np.arange(203)).double().sum()))
"""


@pytest.mark.slow
def test_processes_of_one_machine_download_a_shard_once(chunked: Path, tmp_path: Path) -> None:
    """Three real processes at once, one cache."""
    command = [sys.executable, "-c", READ, str(chunked), str(tmp_path / "log")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(3)]
    told = [float(reader.communicate()[0]) for reader in readers]
    assert told == [float(Store.open(chunked).latents(16, np.arange(203)).double().sum())] * 3
    read = Counter((tmp_path / "log").read_text().split())
    assert read.pop(str(chunked / "manifest.json")) == 3
    assert len(read) == 26
    assert set(read.values()) == {1}


# --- verify and copy ---------------------------------------------------------------------------------------


def test_a_store_at_a_url_is_verified_there(bucket: type[Shaky], cache: Path) -> None:
    assert Store.open(URL).verify().files == Store.open(URL).verify().files
    assert cached(cache) == []
    content = bytearray(Shaky().cat_file(f"{URL}/{SHARD}"))
    content[-1] ^= 1
    Shaky().pipe_file(f"{URL}/{SHARD}", bytes(content))
    Shaky().rm(f"{URL}/chunks/00003.json")
    Shaky().pipe_file(f"{URL}/columns/text/extra", b"")
    lines: list[str] = []
    with pytest.raises(CorruptStoreError, match=r"chunks/00003\.json were found missing or damaged\. Upload"):
        Store.open(URL).verify(tell=lines.append)
    assert lines == [f"{URL}/{SHARD} does not match its checksum", f"{URL}/chunks/00003.json is missing"]


@pytest.mark.parametrize("place", ["url", "folder"])
def test_a_copy_is_the_store_to_the_byte(
    place: str, chunked: Path, bucket: type[Shaky], tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    copied = copy_store(URL if place == "url" else str(chunked), out)
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    files.remove(Path("verified.json"))
    assert all((out / name).read_bytes() == (chunked / name).read_bytes() for name in files)
    assert len(files) == copied.verify().files
    assert_same_batches(loader(copied), loader(Store.open(chunked)), 16)


def test_a_copy_that_stopped_goes_on(chunked: Path, bucket: type[Shaky], tmp_path: Path) -> None:
    """Files that are there are not copied again, damaged ones are; until the end it is no store."""
    out = tmp_path / "copy"
    bucket.faults["columns/text/00020.safetensors"] = ["down"] * 3
    with pytest.raises(StoreError, match=r"text/00020\.safetensors: cannot be downloaded"):
        copy_store(URL, out)
    with pytest.raises(StoreError, match="not a store"):
        Store.open(out)
    done = [name for name in Shaky.read if (out / name).is_file()]
    assert done
    (out / done[0]).write_bytes(b"damaged since")
    bucket.read.clear()
    copy_store(URL, out).verify()
    assert sorted(set(done) & set(bucket.read)) == [done[0]]
    bucket.read.clear()
    copy_store(URL, out)
    assert bucket.read == ["manifest.json"]


def test_a_damaged_source_is_not_copied(chunked: Path, tmp_path: Path) -> None:
    source = shutil.copytree(chunked, tmp_path / "source")
    (source / SHARD).write_bytes(b"?")
    with pytest.raises(CorruptStoreError) as caught:
        copy_store(str(source), tmp_path / "copy")
    assert f"{source}/{SHARD} does not match its checksum. Encode this chunk again with: rm" in str(
        caught.value
    )
    assert str(caught.value).endswith("Then copy again; what is whole has been copied.")
    assert not (tmp_path / "copy/manifest.json").exists()


def test_a_copy_takes_no_place_that_is_taken(
    chunked: Path, make_store: Callable[..., Store], rows: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        copy_store(str(chunked), tmp_path / "a file")
    other = make_store(rows(3), "other").path
    with pytest.raises(StoreError, match="holds something other than a copy of"):
        copy_store(str(chunked), other)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_text("")
    with pytest.raises(StoreError, match="holds something other than a copy of"):
        copy_store(str(chunked), tmp_path / "photos")


def test_a_copy_that_does_not_fit_is_not_begun(
    chunked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"needs 0\.0 GB more, and 0\.0 GB are free"):
        copy_store(str(chunked), tmp_path / "copy")
