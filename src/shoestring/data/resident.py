"""The shards that are open: found (or fetched), checked, mapped, and closed again when others are needed.

    get(name) --open already?--> arrays
        `--no--> files.local (a remote store downloads) --> CRC-32 --> mapped, the longest unused closed

Threads may ask at once; a shard that one of them is opening is waited for, not opened twice.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from itertools import islice
from weakref import WeakSet

from shoestring.data.folder import Files
from shoestring.data.integrity import Entry, matches, what_is_wrong
from shoestring.data.shards import Array, read_lines, read_shard
from shoestring.errors import CorruptStoreError, StoreError

FEWEST, MOST = 256, 32_768  # shards open at once: each takes a file descriptor and a mapping
HELPERS = 4  # threads that open shards ahead
TRIES = 5  # at a shard that another process removes from the cache as soon as it is there

Arrays = dict[str, Array]


class Resident:
    """Open shards by name; above `most` of them the one unused for longest goes that nobody holds."""

    def __init__(self, files: Files, entries: Mapping[str, Entry], most: int | None = None) -> None:
        self.files, self.entries = files, entries
        self._given = most
        self._open: OrderedDict[str, Arrays] = OrderedDict()
        self._coming: dict[str, Future[Arrays]] = {}
        self._lock = threading.Lock()
        self._holders: Counter[str] = Counter()
        self._wanted: dict[str, None] = {}  # to be opened ahead, in order
        self._helpers = 0  # threads at it
        self._ahead: dict[str, bool] = {}  # what they are opening -> whether it was dropped meanwhile

        _residents.add(self)

    @property
    def most(self) -> int:
        """How many may be open: this store's part of what the process may open."""
        return self._given or max(most_open() // len(_residents), FEWEST)

    def __len__(self) -> int:
        return len(self._open)

    def get(self, name: str) -> Arrays:
        """Arrays of a shard; raises `CorruptStoreError` where it is not what the manifest says."""
        with self._lock:
            if (arrays := self._open.get(name)) is not None:
                self._open.move_to_end(name)
                return arrays
            self._wanted.pop(name, None)
            coming = self._coming.get(name)
            opening = None if coming else self._coming.setdefault(name, Future())
        if opening is None:
            assert coming is not None
            return coming.result()
        try:
            arrays = self._read(self.entries[name])
        except BaseException as error:
            with self._lock:
                del self._coming[name]
            opening.set_exception(error)
            raise
        with self._lock:
            del self._coming[name]
            self._open[name] = arrays
            idle = (each for each in self._open if each not in self._holders and each != name)
            for each in list(islice(idle, max(0, len(self._open) - self.most))):
                del self._open[each]
            while len(self._open) > (self._given or most_open()):  # all held, by several loaders
                self._open.popitem(last=False)
        opening.set_result(arrays)
        return arrays

    def hold(self, names: Iterable[str]) -> None:
        """Have shards opened by threads of their own, so that they are there when asked for."""
        with self._lock:
            for name in names:
                self._holders[name] += 1
                if name not in self._open and name not in self._coming:
                    self._wanted[name] = None
            missing = max(0, min(HELPERS, len(self._wanted)) - self._helpers)
            self._helpers += missing
        for _ in range(missing):
            threading.Thread(target=self._help, name="shoestring-ahead", daemon=True).start()

    def release(self, names: Iterable[str], *, drop: bool) -> None:
        """Undo one `hold`; with `drop`, close what nobody holds any more and let its copy go."""
        with self._lock:
            self._holders.subtract(names := list(names))
            free = [name for name in names if self._holders[name] <= 0]
            for name in free:
                del self._holders[name]
                self._wanted.pop(name, None)
                if drop:
                    self._open.pop(name, None)
                if name in self._ahead:
                    self._ahead[name] = drop
        if drop:
            self.files.leave([self.entries[name] for name in free])

    def _help(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._helpers -= 1
                    return
                name = next(iter(self._wanted))
                del self._wanted[name]
                self._ahead[name] = False
            with suppress(Exception):  # told when the shard is asked for, to whom asks
                self.get(name)
            with self._lock:
                late = self._ahead.pop(name, False) and name not in self._holders
                if late:
                    self._open.pop(name, None)
            if late:
                self.files.leave([self.entries[name]])

    def _read(self, entry: Entry) -> Arrays:
        """A checked shard; a damaged copy of a remote one is fetched once more."""
        name, damaged = str(entry["path"]), False
        for _ in range(TRIES):
            path = self.files.local(entry)
            try:
                if matches(path, entry, self.files.state(name)):
                    return (read_lines if name.endswith(".jsonl") else read_shard)(path)
            except FileNotFoundError:  # another process was done with a copy as this one turned to it
                continue
            except (ValueError, LookupError, TypeError):  # a header that means nothing
                pass
            except OSError as error:  # of the disk, or too many open files: no damage of the file
                raise StoreError(
                    f"{path}: cannot be read ({error.strerror}). Mend that and run the same command again."
                ) from error
            if damaged or not self.files.fetch_again(entry):
                break
            damaged = True
        problem = what_is_wrong(path, entry, self.entries.values())
        raise CorruptStoreError(self.files.cure({name: problem}))


_residents: WeakSet[Resident] = WeakSet()  # of all stores open in this process


def most_open() -> int:
    """How many shards the stores of this process may have open: half of what it may open (`ulimit -n`)."""
    try:
        import resource

        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except (ImportError, OSError):
        allowed = 2 * FEWEST
    if allowed < 0:
        return MOST
    return min(max(allowed // 2, FEWEST), MOST)
