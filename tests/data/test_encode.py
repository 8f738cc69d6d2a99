"""Encoding survives bad rows, stops and full disks, and its bytes depend on the source and settings alone."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shoestring.data import shards
from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.rows import Row
from shoestring.data.sources import open_source
from shoestring.data.store import Store
from shoestring.errors import OutputError, ShoestringError, SourceError, StoreError
from shoestring.models.autoencoders import encode_images, load_autoencoder, scale_latents
from shoestring.models.text_encoders import load_text_encoder
from shoestring.storage import read_json

MakeRows = Callable[..., list[Row]]
SMALL = {"sizes": (16,), "chunk_rows": 10}


def settings(**changes: Any) -> EncodeSettings:
    return EncodeSettings(**{**SMALL, **changes})


def run(
    source: Any, out: Path, worker: tuple[int, int] = (0, 1), **changes: Any
) -> tuple[Store | None, list[str]]:
    said: list[str] = []
    return encode(source, out, settings(**changes), worker=worker, log=said.append), said


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but those on time spent; of the manifest, everything else."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    if "manifest.json" in files:
        manifest = json.loads(files["manifest.json"])
        timed = [manifest, *manifest.get("added", {}).values()]
        assert all(each.pop("work") for each in timed)
        files["manifest.json"] = json.dumps({**manifest, "sha256": ""}).encode()
    return {name: data for name, data in files.items() if not name.startswith("work/")}


# --- what is stored --------------------------------------------------------------------------------------


def test_latents_and_tokens_equal_the_encoders_own(
    rows: MakeRows, list_source: Any, kl_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    """A real VAE and a real CLIP, both tiny: mean, log-variance, scaling, tokens and pooled text."""
    given = rows(13)
    names = {"autoencoder": str(kl_folder), "text_encoder": str(clip_folder)}
    store, _ = run(list_source(given), tmp_path / "s", log_variance=True, **names)
    assert store is not None
    vae = load_autoencoder(str(kl_folder))
    pictures = torch.stack([torch.from_numpy(np.array(row.image)) for row in given])
    mean, spread = encode_images(vae, pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)
    every = np.arange(13)
    torch.testing.assert_close(store.latents(16, every), scale_latents(vae, mean), atol=2e-3, rtol=2e-3)
    assert spread is not None
    noise = torch.randn(mean.shape)
    drawn = scale_latents(vae, mean + (spread / 2).exp() * noise)
    torch.testing.assert_close(store.latents(16, every, noise=noise), drawn, atol=5e-3, rtol=5e-3)
    encoded = load_text_encoder(str(clip_folder)).encode([row.captions[0] for row in given])
    for ours, theirs in zip(store.text(every), encoded.tokens, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(store.pooled(every), encoded.pooled, atol=2e-3, rtol=2e-3)
    assert store.latent_shape(16) == (4, 8, 8)


@pytest.mark.parametrize("pad", ["encoder", "masked"])
def test_padded_text_is_stored_at_every_position(
    pad: str, rows: MakeRows, list_source: Any, clip_folder: Path, tmp_path: Path
) -> None:
    made, _ = run(list_source(rows(4)), tmp_path / "s", text_encoder=str(clip_folder), pad=pad)
    assert made is not None
    store = Store.open(tmp_path / "s")
    assert (store.pad, store.padded) == (pad, True)
    expected = load_text_encoder(str(clip_folder), pad=pad).encode(store.chosen_captions(np.arange(4)))
    for ours, theirs in zip(store.text(np.arange(4)), expected.tokens, strict=True):
        assert ours.shape == (8, 16)
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


def test_several_sizes_and_their_ids(list_source: Any, pictures: Any, tmp_path: Path) -> None:
    source = list_source([Row("a", pictures(0, 100, 60), ("x",))])
    store, _ = run(source, tmp_path / "s", sizes=(30, 16))
    assert store is not None
    assert store.sizes == (16, 30)
    one = np.array([0])
    assert store.latents(30, one).shape == (1, 3, 30, 30)
    assert store.size_crop(one, 30).tolist() == [[60, 100, 0, 10, 30, 30]]
    assert store.size_crop(one, 16).tolist() == [[60, 100, 0, 5, 16, 16]]


def test_mirrored_versions_lie_beside_the_others_unless_a_caption_says_a_side(
    rows: MakeRows, list_source: Any, tmp_path: Path
) -> None:
    given = rows(12)
    given[3] = Row("sided", given[3].image, ("a cat on the left",))
    store, _ = run(list_source(given), tmp_path / "s", flip=True)
    assert store is not None
    plain = store.latents(16, np.arange(12))
    turned = store.latents(16, np.arange(12), flipped=np.ones(12, bool))
    expected = plain.flip(-1)
    expected[3] = plain[3]
    assert torch.equal(turned, expected)
    some = np.arange(12) % 2 == 0
    mixed = store.latents(16, np.arange(12), flipped=some)
    assert torch.equal(mixed, torch.where(torch.from_numpy(some)[:, None, None, None], expected, plain))
    assert store.manifest["mirrored"] == 11


# --- bad rows --------------------------------------------------------------------------------------------


def test_bad_rows_are_counted_listed_and_left_out(pngs: Callable[..., bytes], tmp_path: Path) -> None:
    """An unreadable, a truncated, a too small image and one without caption among good ones."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.png").write_bytes(pngs(i))
        (folder / f"{i:02d}.txt").write_text(f"number {i}")
    (folder / "03.png").write_bytes(b"not an image")
    (folder / "11.png").write_bytes(pngs(11)[:1000])
    (folder / "17.png").write_bytes(pngs(17, 15, 40))
    (folder / "25.txt").unlink()
    store, said = run(open_source(str(folder)), tmp_path / "s", max_bad=0.2)
    assert store is not None
    reasons = {"no caption": 1, "too small": 1, "truncated image": 1, "unreadable image": 1}
    assert store.manifest["skipped"] == reasons
    listed = [json.loads(line) for line in (store.path / "skipped.jsonl").read_text().splitlines()]
    assert {each["key"]: each["reason"] for each in listed} == {
        "03.png": "unreadable image",
        "11.png": "truncated image",
        "17.png": "too small",
        "25.png": "no caption",
    }
    assert len(said) == 1
    assert "left out 1 unreadable image" in said[0]
    keys = [store.record(i)["key"] for i in range(len(store))]
    assert keys == [f"{i:02d}.png" for i in range(30) if i not in (3, 11, 17, 25)]


