"""Commands of `shoestring` as processes to be killed, forked from a server that has imported everything.

A command begins in milliseconds instead of seconds, so that hundreds can be killed. What is forked goes
through `shoestring.cli.main`; the server has made no thread, and drawn, computed and opened nothing before.
Where a kill should meet the disk, the process kills itself right before its n-th change of a file below its
folder, which Python announces to an audit hook.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

IMPORTED = (
    *("shoestring.build", "shoestring.estimate", "shoestring.measure", "shoestring.data.encode"),
    *("shoestring.data.sources", "shoestring.data.loader", "shoestring.training.report"),
    *("shoestring.pipelines.load", "shoestring.pipelines.export", "shoestring.sampling.schedulers"),
    *("shoestring.cli.train", "shoestring.cli.encode", "shoestring.cli.store", "shoestring.cli.sample"),
    *("torch.distributed.fsdp", "torch.nn.parallel", "torch.utils.checkpoint", "rich.progress", "PIL.Image"),
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TERM": "dumb",
    "COLUMNS": "200",
}
KILLED = -signal.SIGKILL
PATIENCE = 120.0  # seconds that a command may take


@dataclass(frozen=True)
class Ended:
    """How a command ended (its exit code, negative: the signal) and what it said."""

    code: int
    out: str
    err: str
    late: bool = False  # it was killed for taking too long


class Command:
    """A command on its way."""

    def __init__(self, line: socket.socket, logs: Path) -> None:
        self._line, self._logs, self._told = line, logs, b""
        self.pid = int(self._next(PATIENCE) or 0)
        self._code: int | None = None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Kill it, wherever it is, or send it another signal."""
        if not self.ended(0.0):
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def ended(self, seconds: float) -> bool:
        """Whether it has ended, after waiting so long for that."""
        if self._code is None and (code := self._next(seconds)) is not None:
            self._code = int(code)
        return self._code is not None

    def wait(self, patience: float = PATIENCE) -> Ended:
        """How it ended; one that takes longer than `patience` is killed."""
        if late := not self.ended(patience):
            self.kill()
            self.ended(PATIENCE)
        self._line.close()
        assert self._code is not None
        return Ended(self._code, self._told_on("out"), self.said(), late)

    def said(self) -> str:
        """What it has said on stderr so far."""
        return self._told_on("err")

    def _told_on(self, stream: str) -> str:
        place = Path(f"{self._logs}.{stream}")
        return place.read_text(errors="replace") if place.exists() else ""

    def _next(self, seconds: float) -> bytes | None:
        """The next line of the keeper, if it comes within so many seconds."""
        while b"\n" not in self._told:
            if not select.select([self._line], [], [], seconds)[0]:
                return None
            self._told += self._line.recv(64) or b"-1\n"  # the keeper is gone, which it never should be
        line, self._told = self._told.split(b"\n", 1)
        return line


class Server:
    """Starts commands; a context that ends with all of them killed."""

    def __enter__(self) -> Server:
        self._folder = tempfile.TemporaryDirectory(prefix="faults-")
        self._numbers, self._address = itertools.count(), f"{self._folder.name}/door"
        words = "import sys; from parts.faults_processes import serve; serve(sys.argv[1])"
        path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [sys.executable, "-c", words, self._address],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError("the server of processes did not start")
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._folder.cleanup()

    def start(
        self,
        words: Sequence[object],
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        kill_at: int = 0,
        trace: Path | None = None,
    ) -> Command:
        """Begin `shoestring words...` in `folder`.

        kill_at  it kills itself right before so many changes on the disk (1 is the first); 0 for never
        trace    a file to which it adds a line for each such change
        """
        line = socket.socket(socket.AF_UNIX)
        line.connect(self._address)
        logs = Path(self._folder.name) / f"{next(self._numbers)}"
        request = {
            "words": [str(word) for word in words],
            "folder": str(folder.resolve()),
            "environment": dict(environment or {}),
            "logs": str(logs),
            "kill_at": kill_at,
            "trace": trace and str(trace),
        }
        line.sendall(json.dumps(request).encode() + b"\n")
        return Command(line, logs)

    def run(self, words: Sequence[object], folder: Path, patience: float = PATIENCE) -> Ended:
        """Run one command to its end."""
        return self.start(words, folder).wait(patience)


# --- in the server ---------------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Import everything, then fork a process for each command asked for; ends with whoever started it."""
    for name in IMPORTED:
        import_module(name)
    threads = threading.active_count() if sys.platform != "linux" else len(os.listdir("/proc/self/task"))
    assert threads == 1, "a process with threads cannot be forked safely"
    gc.collect()
    gc.freeze()  # a collection in a fork would write to, and so copy, all memory that it shares
    owner = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen(16)
        door.settimeout(1.0)
        print("ready", flush=True)
        while os.getppid() == owner:
            try:
                line, _ = door.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                break
            line.close()
        else:
            return
    _keep(line)


def _keep(line: socket.socket) -> None:
    """Fork the command that is asked for, and tell its number and, at its end, its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with line, line.makefile("r") as file:
        request = json.loads(file.readline())
        pid = os.fork()
        if pid:
            line.sendall(f"{pid}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            line.sendall(f"{code}\n".encode())
            os._exit(0)
    try:
        _become(**request)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    _end(code)


def _end(code: int) -> NoReturn:
    """End as Python does, but for taking its modules apart, which takes a second and changes nothing."""
    threading._shutdown()  # type: ignore[attr-defined] # multiprocessing's children end so, too
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _become(
    words: list[str],
    folder: str,
    environment: dict[str, str],
    logs: str,
    kill_at: int,
    trace: str | None,
) -> None:
    """The command itself; ends by raising."""
    from shoestring.cli.main import main

    os.chdir(folder)
    os.environ.update(environment)
    for number, place in ((0, os.devnull), (1, f"{logs}.out"), (2, f"{logs}.err")):
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if trace:
        lines = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        _at_disk_changes(folder, lambda number, what: os.write(lines, f"{number} {what}\n".encode()))
    elif kill_at:
        own = os.getpid()
        _at_disk_changes(folder, lambda number, what: number == kill_at and os.kill(own, signal.SIGKILL))
    main(words)


_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _at_disk_changes(folder: str, act: Callable[[int, str], object]) -> None:
    """Have `act` called with (number, what) right before each change of the disk below `folder`.

    Counted are opening a file to write it, or to flush what was written aside (`*.partial`: the disk gets
    it then), renaming, removing, linking and making folders.
    """
    numbers = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str) or not (flags & _WRITES or ".partial" in path):
                return
        elif event in _CHANGES:
            path = arguments[0]
        else:
            return
        path = os.path.abspath(os.fspath(path)) if isinstance(path, (str, os.PathLike)) else ""
        if path.startswith(folder):
            act(next(numbers), f"{event} {path[len(folder) + 1 :]}")

    sys.addaudithook(hook)


def wait_for(holds: Callable[[], bool], commands: Sequence[Command], patience: float = PATIENCE) -> bool:
    """Look each millisecond until something holds; False when a command ended or patience did before."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if holds():
            return True
        if any(command.ended(0.001) for command in commands):
            return False
    return False
