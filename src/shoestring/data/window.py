"""A window of chunks: a split's rows in an order that needs few chunks at a time, and those chunks at hand.

    chunks in this epoch's order   | a b c d | e f g h | i j k l |      window 4
    while rows of e f g h are read             here     fetched ahead; a b c d are given up

Around the change from one group to the next both are here, so that no batch waits; never more than two are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoestring.data.order import Group, WindowOrder
from shoestring.data.resident import MOST, most_open
from shoestring.data.splits import Rows, Split
from shoestring.data.store import Store
from shoestring.errors import StoreError


class Window:
    """The rows of a split, of whose chunks at most `size` are mixed at a time.

    Chunks hold unequal parts of a split whose rows are picked at random; those that hold none are left out.
    """

    def __init__(self, split: Split, seed: int, counts: Rows, size: int) -> None:
        self.split = split
        self.chunks = np.flatnonzero(counts)
        self.order = WindowOrder(seed, counts[self.chunks], size)

    def rows_at(self, start: int, stop: int) -> Rows:
        """Row numbers of the store at positions start .. stop-1 of the run."""
        return self.split.on_disk(self.order.rows_at(start, stop))

    def chunks_of(self, group: Group) -> list[int]:
        """The chunks of the store that a group's rows lie in."""
        return [int(chunk) for chunk in self.chunks[group.chunks]]


def make_window(
    store: Store, split: Split, seed: int, size: int | None, columns: Sequence[str] = ()
) -> Window | None:
    """The window a loader of `columns` asks for; None where it would hold every chunk.

    Raises `StoreError` below 1, and where two windows are more files than the process may have open.
    """
    if size is None:
        return None
    if size < 1:
        raise StoreError(f"window {size}: give at least 1 chunk, or none to mix all of them.")
    counts = store.rows_by_chunk(split)
    if size >= (chunks := int(np.count_nonzero(counts))):
        return None
    files, most = min(2 * size, chunks) * len(columns), most_open()
    if files > most:
        fits = max(1, most // (2 * len(columns)))
        limit = f", or allow more with `ulimit -n {2 * files}`" if files <= MOST else ""
        raise StoreError(
            f"{store.place}: two windows of {size} chunks (data.window) are {files:,} open files of "
            f"{len(columns)} columns; this process may have {most:,}. Use a window of {fits} or less{limit}."
        )
    return Window(split, seed, counts, size)


class Keeper:
    """Has the chunks of the current group and the next at hand as a loader moves along, and no others.

    The group before is given up `patience` batches after it was left, and the next one fetched then: by that
    time every process of this machine, all of which take their batches together, is done with the old one.
    """

    def __init__(self, store: Store, window: Window, columns: Sequence[str], *, patience: int) -> None:
        self.store, self.window, self.columns, self.patience = store, window, columns, patience
        self.held: list[Group] = []  # whose chunks are here or on their way, in the order of the run
        self.waited = 0  # batches since the last group was reached

    def move(self, start: int, stop: int, end: int) -> None:
        """Told before each batch: it takes positions start .. stop-1 of a run that goes on to `end`."""
        order = self.window.order
        needed = list(order.groups_at(start, stop))
        current, left = needed[-1], self._before(needed[0])
        self.waited = 0 if start <= current.start else self.waited + 1
        half = (current.stop - current.start) // (stop - start) // 2  # of the group's batches
        if len(needed) == 1 and (not left or self.waited >= min(self.patience, half)):
            self._hold([current, *([order.group_of(current.stop)] if current.stop < end else [])])
        else:
            self._hold([*left[-1:], *needed] if len(needed) == 1 else needed)

    def _before(self, group: Group) -> list[Group]:
        return [each for each in self.held if each.start < group.start]

    def _hold(self, groups: Sequence[Group]) -> None:
        """Fetch what is new of the chunks of `groups`, give up those of all others."""
        starts = [group.start for group in groups]
        if starts == [group.start for group in self.held]:
            return
        before, after = self._chunks(self.held), self._chunks(groups)
        self.held = list(groups)
        self.store.release(self.columns, [chunk for chunk in before if chunk not in after], drop=True)
        self.store.hold(self.columns, [chunk for chunk in after if chunk not in before])

    def close(self) -> None:
        """Hold nothing any more; what is here stays for the loader that comes next."""
        self.store.release(self.columns, self._chunks(self.held), drop=False)
        self.held = []

    def _chunks(self, groups: Sequence[Group]) -> dict[int, None]:
        return dict.fromkeys(chunk for group in groups for chunk in self.window.chunks_of(group))