def test_too_many_bad_rows_stop_it_and_a_larger_share_goes_on_from_there(
    rows: MakeRows, list_source: Any, tmp_path: Path
) -> None:
    given = rows(30)
    for i in (1, 12, 23):
        given[i] = Row(f"row{i}", given[i].image, ())
    source = list_source(given)
    with pytest.raises(
        SourceError, match=r"3 of 30 rows are bad, more than the 5% allowed: 3 no caption.*0\.10"
    ):
        run(source, tmp_path / "s")
    assert (tmp_path / "s/skipped.jsonl").read_text().count("no caption") == 3
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(tmp_path / "s")
    source.reads.clear()
    store, _ = run(source, tmp_path / "s", max_bad=0.1)
    assert store is not None
    assert (len(store), source.reads) == (27, [])


def test_a_source_of_nothing_but_bad_rows_is_refused(
    rows: MakeRows, list_source: Any, tmp_path: Path
) -> None:
    small = [Row(row.key, row.image[:8, :8], row.captions) for row in rows(5)]  # type: ignore[call-overload]
    with pytest.raises(SourceError, match=r"no usable row among 5: 5 too small\. Take a smaller --size"):
        run(list_source(small), tmp_path / "s", max_bad=1.0)
    with pytest.raises(SourceError, match="the source has no rows"):
        run(list_source([]), tmp_path / "empty")


def test_a_prompt_too_long_is_cut_and_told_once(rows: MakeRows, list_source: Any, tmp_path: Path) -> None:
    given = [Row(row.key, row.image, (f"one two three four {n}",)) for n, row in enumerate(rows(25))]
    given[7] = Row("short", given[7].image, ("one two",))
    store, said = run(list_source(given), tmp_path / "s", max_tokens=3)
    assert store is not None
    assert said == ["warning: 24 captions are longer than the text encoder's 3 tokens; 48 tokens were cut"]
    assert {len(each) for each in store.text(np.arange(25))} == {2, 3}


# --- stops and workers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("count", [20, 25])
def test_several_workers_write_the_same_bytes_as_one(
    count: int, counted: bool, rows: MakeRows, list_source: Any, tmp_path: Path
) -> None:
    """Of a source that knows its length or not, ending with a whole chunk or not."""
    given = rows(count)
    given[4] = Row("bad", b"", ("x",))

    def source() -> Any:
        return list_source(given, counted=counted)

    run(source(), tmp_path / "one", held_out=5)
    sealed = [run(source(), tmp_path / "many", (rank, 4), held_out=5)[0] for rank in (2, 3, 0, 1)]
    assert sealed[0] is None
    assert sealed[-1] is not None
    assert files_of(tmp_path / "one") == files_of(tmp_path / "many")
    assert len(sealed[-1]) == count - 1


