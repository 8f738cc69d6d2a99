"""A store gives back what was put in, from any rows, and refuses what it was not made for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from shoestring.data.manifest import FORMAT, signed
from shoestring.data.resident import Resident
from shoestring.data.rows import Row
from shoestring.data.shards import read_lines, read_shard, write_lines, write_shard
from shoestring.data.splits import Split
from shoestring.data.store import Store
from shoestring.errors import StoreError
from shoestring.models.text_encoders import collate, load_text_encoder
from shoestring.storage import crc32, sha256

MakeStore = Callable[..., Store]
MakeRows = Callable[..., list[Row]]


# --- files -----------------------------------------------------------------------------------------------


@pytest.fixture
def arrays() -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    return {
        "bytes": generator.integers(0, 256, (3, 5), dtype=np.uint8),
        "half": generator.normal(size=(2, 3)).astype(np.float16),
        "long": generator.integers(0, 9, 7),
        "int": np.arange(4, dtype=np.int32),
        "empty": np.empty((0, 4), dtype=np.float16),
    }


def test_shards_are_plain_safetensors(arrays: dict[str, Any], tmp_path: Path) -> None:
    """The library reads what we write, and we read what the library writes."""
    entry = write_shard(tmp_path, "a/b.safetensors", arrays, rows=3)
    path = tmp_path / "a/b.safetensors"
    save_file(arrays, tmp_path / "theirs.safetensors", metadata={"who": "safetensors"})
    for read in (load_file(path), read_shard(path), read_shard(tmp_path / "theirs.safetensors")):
        assert read.keys() == arrays.keys()
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype
            assert np.array_equal(read[name], array)
    assert (entry.bytes, entry.crc32, entry.sha256) == (path.stat().st_size, crc32(path), sha256(path))


def test_lines_are_found_by_number(tmp_path: Path) -> None:
    records = [{"key": "é"}, {"key": "two\nlines"}, {}]
    entry = write_lines(tmp_path, "a.jsonl", records)
    lines = read_lines(tmp_path / "a.jsonl")
    start, stop = lines["offsets"][1:3]
    assert json.loads(lines["bytes"][start:stop].tobytes()) == records[1]
    assert (len(lines["offsets"]), entry.rows) == (4, 3)
    write_lines(tmp_path, "none.jsonl", [])
    assert read_lines(tmp_path / "none.jsonl")["offsets"].tolist() == [0]


# --- reading ---------------------------------------------------------------------------------------------


def test_any_rows_come_back_as_they_went_in(make_store: MakeStore, rows: MakeRows) -> None:
    """Several chunks, in any order, with repeats: pictures, captions, tokens and keys."""
    given = rows(35)
    store = make_store(given)
    assert (len(store), store.sizes, store.latent_shape(16)) == (35, (16,), (3, 16, 16))
    wanted = np.array([34, 0, 9, 10, 10, 20, 3])
    latents = store.latents(16, wanted)
    expected = torch.stack([torch.from_numpy(np.array(given[i].image)) for i in wanted])
    assert torch.equal(latents, expected.permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert [store.record(int(i))["key"] for i in wanted] == [f"row{i}" for i in wanted]
    assert [tuple(store.captions(int(i))) for i in wanted] == [given[i].captions for i in wanted]


def test_choice_picks_a_caption_and_its_tokens(make_store: MakeStore, rows: MakeRows) -> None:
    given = rows(12)
    store = make_store(given)
    wanted, choice = np.array([2, 5, 11, 2]), np.array([0.0, 0.34, 0.99, 0.67])
    expected = [given[i].captions[int(c * 3)] for i, c in zip(wanted, choice, strict=True)]
    assert store.chosen_captions(wanted, choice) == tuple(expected)
    tokens = load_text_encoder("hashing").encode(expected).tokens
    for ours, theirs in zip(store.text(wanted, choice), tokens, strict=True):
        assert torch.equal(ours, theirs.half().float())
    text, mask = store.padded_text(wanted, choice)
    expected_text, expected_mask = collate(store.text(wanted, choice))
    assert torch.equal(text, expected_text)
    assert torch.equal(mask, expected_mask)
    assert store.chosen_captions(wanted) == tuple(given[i].captions[0] for i in wanted)
    assert store.null_text.shape == (1, 64)


def test_captions_shared_by_rows_are_stored_once(make_store: MakeStore, rows: MakeRows) -> None:
    same = [Row(row.key, row.image, ("the very same caption",)) for row in rows(10)]
    tokens = load_file(make_store(same).path / "columns/text/00000.safetensors")["tokens"]
    assert tokens.shape == (4, 64)


def test_few_shards_are_open_at_once_and_the_one_unused_for_longest_goes_first(
    make_store: MakeStore, rows: MakeRows
) -> None:
    store = make_store(rows(40), chunk_rows=4)
    store._shards = Resident(store.files, store._entries, most=3)
    everything = store.latents(16, np.arange(40))
    assert torch.equal(store.latents(16, np.arange(40)[::-1].copy()), everything.flip(0))
    assert len(store._shards) == 3
    for row in (0, 4, 8, 0, 12):  # chunk 0 is used again before chunk 3 needs a place
        store.latents(16, np.array([row]))
    assert [int(Path(name).stem) for name in store._shards._open] == [2, 0, 3]


def test_rows_outside_are_refused(make_store: MakeStore, rows: MakeRows) -> None:
    store = make_store(rows(5))
    for wrong in ([5], [-1]):
        with pytest.raises(IndexError, match="from 0 to 4"):
            store.latents(16, np.array(wrong))


# --- splits ----------------------------------------------------------------------------------------------


def test_held_out_rows_are_a_fixed_random_part(make_store: MakeStore, rows: MakeRows) -> None:
    store = make_store(rows(40), held_out=8)
    held_out, train = store.splits["held_out"], store.splits["train"]
    some = held_out.rows(np.arange(8)).tolist()
    rest = train.rows(np.arange(32)).tolist()
    assert sorted(some + rest) == list(range(40))
    assert some != sorted(some)
    assert max(some) - min(some) > 8
    assert list(store.splits) == ["held_out", "train"]
    with pytest.raises(IndexError, match="from 0 to 7"):
        held_out.rows(np.array([8]))


def test_without_held_out_rows_train_is_everything(make_store: MakeStore, rows: MakeRows) -> None:
    assert make_store(rows(7)).splits == {"train": Split(0, 7, False, 0, 7)}


def test_a_sources_own_splits_are_kept(make_store: MakeStore, rows: MakeRows) -> None:
    given = [Row(r.key, r.image, r.captions, "train" if n < 13 else "hard") for n, r in enumerate(rows(20))]
    store = make_store(given)
    assert store.splits["hard"].rows(np.arange(7)).tolist() == list(range(13, 20))


# --- foreign, unfinished, newer --------------------------------------------------------------------------


def test_a_store_of_other_sizes_or_encoders_is_refused(make_store: MakeStore, rows: MakeRows) -> None:
    store = make_store(rows(3))
    store.check(size=16, autoencoder="pixels", text_encoder="hashing", pad="none")
    with pytest.raises(StoreError, match=r"holds images of 16 pixels, not 32\. .*--size 32"):
        store.check(size=32)
    with pytest.raises(
        StoreError, match=r"autoencoder pixels, the recipe asks for x/vae\. .*--autoencoder x/vae"
    ):
        store.check(autoencoder="x/vae")
    with pytest.raises(
        StoreError, match=r"text encoder hashing, the recipe asks for x/t5\. .*--text-encoder"
    ):
        store.check(text_encoder="x/t5")
    with pytest.raises(StoreError, match="pad none, the recipe asks for encoder"):
        store.check(pad="encoder")


def test_one_local_encoder_may_be_written_in_two_ways(
    make_store: MakeStore, rows: MakeRows, kl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(rows(3), autoencoder=str(kl_folder))
    monkeypatch.chdir(kl_folder.parent)
    store.check(autoencoder="kl")


def test_what_is_no_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no such store\. Make one with `shoestring encode SOURCE --out"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="not a store"):
        Store.open(tmp_path)


def test_an_unfinished_store_says_how_to_go_on(make_store: MakeStore, rows: MakeRows) -> None:
    store = make_store(rows(25))
    (store.path / "manifest.json").unlink()
    with pytest.raises(
        StoreError, match=r"unfinished \(3 chunks done\)\. Go on with: shoestring encode list"
    ):
        Store.open(store.path)


def test_a_newer_format_asks_for_an_upgrade(make_store: MakeStore, rows: MakeRows) -> None:
    store = make_store(rows(3))
    newer = signed(store.manifest | {"format": FORMAT + 1, "shoestring": "9.9"})
    (store.path / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(StoreError, match=rf"store format {FORMAT + 1}, made by Shoestring 9\.9.*Upgrade"):
        Store.open(store.path)


def test_bytes_by_column_are_those_on_disk(make_store: MakeStore, rows: MakeRows) -> None:
    store = make_store(rows(25))
    for column, size in store.bytes_by_column().items():
        files = (store.path / "columns" / column).iterdir()
        assert sum(file.stat().st_size for file in files) == size
