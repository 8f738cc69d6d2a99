"""Checkpoints on one process: round trips, damage, what is kept, what a failure leaves, the background."""

from __future__ import annotations

import errno
import json
import random
import resource
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from shoestring.errors import CheckpointError, OutputError, ShoestringError
from shoestring.processes import World
from shoestring.storage import aside_of, sha256
from shoestring.training import checkpoint, pieces
from shoestring.training.checkpoint import Saver, superfluous


def tensors(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "model/a.weight": torch.randn(3, 4, generator=draw).T,  # not contiguous
        "model/b": torch.randn(2, 3, 4, generator=draw)[:, 1],  # a view into larger memory
        "optimizer/step": torch.tensor(7.0 + seed),
        "bf16": torch.randn(5, generator=draw).bfloat16(),
        "count": torch.tensor([1, 2 + seed], dtype=torch.int64),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def save(folder: Path, images: int, keep: int = 10, **more: Any) -> Path:
    saver = Saver(folder, keep=keep)
    saver.save(images, tensors(images), {"images": images, "loss": 0.1}, **more)
    return folder / f"{images:012d}"


def save_and_wait(saver: Saver, images: int) -> None:
    saver.save(images, tensors(), {})
    saver.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def found(folder: Path) -> tuple[checkpoint.Checkpoint, list[str]]:
    said: list[str] = []
    saved = checkpoint.newest(folder, said.append)
    assert saved is not None
    return saved, said


# --- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
def test_tensors_and_scalars_come_back_bit_for_bit(tmp_path: Path, background: bool) -> None:
    saver = Saver(tmp_path, keep=2, background=background)
    saver.save(480, tensors(), {"images": 480, "loss": 0.1})
    saver.wait()
    saved, said = found(tmp_path)
    assert said == []
    assert saved.state == {"images": 480, "loss": 0.1}
    assert same(saved.tensors(), tensors())
    assert saved.sizes()["model/b"] == (torch.Size([2, 4]), torch.float32)
    into = {name: torch.full_like(tensor, 1) for name, tensor in tensors().items()}
    saved.load(into)
    assert same(into, tensors())


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "never", print) is None


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    path = save(tmp_path, 480)
    suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert suffixes == {".safetensors", ".json", ""}
    assert (path / "COMMITTED").read_text() == sha256(path / "manifest.json") + "\n"


def test_torchs_own_loader_reads_it(tmp_path: Path) -> None:
    path = save(tmp_path, 480)
    into = {name: torch.empty_like(tensor) for name, tensor in tensors().items()}
    with warnings.catch_warnings(action="ignore"):
        reader = HuggingFaceStorageReader(str(path / "tensors"))
        torch_checkpoint.load(into, storage_reader=reader, no_dist=True)
    assert same(into, tensors(480))


def write_as_version_0_1(path: Path) -> None:
    """By torch's writer; the manifest is the hashes alone, and the marker is empty."""
    with warnings.catch_warnings(action="ignore"):
        contiguous = {name: tensor.contiguous() for name, tensor in tensors().items()}
        writer = HuggingFaceStorageWriter(str(path / "tensors"), save_distributed=True)
        torch_checkpoint.save(contiguous, storage_writer=writer, no_dist=True)
    (path / "state.json").write_text('{"images": 480}')
    listed = {f"tensors/{file.name}": sha256(file) for file in (path / "tensors").iterdir()}
    listed["state.json"] = sha256(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(listed))
    (path / "COMMITTED").touch()


def test_checkpoints_of_version_0_1_are_read_and_their_damage_found(tmp_path: Path) -> None:
    path = tmp_path / f"{480:012d}"
    write_as_version_0_1(path)
    saved, said = found(tmp_path)
    assert same(saved.tensors(), tensors())
    assert said == []
    (path / "state.json").write_text('{"images": 481}')
    assert checkpoint.newest(tmp_path, said.append) is None
    assert "state.json is damaged" in said[0]