def test_a_worker_reads_its_own_chunks_only(rows: MakeRows, list_source: Any, tmp_path: Path) -> None:
    source = list_source(rows(40))
    run(source, tmp_path / "s", (1, 3))
    assert source.reads == list(range(10, 20))


def test_a_second_run_encodes_nothing_again(rows: MakeRows, list_source: Any, tmp_path: Path) -> None:
    source = list_source(rows(25))
    run(source, tmp_path / "s")
    before = files_of(tmp_path / "s")
    source.reads.clear()
    store, _ = run(source, tmp_path / "s")
    assert store is not None
    assert source.reads == []
    assert files_of(tmp_path / "s") == before


def test_the_work_of_every_worker_and_start_is_counted(
    rows: MakeRows, list_source: Any, tmp_path: Path
) -> None:
    """Rows as often as they were encoded, a mended chunk twice; seconds and the device beside them."""
    source = list_source(rows(25))
    run(source, tmp_path / "s", (0, 2))
    store, _ = run(source, tmp_path / "s", (1, 2))
    assert store is not None
    assert [(each["worker"], each["rows"]) for each in store.manifest["work"]] == [("0/2", 15), ("1/2", 10)]
    (tmp_path / "s/chunks/00000.json").unlink()
    again, _ = run(source, tmp_path / "s", (0, 2))
    assert again is not None
    assert [each["rows"] for each in again.manifest["work"]] == [25, 10]
    first, second = (each.manifest["work"][0] for each in (store, again))
    assert 0 < first["seconds"] <= second["seconds"]
    assert first["device"] == second["device"] != ""


def test_an_interrupted_run_goes_on_after_its_last_chunk(
    rows: MakeRows, list_source: Any, tmp_path: Path
) -> None:
    class Stops(list_source):  # type: ignore[misc]
        def rows(self, start: int, stop: int) -> Any:
            for row in super().rows(start, stop):
                if row.key == "row27":
                    raise KeyboardInterrupt
                yield row

    given = rows(40)
    with pytest.raises(KeyboardInterrupt):
        run(Stops(given), tmp_path / "s")
    source = list_source(given)
    run(source, tmp_path / "s")
    assert source.reads == list(range(20, 40))
    run(list_source(given), tmp_path / "unbroken")
    assert files_of(tmp_path / "s") == files_of(tmp_path / "unbroken")


def test_a_killed_process_goes_on_after_its_last_chunk(tmp_path: Path) -> None:
    """SIGKILL in the middle: finished chunks keep their time stamps, leftovers go, the bytes are the same."""
    code = (
        "import sys; from pathlib import Path; from shoestring.data.encode import *;"
        "from shoestring.data.sources import open_source;"
        "encode(open_source('scenes', scenes={'images': 100_000}), Path(sys.argv[1]),"
        "       EncodeSettings(chunk_rows=100))"
    )
    out = tmp_path / "s"
    process = subprocess.Popen([sys.executable, "-c", code, str(out)])
    limit = time.monotonic() + 60
    while len(list(out.glob("chunks/*.json"))) < 2 and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (out / "columns/text/.00099.safetensors.99999999.partial").write_bytes(b"left by the killed process")
    done = {path: path.stat().st_mtime_ns for path in out.glob("chunks/*.json")}
    assert len(done) >= 2
    _rest_of_the_scenes(out, done)


def _rest_of_the_scenes(out: Path, done: dict[Path, int]) -> None:
    """Finish with a source cut off after the chunks done and one more, and compare with an unbroken store."""
    count = 100 * (len(done) + 1)
    source = open_source("scenes", scenes={"images": 100_000})

    class Few:
        num_rows, words = count, source.words

        def describe(self) -> dict[str, Any]:
            return source.describe()

        def rows(self, start: int, stop: int) -> Any:
            return source.rows(start, min(stop, count))

    encode(Few(), out, EncodeSettings(chunk_rows=100), log=lambda line: None)
    encode(Few(), out.with_name("whole"), EncodeSettings(chunk_rows=100), log=lambda line: None)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    assert files_of(out) == files_of(out.with_name("whole"))


