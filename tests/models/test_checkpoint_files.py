"""Checkpoint files from elsewhere: what is read from them, and that nothing in them is ever run."""

from __future__ import annotations

import datetime
import os
import pickletools
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shoestring.errors import CheckpointError
from shoestring.models.checkpoint_files import networks_in, read_checkpoint, write_checkpoint

ANCHOR = "x.weight"


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {ANCHOR: torch.randn(5, 7, generator=generator), "blocks.0.y": torch.randn(3, generator=generator)}


def assert_equal(ours: dict[str, Any], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class RunsWhenLoaded:
    """Pickles as a call of `function` on `arguments`, which an ordinary unpickler makes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


# --- what is read ----------------------------------------------------------------------------------------


def test_the_published_files_form_is_read(tmp_path: Path) -> None:
    """Tensors that still carry an attribute of FSDP's, whose pickles ask for five names of torch's.

    These five are what the hub lists for the published checkpoints.
    """
    published = OrderedDict(weights())
    for tensor in published.values():
        tensor._is_sharded = False  # type: ignore[attr-defined]
    torch.save(published, tmp_path / "published.pt")
    with zipfile.ZipFile(tmp_path / "published.pt") as archive:
        operations = pickletools.genops(archive.read("published/data.pkl"))
        asked = {str(argument).replace(" ", ".") for code, argument, _ in operations if code.name == "GLOBAL"}
    assert asked == {
        "collections.OrderedDict",
        "torch.FloatStorage",
        "torch.Tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._tensor._rebuild_from_type_v2",
    }
    assert_equal(networks_in(read_checkpoint(tmp_path / "published.pt"), ANCHOR)[""], weights())


@pytest.mark.parametrize("name", ["new.pt", "old.pt", "flat.safetensors"])
def test_every_format_gives_the_same_tensors(name: str, tmp_path: Path) -> None:
    if name == "flat.safetensors":
        save_file(weights(), tmp_path / name)
    else:
        torch.save(weights(), tmp_path / name, _use_new_zipfile_serialization=name == "new.pt")
    assert_equal(read_checkpoint(tmp_path / name), weights())


def test_a_training_checkpoint_with_clocks_and_generators_is_read(tmp_path: Path) -> None:
    """Composer's: the network under a prefix, moments by the same names, Python's and numpy's state."""
    state = {f"dit.{name}": tensor for name, tensor in weights().items()}
    moments = {name: {"exp_avg": torch.zeros_like(tensor)} for name, tensor in state.items()}
    checkpoint = {
        "state": {
            "model": {**state, "vae.encoder.weight": torch.zeros(2), "text_encoder.weight": torch.zeros(2)},
            "optimizers": {"DecoupledAdamW": {"state": moments, "param_groups": [{"lr": 1e-4}]}},
            "timestamp": {"Timestamp": {"batch": 5, "total_wct": datetime.timedelta(seconds=3)}},
        },
        "rng": [
            {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        ],
    }
    torch.save(checkpoint, tmp_path / "latest-rank0.pt")
    found = networks_in(read_checkpoint(tmp_path / "latest-rank0.pt"), ANCHOR)
    assert list(found) == ["state.model.dit"]
    assert_equal(found["state.model.dit"], weights())


def nested(place: str) -> Any:
    """The weights at a place: a dict or (1) a list for each part but the last, which is a prefix."""
    *outer, prefix = place.split("/")
    tree: Any = {prefix + name: tensor for name, tensor in weights().items()} | {"epoch": 3}
    for part in reversed(outer):
        tree = [None, tree] if part == "1" else {part: tree, "step": 7}
    return tree


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("", ""),
        ("model/", "model"),
        ("module.", "module"),
        ("state_dict/module.dit.", "state_dict.module.dit"),
        ("algorithms/1/ema/dit.", "algorithms.1.ema.dit"),
        ("_orig_mod.", ""),
        ("dit._orig_mod._fsdp_wrapped_module.", "dit"),
    ],
)
def test_a_network_is_found_wherever_it_lies(given: str, place: str) -> None:
    found = networks_in(nested(given), ANCHOR)
    assert list(found) == [place]
    assert_equal({name: value for name, value in found[place].items() if name != "epoch"}, weights())


def test_wrappers_inside_a_network_leave_no_trace_in_names() -> None:
    tree = {ANCHOR: torch.zeros(1), "blocks.0._checkpoint_wrapped_module.y": torch.ones(1)}
    assert networks_in(tree, ANCHOR)[""].keys() == {ANCHOR, "blocks.0.y"}


