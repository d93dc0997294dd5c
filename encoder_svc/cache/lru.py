"""A least-recently-used map that is bounded by bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic

from encoder_svc.cache.entry import EntryT


class ByteLru(Generic[EntryT]):
    """Keeps the entries that were used last, as many as fit ``max_bytes``.

    Attributes:
        num_bytes: of the entries that are kept; never above ``max_bytes``.
        evictions: entries that were pushed out to make room.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.evictions = 0
        self._entries: OrderedDict[str, EntryT] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> EntryT | None:
        """The entry, now the last to be evicted; None if it is not kept."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def peek(self, key: str) -> EntryT | None:
        """As :meth:`get`, but leaves the order as it is."""
        return self._entries.get(key)

    def put(self, key: str, entry: EntryT) -> bool:
        """Keeps an entry that is not kept yet, and evicts what has to go. False if it alone is over the bound."""
        assert key not in self._entries
        if entry.nbytes > self.max_bytes:
            return False
        while self.num_bytes + entry.nbytes > self.max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.num_bytes -= evicted.nbytes
            self.evictions += 1
        self._entries[key] = entry
        self.num_bytes += entry.nbytes
        return True

    def pop(self, key: str) -> EntryT | None:
        """Takes an entry out; None if it is not kept."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry.nbytes
        return entry