def test_the_cure_of_a_corrupt_chunk_encodes_that_chunk_alone(
    rows: MakeRows, list_source: Any, tmp_path: Path
) -> None:
    source = list_source(rows(30))
    store, _ = run(source, tmp_path / "s")
    assert store is not None
    before = files_of(store.path)
    damaged = store.path / "columns/latents-16/00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    (store.path / "chunks/00001.json").unlink()  # what the error message says to do
    source.reads.clear()
    run(source, tmp_path / "s")
    assert source.reads == list(range(10, 20))
    assert files_of(store.path) == before


# --- other settings, other places ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (12,)}, r"sizes\.12 None there, \[3, 12, 12\] now"),
        ({"chunk_rows": 5}, "chunk_rows 10 there, 5 now"),
        ({"max_tokens": 5}, r"text_encoder\.max_tokens 64 there, 5 now"),
        ({"held_out": 2}, "held_out 0 there, 2 now"),
        ({"flip": True}, r"preprocessing\.flip False there, True now"),
    ],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_other_settings_than_begun_with_are_refused(
    sealed: bool, changes: dict[str, Any], message: str, rows: MakeRows, list_source: Any, tmp_path: Path
) -> None:
    run(list_source(rows(12)), tmp_path / "s", (0, 1 if sealed else 2))
    with pytest.raises(StoreError, match=f"begun with other settings: .*{message}.*another --out"):
        run(list_source(rows(12)), tmp_path / "s", **changes)


def test_another_source_than_begun_with_is_refused(rows: MakeRows, list_source: Any, tmp_path: Path) -> None:
    run(list_source(rows(12)), tmp_path / "s", (0, 2))
    run(list_source(rows(12), name="a new name for the same rows"), tmp_path / "s", (0, 2))
    with pytest.raises(StoreError, match=r"source\.files"):
        run(list_source(rows(11)), tmp_path / "s")


def test_other_weights_of_the_same_name_are_refused(
    rows: MakeRows, list_source: Any, kl_folder: Path, tmp_path: Path
) -> None:
    run(list_source(rows(12)), tmp_path / "s", (0, 2), autoencoder=str(kl_folder))
    vae = load_autoencoder(str(kl_folder))
    with torch.no_grad():
        next(vae.parameters()).add_(1)
    vae.save_pretrained(kl_folder)
    with pytest.raises(StoreError, match=r"autoencoder\.weights"):
        run(list_source(rows(12)), tmp_path / "s", autoencoder=str(kl_folder))


def test_a_folder_of_other_things_is_left_alone(rows: MakeRows, list_source: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("precious")
    with pytest.raises(StoreError, match="holds other files and is not a store"):
        run(list_source(rows(2)), tmp_path)
    with pytest.raises(StoreError, match="is a file"):
        run(list_source(rows(2)), tmp_path / "thesis.doc")


def test_held_out_rows_must_be_fewer_and_not_doubled(
    rows: MakeRows, list_source: Any, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="held_out 5: there are 5 usable rows"):
        run(list_source(rows(5)), tmp_path / "s", held_out=5)
    split = [Row(r.key, r.image, r.captions, "test") for r in rows(5)]
    with pytest.raises(SourceError, match=r"the source has splits of its own \(test\)"):
        run(list_source(split), tmp_path / "t", held_out=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ()}, "give one or more sizes"),
        ({"chunk_rows": 0}, "chunk_rows 0"),
        ({"max_bad": 2.0}, r"max_bad 2\.0"),
        ({"log_variance": True}, "pixels gives no distribution"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    changes: dict[str, Any], message: str, rows: MakeRows, list_source: Any, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=message):
        run(list_source(rows(2)), tmp_path / "s", **changes)


def test_a_size_must_fit_the_autoencoder(
    rows: MakeRows, list_source: Any, kl_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="size 15: this autoencoder needs multiples of 2; nearest: 14 or 16"):
        run(list_source(rows(2)), tmp_path / "s", autoencoder=str(kl_folder), sizes=(15,))


def test_latents_beyond_float16_are_an_error(
    rows: MakeRows, list_source: Any, kl_folder: Path, tmp_path: Path
) -> None:
    vae = load_autoencoder(str(kl_folder))
    with torch.no_grad():
        vae.quant_conv.weight.mul_(1e9)  # type: ignore[union-attr, operator]
    vae.save_pretrained(kl_folder)
    with pytest.raises(ShoestringError, match="beyond float16's range"):
        run(list_source(rows(2)), tmp_path / "s", autoencoder=str(kl_folder))


