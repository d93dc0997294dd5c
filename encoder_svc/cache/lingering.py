"""Entries that are kept no longer, and that somebody still reads: their memory is not free yet."""

from __future__ import annotations

import weakref
from collections import deque
from functools import partial
from typing import Generic

from encoder_svc.cache.entry import EntryT


class Lingering(Generic[EntryT]):
    """Counts the bytes of entries that were let go of, until the last reference to each is gone. Belongs to one thread;
    the entries may go in any."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._sizes: dict[int, tuple[weakref.ref[EntryT], int]] = {}
        # By the collector, in any thread and anywhere: so it changes nothing else.
        self._gone: deque[int] = deque()

    @property
    def num_bytes(self) -> int:
        """Of those that are still there."""
        self._forget_gone()
        return self._num_bytes

    def add(self, entry: EntryT) -> None:
        """It is kept no longer."""
        self._forget_gone()
        name = id(entry)
        if name not in self._sizes:
            self._sizes[name] = weakref.ref(entry, partial(_append, self._gone, name)), entry.nbytes
            self._num_bytes += entry.nbytes

    def discard(self, entry: EntryT) -> None:
        """It is kept again, or was never let go of."""
        self._forget_gone()
        self._forget(id(entry))

    def _forget_gone(self) -> None:
        while self._gone:
            self._forget(self._gone.popleft())

    def _forget(self, name: int) -> None:
        _, num_bytes = self._sizes.pop(name, (None, 0))
        self._num_bytes -= num_bytes


def _append(gone: deque[int], name: int, _: object) -> None:
    gone.append(name)