def test_every_network_of_a_file_is_found() -> None:
    tree = {"model": nested("dit."), "ema": nested(""), "other": {"z.weight": torch.zeros(1)}}
    assert list(networks_in(tree, ANCHOR)) == ["ema", "model.dit"]
    assert networks_in({"z.weight": torch.zeros(1)}, ANCHOR) == {}


def test_a_tree_that_contains_itself_ends() -> None:
    tree = nested("")
    tree["again"] = {"inner": tree}
    assert list(networks_in(tree, ANCHOR)) == [""]


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["beside", "inside an array", "as a tensor's attribute"])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(
    where: str, zipped: bool, tmp_path: Path
) -> None:
    proof = tmp_path / "it ran"
    trap: Any = RunsWhenLoaded(os.mkdir, str(proof))
    state: dict[str, Any] = weights()
    if where == "beside":
        state["trap"] = trap
    elif where == "inside an array":
        array = np.empty(1, dtype=object)
        array[0] = trap
        state["trap"] = array
    else:
        state[ANCHOR].trap = trap
    torch.save(state, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"bad.pt: refused: it holds more than tensors: its pickle asks"
    ):
        read_checkpoint(tmp_path / "bad.pt")
    assert not proof.exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert proof.exists(), "the trap was real"


@pytest.mark.parametrize(
    ("function", "arguments", "asked"),
    [
        (os.system, ("true",), r"(posix|nt)\.system"),
        (eval, ("1",), "eval"),
        (getattr, (1, "real"), "getattr"),
        (nn.Linear, (1, 1), "torch.nn.modules.linear.Linear"),
        (torch.load, ("x",), "torch.serialization.load"),
    ],
)
def test_a_refusal_names_what_the_pickle_asks_for(
    function: Callable[..., Any], arguments: tuple[Any, ...], asked: str, tmp_path: Path
) -> None:
    torch.save({"x": RunsWhenLoaded(function, *arguments)}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=rf"its pickle asks for {asked}\. Nothing of it was run\. Save"):
        read_checkpoint(tmp_path / "bad.pt")


def test_a_program_of_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:  # what torch.load takes for one
        archive.writestr("script/constants.pkl", b"")
        archive.writestr("script/data.pkl", b"")
    with pytest.raises(CheckpointError, match="a TorchScript program"):
        read_checkpoint(tmp_path / "script.pt")


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_file_cut_short_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    write_checkpoint(weights(), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for length in [0, 1, 8, *range(20, len(whole), len(whole) // 17), len(whole) - 1]:
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"{name}: (not a whole|damaged)"):
            read_checkpoint(tmp_path / name)


def test_no_flipped_bit_changes_a_weight_unnoticed(tmp_path: Path) -> None:
    """300 bits of a .pt, one at a time: the file is refused, or the bit was of no weight."""
    write_checkpoint(weights(), tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    pick, noticed = random.Random(0), 0
    at_weights = whole.index(weights()[ANCHOR].numpy().tobytes())
    for place in [at_weights, *(pick.randrange(len(whole)) for _ in range(299))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << pick.randrange(8)
        (tmp_path / "x.pt").write_bytes(flipped)
        try:
            assert_equal(read_checkpoint(tmp_path / "x.pt"), weights())
        except CheckpointError:
            noticed += 1
    assert noticed > 50


def test_a_flipped_bit_of_a_weight_names_the_record(tmp_path: Path) -> None:
    write_checkpoint(weights(), tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[data.index(weights()[ANCHOR].numpy().tobytes())] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x.pt: damaged: archive/data/0 does not match its checksum"):
        read_checkpoint(tmp_path / "x.pt")


def test_a_file_written_without_sums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights(), tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_equal(read_checkpoint(tmp_path / "x.pt"), weights())


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<!doctype html><html>Sign in</html>", b"version https://git-lfs"])
def test_what_a_failed_download_leaves_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: not a whole"):
        read_checkpoint(tmp_path / name)


def test_a_missing_file_is_told_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none.pt: no such file. Give a checkpoint \(.pt, .pth, "):
        read_checkpoint(tmp_path / "none.pt")


# --- what is written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_views_are_written_at_their_own_size(name: str, tmp_path: Path) -> None:
    """`torch.save` writes all that a tensor is a view of; a transposed one is not written backwards."""
    large = torch.randn(1000, 8)
    parameter = nn.Parameter(torch.ones(2))
    views = {"row": large[3], "turned": large[:4].T, "parameter": parameter}
    write_checkpoint(views, tmp_path / name)
    assert (tmp_path / name).stat().st_size < 4000
    again = read_checkpoint(tmp_path / name)
    assert_equal(again, {**views, "parameter": parameter.data})
    assert all(type(tensor) is Tensor and not tensor.requires_grad for tensor in again.values())