# --- disks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "cannot be written"),
        (errno.EACCES, "cannot be written"),
    ],
)
def test_a_full_or_read_only_disk_is_told_and_leaves_nothing_half_written(
    code: int,
    message: str,
    rows: MakeRows,
    list_source: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of the second chunk's text; with space again, the same command goes on."""
    plain, written = shards._Hashing.write, [0]

    def write(self: Any, data: Any) -> None:
        written[0] += len(data)
        if written[0] > limit:
            self.file.write(bytes(data)[: len(data) // 2])
            raise OSError(code, os.strerror(code))
        plain(self, data)

    source = list_source(rows(30))
    run(source, tmp_path / "whole")
    files = files_of(tmp_path / "whole")
    first = sum(len(files[name]) for name in files if "/00000.s" in name or "/00000.jsonl" in name)
    limit = first + len(files["columns/latents-16/00001.safetensors"]) + 500
    monkeypatch.setattr(shards._Hashing, "write", write)
    with pytest.raises(OutputError, match=message):
        run(source, tmp_path / "s")
    left = files_of(tmp_path / "s")
    assert not any("partial" in name for name in left)
    assert "columns/text/00001.safetensors" not in left
    assert "chunks/00000.json" in left
    assert "chunks/00001.json" not in left
    monkeypatch.undo()
    source.reads.clear()
    run(source, tmp_path / "s")
    assert source.reads == list(range(10, 30))
    assert files_of(tmp_path / "s") == files


def test_a_read_only_folder_is_told(
    rows: MakeRows, list_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mkdir` refused: real for users, simulated here since tests may run as root."""

    def refuse(self: Path, *args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"cannot be written .*Choose another folder"):
        run(list_source(rows(2)), tmp_path / "s")


# --- the command line ------------------------------------------------------------------------------------


def shoestring(*words: str) -> None:
    from shoestring.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(words)
    if ended.value.code:
        raise AssertionError(ended.value.code)


def test_two_commands_make_and_check_a_store(
    pngs: Callable[..., bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "images", tmp_path / "store"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.png").write_bytes(pngs(i))
        (folder / f"{i}.txt").write_text(f"number {i}")
    shoestring("encode", str(folder), "--out", str(out), "--size", "16", "--size", "32", "--held-out", "2")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"{out}: 6 images of 16 and 32 px (2 held_out, 4 train)")
    assert last.endswith(f"shoestring train RECIPE --set data.store={out}")
    shoestring("store", "info", str(out))
    told = capsys.readouterr().out
    for words in ("6 in 1 chunks", "held_out 2, train 4", "pixels", "hashing", "bytes a sample", "nothing"):
        assert words in told
    shoestring("store", "verify", str(out))
    assert "all 9 files match" in capsys.readouterr().out
    shard = out / "columns/text/00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(AssertionError, match="2"):
        shoestring("store", "verify", str(out))
    error = capsys.readouterr().err
    assert str(shard) in error
    assert f"shoestring encode {folder} --held-out 2 --size 16 --size 32 --out {out}" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at/all"], "no such file or folder"),
        (["scenes", "--worker", "4/4"], "--worker 4/4: give NUMBER/OF_ALL"),
        (["scenes", "--level", "cubes"], "level 'cubes' is unknown"),
        (["{folder}", "--level", "cells"], "--level is for the source `scenes` only"),
        (["scenes", "--caption-column", "text"], "--caption-column has no effect on scenes"),
        (["scenes", "--split", "test"], "--split has no effect on scenes"),
        (["scenes", "--text-dtype", "int4"], "text_dtype 'int4': unknown. Use one of float16, int8"),
    ],
)
def test_bad_commands_end_with_two_and_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    given = [word.format(folder=tmp_path / "images") for word in words]
    with pytest.raises(AssertionError, match="2"):
        shoestring("encode", *given, "--out", str(tmp_path / "s"))
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_the_real_emoji_set_becomes_a_store(data: Path, tmp_path: Path) -> None:
    """Its first chunks: 128 px drawings, each resized as Pillow itself does."""
    source = open_source(str(data / "emoji/train.parquet"))
    one = next(source.rows(5, 6))
    out = tmp_path / "s"
    encode(source, out, EncodeSettings(chunk_rows=64, held_out=64), worker=(0, 57), log=lambda line: None)
    marker = read_json(out / "chunks/00000.json")
    assert (marker["rows"], marker["skipped"]) == (64, [])
    assert isinstance(one.image, bytes)
    drawn = Image.open(io.BytesIO(one.image)).resize((32, 32), Image.Resampling.BICUBIC)
    stored = shards.read_shard(out / "columns/latents-32/00000.safetensors")["mean"][5]
    assert np.array_equal(stored.transpose(1, 2, 0), np.asarray(drawn))
