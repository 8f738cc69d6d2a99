"""Checkpoints: round trip, damage, and the one before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoestring.errors import CheckpointError, OutputError
from shoestring.training import checkpoint


def tensors() -> dict[str, torch.Tensor]:
    return {
        "model/a.weight": torch.randn(3, 4).T,  # not contiguous
        "optimizer/step": torch.tensor(7.0),
        "bf16": torch.randn(5).bfloat16(),
        "count": torch.tensor([1, 2], dtype=torch.int64),
    }


def test_tensors_and_scalars_come_back_bit_for_bit(tmp_path: Path) -> None:
    given = tensors()
    checkpoint.save(tmp_path, 480, given, {"images": 480, "loss": 0.1})
    saved = checkpoint.newest(tmp_path, print)
    assert saved is not None
    assert saved.state == {"images": 480, "loss": 0.1}
    back = saved.tensors()
    assert back.keys() == given.keys()
    assert all(
        torch.equal(back[name], given[name]) and back[name].dtype == given[name].dtype for name in given
    )


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 480, tensors(), {})
    suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert suffixes == {".safetensors", ".json", ""}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "uncommitted", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, 480, tensors(), {"images": 480})
    path = checkpoint.save(tmp_path, 960, tensors(), {"images": 960})
    file = next((path / "tensors").iterdir())
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-3])
    elif damage == "remove":
        file.unlink()
    elif damage == "uncommitted":
        (path / "COMMITTED").unlink()
    else:
        (path / "manifest.json").write_text("{")
    said: list[str] = []
    saved = checkpoint.newest(tmp_path, said.append)
    assert saved is not None
    assert saved.state == {"images": 480}
    assert len(said) == 1
    assert str(path) in said[0]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 480, tensors(), {"images": 480})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(OutputError, match="the disk is full"):
        checkpoint.save(tmp_path, 960, tensors(), {"images": 960})
    assert [path.name for path in tmp_path.iterdir()] == [f"{480:012d}"]


def test_taking_what_is_not_there_says_so() -> None:
    with pytest.raises(CheckpointError, match="holds nothing under 'ema/'"):
        checkpoint.take({"model/x": torch.zeros(1)}, "ema/")


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for images in (1, 2, 3):
        checkpoint.save(tmp_path, images, tensors(), {})
    checkpoint.keep_last(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{2:012d}", f"{3:012d}"]


def test_checkpoints_passed_over_are_not_kept_instead_of_good_ones(tmp_path: Path) -> None:
    """With one to keep, a damaged newer one must not outlive what is written after a resume."""
    checkpoint.save(tmp_path, 24, tensors(), {"images": 24})
    damaged = checkpoint.save(tmp_path, 48, tensors(), {})
    (damaged / "COMMITTED").unlink()
    checkpoint.drop_newer(tmp_path, 24)
    checkpoint.save(tmp_path, 40, tensors(), {"images": 40})
    checkpoint.keep_last(tmp_path, 1)
    saved = checkpoint.newest(tmp_path, print)
    assert saved is not None
    assert saved.state == {"images": 40}
