"""A published checkpoint converted and back: seconds, memory, and whether anything changed on the way.

python benchmarks/convert.py [--tiny] [--folder /a/disk] [--flips 6000]

The file has the published form (a pickle of float32 tensors that carry an attribute) and XL/2's names and
shapes at 512 px, with random numbers: 4.67 GB; three times that on disk in all. Memory is what the process
holds itself, without the pages of mapped files, which the system may drop. `flips` copies of a small file
with 1 to 8 flipped bits each say how often damage is refused, and whether a weight changes unnoticed.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from parts.figures import tell
from torch import Tensor

from shoestring.errors import CheckpointError
from shoestring.models.checkpoint_files import networks_in, read_checkpoint, write_checkpoint
from shoestring.models.microdit import MicroDiT
from shoestring.models.microdit_config import ANCHOR
from shoestring.models.microdit_published import state_to_published, stored_buffers

TINY = {"hidden_size": 64, "depth": 4, "head_dim": 16, "mixer_depth": 2, "mixer_size": 48, "multiple_of": 16}


def make_file(path: Path, tiny: bool) -> None:
    """A checkpoint of random weights in the published form."""
    with torch.device("meta"):
        network = MicroDiT(sample_size=64, pos_interp_scale=2.0, **(TINY if tiny else {}))
        names = state_to_published(network.state_dict())
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02
    state = {
        name: noise.repeat(1 + t.numel() // len(noise))[: t.numel()].view(t.shape)
        for name, t in names.items()
    }
    state = {name: tensor.clone() for name, tensor in (state | stored_buffers(network.config)).items()}
    for tensor in state.values():
        tensor._is_sharded = False  # type: ignore[attr-defined] - torch then pickles it as FSDP's were
    torch.save(state, path)


def convert(*words: object) -> tuple[float, float | None]:
    """Run `shoestring convert`; seconds, and the most GiB it held at once (where Linux tells)."""
    start, most = time.perf_counter(), 0
    command = [sys.executable, "-m", "shoestring", "convert", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        most = max(most, anonymous(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - start, most / 2**30 if most else None


def anonymous(process: int) -> int:
    """Bytes of a process that no file backs; 0 where that cannot be had."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:")), 0)


def same(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same names and bits."""
    a, b = read_checkpoint(first), read_checkpoint(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flip(folder: Path, count: int) -> tuple[int, int]:
    """(refused, unnoticed) among `count` damaged copies of a small file."""
    numbers = torch.randn(38, generator=torch.Generator().manual_seed(0))
    weights: dict[str, Tensor] = {ANCHOR: numbers[:35].view(5, 7), "blocks.0.norm1.weight": numbers[35:]}
    path, pick, refused, unnoticed = folder / "small.pt", random.Random(0), 0, 0
    write_checkpoint(weights, path)
    whole = path.read_bytes()
    for _ in range(count):
        copy = bytearray(whole)
        for _ in range(pick.choice((1, 1, 2, 8))):
            copy[pick.randrange(len(copy))] ^= 1 << pick.randrange(8)
        path.write_bytes(copy)
        try:
            found = networks_in(read_checkpoint(path), ANCHOR).get("", {})
            equal = found.keys() == weights.keys() and all(torch.equal(found[n], weights[n]) for n in weights)
            unnoticed += not equal
        except CheckpointError:
            refused += 1
    return refused, unnoticed


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--flips", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        there, pipeline, back = folder / "there.pt", folder / "pipeline", folder / "back.pt"
        make_file(there, options.tiny)
        size = {"bytes": there.stat().st_size}
        head = ("--head-dim", TINY["head_dim"]) if options.tiny else ()
        for direction, words in (
            ("there", (there, pipeline, "--no-encoders", *head)),
            ("back", (pipeline, back)),
        ):
            taken, memory = convert(*words)
            tell("convert", "seconds", taken, "s", direction=direction, **size)
            if memory is not None:
                tell("convert", "memory", memory, "GiB", direction=direction, **size)
        tell("convert", "unchanged", float(same(there, back)), "1 = bit for bit", **size)
        flips = options.flips or (100 if options.tiny else 6000)
        refused, unnoticed = flip(folder, flips)
        tell("convert", "refused", refused, "files", flipped=flips)
        tell("convert", "unnoticed", unnoticed, "files", flipped=flips)


if __name__ == "__main__":
    main()
