"""Commands killed (SIGKILL) at random moments and started again, and what must hold at the end.

A trial kills a job one to four times, then lets it finish. The job says what to start, what is finished at a
kill, and what there is at the end: that must equal an unbroken job's, name by name and byte by byte but for
what clocks and memory meters measured.
"""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from parts.faults_processes import KILLED, PATIENCE, Command, Ended, Server, wait_for

LEAVES = 60.0  # seconds within which a process must end by itself that has lost another
ANY_TIME, CHANGE, BEGIN = "any time", "change of the disk", "beginning again"

Moments = Mapping[str, Callable[[], bool]]
"""Moments worth a kill, by name: whether it is now."""

Outcome = dict[str, Any]
"""Everything that a job left, by name."""


@dataclass(frozen=True)
class Start:
    """A command to begin, with what its environment adds."""

    words: tuple[object, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class Job(Protocol):
    """Work of one or more processes that can be killed and started again, in a folder of its own.

    `tied`: the processes cannot go on without each other.
    """

    name: str
    tied: bool

    def prepare(self, folder: Path) -> None:
        """Make what it reads."""

    def starts(self, folder: Path) -> AbstractContextManager[list[Start]]:
        """The commands that begin it, or go on with it: one a process, to be run within this context."""

    def at_work(self, said: str) -> bool:
        """Whether its first process, having said this on stderr, works together with the others."""

    def moments(self, folder: Path) -> Moments:
        """Moments worth a kill from now on."""

    def finished(self, folder: Path) -> Any:
        """What of it is finished: must not be lost, nor done again."""

    def lost(self, finished: Any, folder: Path, said: Sequence[Ended]) -> list[str]:
        """What was finished and was not taken over by those who said this."""

    def outcome(self, folder: Path) -> Outcome:
        """Everything that it left, but for clocks."""


@dataclass(frozen=True)
class Unbroken:
    """A job that was never killed: what it left, how long it took, its changes of the disk by process.

    `order` goes through the first process's changes, shuffled, again and again.
    """

    outcome: Outcome
    seconds: float
    changes: tuple[int, ...]
    order: Iterator[int]


@dataclass
class Tried:
    """What a trial did: kills by moment, and everything that did not hold."""

    kills: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    log: list[object] = field(default_factory=list)  # what happened, for whoever looks into a problem


def unbroken(server: Server, job: Job, folder: Path, chance: random.Random) -> Unbroken:
    """Run a job to its end without a kill, counting its changes of the disk."""
    folder.mkdir(parents=True)
    here = folder / "whole"
    here.mkdir()
    job.prepare(here)
    began = time.monotonic()
    with job.starts(here) as starts:
        traces = [folder / f"changes-{number}" for number in range(len(starts))]
        commands = [
            server.start(start.words, here, environment=start.environment, trace=trace)
            for start, trace in zip(starts, traces, strict=True)
        ]
        said = [command.wait() for command in commands]
    if problems := _failures(said):
        raise RuntimeError(f"{job.name} fails without a kill: {problems}")
    seconds = time.monotonic() - began
    changes = tuple(len(trace.read_text().splitlines()) for trace in traces)
    order = chance.sample(range(1, changes[0] + 1), changes[0])
    return Unbroken(job.outcome(here), seconds, changes, itertools.cycle(order))


def trial(
    server: Server, job: Job, whole: Unbroken, folder: Path, chance: random.Random, most: int = 4
) -> Tried:
    """Kill a job one to `most` times at moments that `chance` picks, let it finish, compare."""
    tried = Tried()
    folder.mkdir(parents=True)
    job.prepare(folder)
    finished = job.finished(folder)
    for number in range(min(most, chance.choice((1, 1, 2, 2, 3, 4)))):
        aimed = [*job.moments(folder), *([BEGIN] if number else [])]
        moment = chance.choice([ANY_TIME, ANY_TIME, CHANGE, CHANGE, CHANGE, *aimed])
        said, dying, at_work = _strike(server, job, whole, folder, moment, chance, number == 0)
        killed = any(said[each].code == KILLED and not said[each].late for each in dying)
        tried.kills[moment] += killed
        # A kill that came too late still ends the others, as torchrun does: that is no failure of theirs.
        missed = [ended for ended in said if ended.code != -signal.SIGTERM]
        tried.problems += _ends(job, said, dying, at_work) if killed else _failures(missed)
        tried.problems += job.lost(finished, folder, said)
        finished = job.finished(folder)
        tried.log.append((moment, sorted(dying), killed, finished, said))
    with job.starts(folder) as starts:
        commands = [server.start(start.words, folder, environment=start.environment) for start in starts]
        said = [command.wait() for command in commands]
    tried.log.append(("end", said))
    tried.problems += _failures(said)
    tried.problems += job.lost(finished, folder, said)
    tried.problems += differences(whole.outcome, job.outcome(folder))
    return tried


def differences(expected: Outcome, found: Outcome) -> list[str]:
    """Names that only one of two outcomes has, and names under which they differ."""
    missing = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    extra = [f"{name} is left over" for name in sorted(found.keys() - expected.keys())]
    both = sorted(expected.keys() & found.keys())
    return missing + extra + [f"{name} differs" for name in both if expected[name] != found[name]]


def _strike(
    server: Server, job: Job, whole: Unbroken, folder: Path, moment: str, chance: random.Random, first: bool
) -> tuple[list[Ended], set[int], bool]:
    """Start a job and kill it, or some of it.

    Returns how its processes ended, which of them were to die, and whether they were at work then.
    """
    with job.starts(folder) as starts:
        everyone = set(range(len(starts)))
        victim = chance.choice([each for each in everyone if whole.changes[each]])
        dying = {victim} if moment == CHANGE or chance.random() < 0.3 else everyone
        change = 0
        if moment == CHANGE and first and not victim:
            change = next(whole.order)
        elif moment == CHANGE:
            change = chance.randint(1, max(1, whole.changes[victim] // 2))
        commands = [
            server.start(
                start.words,
                folder,
                environment=start.environment,
                kill_at=change if number == victim else 0,
            )
            for number, start in enumerate(starts)
        ]
        if moment != CHANGE:
            if job.tied and dying != everyone:
                wait_for(lambda: job.at_work(commands[0].said()), commands)
            _await(job, whole, folder, moment, commands, chance)
            for each in dying:
                commands[each].kill()
        for each in dying:
            commands[each].ended(PATIENCE)
        at_work = job.at_work(commands[0].said())
        if job.tied and not at_work:  # what torchrun's agent does at once: processes that have not found
            for command in commands:  # each other yet cannot know that they wait for a dead one
                command.kill(signal.SIGTERM)
        patience = LEAVES if job.tied else PATIENCE
        return [command.wait(patience) for command in commands], dying, at_work


def _await(
    job: Job,
    whole: Unbroken,
    folder: Path,
    moment: str,
    commands: Sequence[Command],
    chance: random.Random,
) -> None:
    """Until a moment, or until a process has ended."""
    if moment in (ANY_TIME, BEGIN):
        share = 1.0 if moment == ANY_TIME else 0.3
        until = time.monotonic() + chance.uniform(0.0, share * whole.seconds)
        wait_for(lambda: time.monotonic() >= until, commands)
    else:
        wait_for(job.moments(folder)[moment], commands)
        time.sleep(chance.choice((0.0, chance.uniform(0.0, 0.02))))


def _ends(job: Job, said: Sequence[Ended], dying: set[int], at_work: bool) -> list[str]:
    """What is wrong with how those ended that were not to die."""
    left = [ended for number, ended in enumerate(said) if number not in dying]
    problems = [f"waits for ever without the killed process: {ended}" for ended in left if ended.late]
    if not job.tied:
        return problems + _failures(left)
    failed = [ended for ended in left if ended.code and not ended.late]
    lines = [line for ended in failed for line in ended.err.splitlines() if line.startswith("error: ")]
    if at_work and failed and len(lines) != 1:
        problems.append(f"{len(lines)} lines say why it ended without the killed process: {failed}")
    if at_work and any("Traceback" in ended.err for ended in failed):
        problems.append(f"a traceback, though the process is not to blame: {failed}")
    return problems


def _failures(said: Sequence[Ended]) -> list[str]:
    """Commands that should have ended well and did not."""
    return [f"failed: {ended}" for ended in said if ended.code]
