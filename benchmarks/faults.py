"""Claim: killed at any moment, with damaged files or given junk, Shoestring loses nothing and never lies.

python benchmarks/faults.py [--tiny] [--kills 400] [--flips 1000] [--malformed 1000] [--seed 0] [--folder F]

kills      training (1 and 2 processes, DDP and FSDP2, saving at once or in the background), encoding, adding
           to a store and copying it are killed with SIGKILL one to four times, then finish. What they leave
           must equal what an unbroken one leaves, bit for bit but for clocks; nothing finished may be lost
flips      a file of the newest checkpoint or of a store is damaged: a bit, cut, grown, emptied, deleted, or
           exchanged. It must be found and named, and the checkpoint before used to the same end
malformed  a table of mistakes over all commands, junk under recipes' keys, and random bytes in files that
           commands read: exit code 0, or 2 with one line, and no file changed

Each line counts what was tried, what `survived` and what was `lost`; the exit code is 1 if anything was.
What did not hold is told on stderr, and stays below --folder where that is given.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from parts.faults_flips import Checkpoints, Stores
from parts.faults_jobs import make_jobs
from parts.faults_kills import Job, trial, unbroken
from parts.faults_malformed import World
from parts.faults_mistakes import mistakes
from parts.faults_processes import Server
from parts.figures import tell

SHARES = (0.4, 0.2, 0.4)  # of the kills: training on one process, on two, encoding
Attempt = Callable[[Path, random.Random], tuple[int, Sequence[str]]]
"""Tries something once in a folder that is not there yet: how many faults that were, what did not hold.

The folder's name is the attempt's number.
"""


@dataclass
class Tally:
    """Faults of one kind, tried until there are enough of them."""

    metric: str
    kind: str
    tried: int = 0
    lost: int = 0
    attempts: int = 0
    seconds: float = 0.0
    details: Counter[str] = field(default_factory=Counter)

    def tell(self) -> None:
        """Print the figure."""
        tell(
            "faults",
            self.metric,
            self.tried,
            self.metric,
            kind=self.kind,
            survived=self.tried - self.lost,
            lost=self.lost,
            attempts=self.attempts,
            seconds=round(self.seconds),
            **({"moments": dict(self.details.most_common())} if self.details else {}),
        )


@dataclass
class Bench:
    """What all kinds share: where they work, how many at once, from which seed."""

    folder: Path
    seed: int
    jobs: int
    tallies: list[Tally] = field(default_factory=list)

    def fill(
        self,
        tally: Tally,
        attempt: Attempt,
        enough: int,
        *,
        jobs: int | None = None,
        attempts: int = 1_000_000,
    ) -> None:
        """Attempt again and again, several at once, until `enough` faults were tried."""
        began, lock = time.monotonic(), threading.Lock()
        numbers = iter(range(attempts))
        name = "".join(letter if letter.isalnum() else "-" for letter in f"{tally.metric}-{tally.kind}")

        def work() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                    if number is None or tally.tried >= enough:
                        return
                place = self.folder / name / f"{number}"
                place.parent.mkdir(exist_ok=True)
                faults, problems = attempt(place, random.Random(f"{self.seed}/{tally.kind}/{number}"))
                with lock:
                    tally.tried, tally.attempts = tally.tried + faults, tally.attempts + 1
                    tally.lost += (faults or 1) * bool(problems)
                    for problem in problems:
                        print(f"{tally.kind}, attempt {number}: {problem}", file=sys.stderr, flush=True)
                if not problems:
                    shutil.rmtree(place, ignore_errors=True)

        with ThreadPoolExecutor(jobs or self.jobs) as pool:
            for done in [pool.submit(work) for _ in range(jobs or self.jobs)]:
                done.result()
        tally.seconds = time.monotonic() - began
        self.tallies.append(tally)
        tally.tell()


def kill(bench: Bench, server: Server, job: Job, enough: int) -> None:
    """Kills of one job."""
    chance = random.Random(f"{bench.seed}/{job.name}")
    whole = unbroken(server, job, bench.folder / f"whole-{job.name}", chance)
    tally = Tally("kills", job.name)

    def attempt(place: Path, chance: random.Random) -> tuple[int, Sequence[str]]:
        tried = trial(server, job, whole, place, chance)
        tally.details.update(tried.kills)
        log = [f"what happened: {tried.log}"] if tried.problems else []
        return sum(tried.kills.values()), [*tried.problems, *log]

    bench.fill(tally, attempt, enough, jobs=1 if job.tied else None)


def flip(bench: Bench, server: Server, job: Job, enough: int) -> None:
    """Damaged checkpoints and stores."""
    whole = unbroken(server, job, bench.folder / "whole-flips", random.Random(0))
    checkpoints = Checkpoints(server, job, whole, bench.folder / "checkpoints")
    stores = Stores(server, bench.folder / "stores")
    checkpoints.prepare()
    stores.prepare()
    for kind, share, attempt in (
        ("checkpoint: found, the one before taken", 0.4, checkpoints.found),
        ("checkpoint: resumed to the same end", 0.05, checkpoints.survived),
        ("store: found and named by store verify", 0.25, stores.found),
        ("store: never read as if nothing were wrong", 0.3, stores.survived),
    ):
        bench.fill(Tally("flips", kind), _once(attempt), max(1, round(share * enough)))


def malform(bench: Bench, server: Server, enough: int, every: int) -> None:
    """Malformed input: every n-th mistake of the table, and as many random ones as asked for."""
    world = World(server, bench.folder / "world")
    world.prepare()
    table = [*mistakes()][::every]

    def one_of_table(place: Path, chance: random.Random) -> tuple[int, Sequence[str]]:
        return 1, world.mistake(place, table[int(place.name)])

    bench.fill(Tally("malformed", "mistakes of a table"), one_of_table, len(table), attempts=len(table))
    bench.fill(Tally("malformed", "junk under recipes' keys"), _once(world.junk_key), enough // 2)
    bench.fill(Tally("malformed", "random bytes in files"), _once(world.junk_bytes), enough - enough // 2)


def _once(attempt: Callable[[Path, random.Random], Sequence[str]]) -> Attempt:
    return lambda place, chance: (1, attempt(place, chance))


def main() -> None:
    """Try all kinds of faults; exit with 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a few of each, in less than a minute")
    parser.add_argument("--kills", type=int, default=400)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--malformed", type=int, default=1000, help="random ones, besides the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="commands at once")
    parser.add_argument("--folder", type=Path, help="where to work; what did not hold stays there")
    arguments = parser.parse_args()
    tiny = arguments.tiny
    kills, flips, malformed = (
        (10, 40, 20) if tiny else (arguments.kills, arguments.flips, arguments.malformed)
    )
    with Server() as server, tempfile.TemporaryDirectory() as spare:
        folder = (arguments.folder or Path(spare)).resolve()
        bench = Bench(folder, arguments.seed, arguments.jobs)
        groups = make_jobs(server, folder / "ready")
        for share, group in zip(SHARES, groups, strict=True):
            for job in group[:1] if tiny else group:
                kill(bench, server, job, max(1, round(share * kills / (1 if tiny else len(group)))))
        flip(bench, server, groups[0][0], flips)
        malform(bench, server, malformed, every=20 if tiny else 1)
    lost = 0
    for metric in ("kills", "flips", "malformed"):
        same = [tally for tally in bench.tallies if tally.metric == metric]
        whole = Tally(metric, "all")
        for tally in same:
            whole.tried += tally.tried
            whole.lost += tally.lost
            whole.attempts += tally.attempts
            whole.seconds += tally.seconds
        whole.tell()
        lost += whole.lost
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