def test_large_states_go_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None exceeds the limit but by a single tensor, and together they hold everything."""
    monkeypatch.setattr(pieces, "FILE_BYTES", 64)
    path = save(tmp_path, 480)
    assert len(list((path / "tensors").iterdir())) > 2
    assert same(found(tmp_path)[0].tensors(), tensors(480))


def test_tensors_that_share_memory_are_saved_each_for_itself(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    given = {"tied/a": whole, "tied/b": whole, "part": whole[2:4], "other part": whole[4:]}
    Saver(tmp_path, keep=1).save(1, given, {})
    assert same(found(tmp_path)[0].tensors(), given)


def test_files_may_be_read_by_whom_the_folder_lets_in(tmp_path: Path) -> None:
    """safetensors alone would give them to their owner only."""
    path = save(tmp_path, 480)
    assert (path / "tensors" / "00000-00000.safetensors").stat().st_mode & 0o777 == (
        path / "state.json"
    ).stat().st_mode & 0o777


def test_a_tensor_that_is_not_there_or_has_another_shape_or_type_is_named(tmp_path: Path) -> None:
    save(tmp_path, 480)
    saved, _ = found(tmp_path)
    for given, message in (
        ({"model/c": torch.zeros(1)}, r"holds no 'model/c'"),
        ({"bf16": torch.zeros(6).bfloat16()}, r"'bf16' is torch.bfloat16 \(5,\) there and .* \(6,\)"),
        ({"bf16": torch.zeros(5)}, r"'bf16' is torch.bfloat16 \(5,\) there and torch.float32 \(5,\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            saved.load(given)


# --- damage -----------------------------------------------------------------------------------------------


def first_tensors(path: Path) -> Path:
    return min((path / "tensors").iterdir())


def reseal(path: Path, manifest: Any) -> None:
    """A manifest with a marker that fits it, as if someone had written it so."""
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "COMMITTED").write_text(sha256(path / "manifest.json") + "\n")


def list_less(path: Path, name: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][name]
    reseal(path, manifest)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (
        lambda p: first_tensors(p).write_bytes(first_tensors(p).read_bytes()[:-3]),
        "safetensors is dam",
    ),
    "emptied": (lambda p: first_tensors(p).write_bytes(b""), "safetensors is damaged"),
    "missing": (lambda p: first_tensors(p).unlink(), "safetensors is missing"),
    "no state": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "state": (lambda p: (p / "state.json").write_text('{"images": 961}'), "state.json is damaged"),
    "extra": (lambda p: (p / "tensors/more.safetensors").touch(), "more.safetensors is not in its manifest"),
    "hidden": (lambda p: (p / "tensors/.m.safetensors").touch(), ".m.safetensors is not in its manifest"),
    "uncommitted": (lambda p: (p / "COMMITTED").unlink(), "never completed"),
    "marker": (lambda p: (p / "COMMITTED").write_bytes(b""), "manifest.json or COMMITTED is damaged"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "no json": (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is damaged"),
    "deep": (lambda p: (p / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
    "other json": (lambda p: (p / "manifest.json").write_text('{"format": 1}'), "manifest.json or COMMITTED"),
    "as 0.1": (
        lambda p: (p / "manifest.json").write_text('{"state.json": "0"}'),
        "manifest.json or COMMITTED",
    ),
    "sealed list": (lambda p: reseal(p, ["a"]), "manifest.json is not a checkpoint's"),
    "sealed other": (lambda p: reseal(p, {"format": 1, "files": 3}), "manifest.json is not a checkpoint's"),
    "lists less": (lambda p: list_less(p, f"tensors/{first_tensors(p).name}"), "is not in its manifest"),
    "lists no state": (lambda p: list_less(p, "state.json"), "manifest.json is not a checkpoint's"),
    "nothing": (lambda p: [f.unlink() for f in p.rglob("*") if f.is_file()], "never completed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 480)
    path = save(tmp_path, 960)
    inflict, message = DAMAGE[damage]
    inflict(path)
    saved, said = found(tmp_path)
    assert saved.state["images"] == 480
    assert same(saved.tensors(), tensors(480))
    (line,) = said
    assert str(path) in line
    assert message in line


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """200 bits at random over all files, and the first and last of each."""
    save(tmp_path, 480)
    path = save(tmp_path, 960)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    assert len(files) == 4
    draw = random.Random(0)
    bits = [(file, at) for file in files for at in (0, 8 * file.stat().st_size - 1)]
    for _ in range(200):
        file = draw.choice(files)
        bits.append((file, draw.randrange(8 * file.stat().st_size)))
    for file, bit in bits:
        content = bytearray(file.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        saved, said = found(tmp_path)
        assert saved.state["images"] == 480, f"bit {bit} of {file.name}"
        assert file.name in said[0]
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
    assert found(tmp_path)[0].state["images"] == 960


def test_one_of_a_newer_format_stops_the_resume_instead_of_being_given_up(tmp_path: Path) -> None:
    save(tmp_path, 480)
    path = save(tmp_path, 960)
    manifest = json.loads((path / "manifest.json").read_text())
    reseal(path, manifest | {"format": 2})
    with pytest.raises(CheckpointError, match=r"000960: written by another version.*format 2.*reads 1"):
        checkpoint.newest(tmp_path, print)


def test_files_of_the_system_do_no_harm(tmp_path: Path) -> None:
    path = save(tmp_path, 480)
    (path / ".DS_Store").write_bytes(b"x")
    (path / "tensors" / ".nfs0001").write_bytes(b"x")
    assert found(tmp_path)[1] == []


def test_what_a_killed_save_left_is_not_taken_for_a_checkpoint_and_goes(tmp_path: Path) -> None:
    """Even another machine's: the run is claimed, so nobody writes it any more."""
    save(tmp_path, 480)
    for name in (".000000000960.1@elsewhere.partial", f".000000000960.{2**22 + 1}.partial"):
        (tmp_path / name / "tensors").mkdir(parents=True)
    assert found(tmp_path)[0].state["images"] == 480
    Saver(tmp_path, keep=2)
    assert names(tmp_path) == [f"{480:012d}"]


# --- what is kept -----------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_the_first_beyond_each_multiple() -> None:
    assert superfluous([30, 10, 20], 2) == [10]
    assert superfluous([10], 2) == []
    #            100 and 200: at the multiple and the first beyond it; 90 is before the first multiple
    assert superfluous([90, 100, 120, 190, 205, 210, 220], 1, 100) == [90, 120, 190, 210]


def test_keeping_as_a_run_goes_equals_keeping_once_at_its_end() -> None:
    """What is removed early changes nothing that stays later: resumed and unbroken runs keep the same."""
    draw = random.Random(0)
    for _ in range(200):
        images = sorted(draw.sample(range(1, 1000), draw.randrange(1, 30)))
        keep, every = draw.randrange(1, 5), draw.choice([None, 50, 100, 333, 2000])
        there: list[int] = []
        for now in images:
            there.append(now)
            gone = superfluous(there, keep, every)
            assert now not in gone
            there = [each for each in there if each not in gone]
        assert there == [each for each in images if each not in superfluous(images, keep, every)]


def test_a_saver_keeps_what_it_is_told(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=2, keep_every=100)
    for images in (40, 80, 120, 160, 200, 240, 280, 320):
        saver.save(images, tensors(), {})
    assert names(tmp_path) == [f"{images:012d}" for images in (120, 200, 280, 320)]


def test_checkpoints_passed_over_are_not_kept_instead_of_good_ones(tmp_path: Path) -> None:
    """With one to keep, a damaged newer one must not outlive what is written after a resume."""
    save(tmp_path, 24)
    (save(tmp_path, 48) / "COMMITTED").unlink()
    save(tmp_path, 40, keep=1)
    assert names(tmp_path) == [f"{40:012d}", f"{48:012d}"], "the one just written stays in any case"
    checkpoint.drop_newer(tmp_path, 40)
    assert names(tmp_path) == [f"{40:012d}"]
    assert found(tmp_path)[0].state["images"] == 40


def test_a_checkpoint_may_be_written_again(tmp_path: Path) -> None:
    save(tmp_path, 24)
    Saver(tmp_path, keep=1).save(24, tensors(5), {"again": True})
    saved, _ = found(tmp_path)
    assert saved.state == {"again": True}
    assert same(saved.tensors(), tensors(5))
    assert names(tmp_path) == [f"{24:012d}"]


# --- failures ---------------------------------------------------------------------------------------------


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """As a quota would: the system refuses to write more into a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("background", [False, True])
def test_what_the_system_refuses_leaves_the_last_checkpoint(tmp_path: Path, background: bool) -> None:
    save(tmp_path, 480)
    saver = Saver(tmp_path, keep=1, background=background)
    with files_limited_to(200), pytest.raises(OutputError, match=r"000960: cannot be written \(File too la"):
        save_and_wait(saver, 960)
    assert names(tmp_path) == [f"{480:012d}"]
    save_and_wait(saver, 960)
    assert names(tmp_path) == [f"{960:012d}"], "and with room again it goes on"


@pytest.mark.parametrize("what", ["save_file", "flush", "sha256"])
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, background: bool
) -> None:
    save(tmp_path, 480)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saver = Saver(tmp_path, keep=1, background=background)
    monkeypatch.setattr(pieces, what, full)
    with pytest.raises(OutputError, match="the disk is full"):
        save_and_wait(saver, 960)
    assert names(tmp_path) == [f"{480:012d}"]


def test_the_callers_part_comes_after_the_tensors_and_before_the_checkpoint_counts(tmp_path: Path) -> None:
    seen: list[Any] = []
    aside = aside_of(tmp_path / f"{480:012d}")

    def look() -> None:
        seen.append((names(tmp_path), names(aside), set(pieces.sizes(aside / "tensors"))))

    save(tmp_path, 480, before_commit=look)
    assert seen == [([aside.name], ["tensors"], set(tensors()))]


def test_where_the_callers_part_fails_there_is_no_checkpoint(tmp_path: Path) -> None:
    def fail() -> None:
        raise ShoestringError("no pipeline")

    with pytest.raises(ShoestringError, match="no pipeline"):
        save(tmp_path, 480, before_commit=fail)
    assert names(tmp_path) == []


# --- the background ---------------------------------------------------------------------------------------


def test_a_background_save_holds_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    """Training goes on and changes tensors and counts before anything is written."""
    go, given, state = threading.Event(), tensors(), {"images": 480, "window": {"loss": 1.0}}
    saver = Saver(tmp_path, keep=3, background=True)
    saver.save(480, given, state, before_commit=lambda: go.wait(10) or pytest.fail("never let go"))
    for tensor in given.values():
        tensor.zero_()
    state["window"]["loss"] = 2.0  # type: ignore[index]
    assert checkpoint.newest(tmp_path, print) is None, "it does not count yet"
    go.set()
    saver.wait()
    saved, _ = found(tmp_path)
    assert same(saved.tensors(), tensors())
    assert saved.state == {"images": 480, "window": {"loss": 1.0}}


def test_a_save_waits_for_the_one_before_and_uses_its_memory_again(tmp_path: Path) -> None:
    order: list[str] = []
    saver = Saver(tmp_path, keep=3, background=True)
    saver.save(1, tensors(), {}, before_commit=lambda: order.append("first written"))
    buffers = {name: buffer.data_ptr() for name, buffer in saver._staging.buffers.items()}
    saver.save(2, tensors(1), {}, before_commit=lambda: order.append("second written"))
    order_at_return = list(order)
    assert order_at_return[0] == "first written"
    assert {name: buffer.data_ptr() for name, buffer in saver._staging.buffers.items()} == buffers
    saver.wait()
    grown = tensors(2) | {"bf16": torch.ones(9).bfloat16()}
    del grown["count"]
    saver.save(3, grown, {})
    saver.close()
    assert same(found(tmp_path)[0].tensors(), grown)
    assert saver._staging.buffers == {}


def test_what_went_wrong_in_the_background_is_raised_once_by_the_next_call(tmp_path: Path) -> None:
    def fail() -> None:
        raise OutputError("no room for the pipeline")

    saver = Saver(tmp_path, keep=3, background=True)
    saver.save(1, tensors(), {}, before_commit=fail)
    with pytest.raises(OutputError, match="no room for the pipeline"):
        saver.save(2, tensors(), {})
    saver.wait()
    saver.save(3, tensors(), {}, before_commit=fail)
    saver.close()
    assert names(tmp_path) == []


# --- pieces -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_each_plain_tensor_is_written_by_one_process_and_the_work_is_shared(size: int) -> None:
    given = {f"layer.{number}": torch.zeros(100 + number) for number in range(40)}
    parts = [pieces.own_pieces(given, World(rank, size)) for rank in range(size)]
    written = [piece.name for part in parts for piece in part]
    assert sorted(written) == sorted(given)
    loads = [sum(piece.tensor.nbytes for piece in part) for part in parts]
    assert max(loads) - min(loads) <= given["layer.39"].nbytes
    assert all(piece.tensor.data_ptr() == given[piece.name].data_ptr() for part in parts for piece in part)
