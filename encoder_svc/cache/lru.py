"""A least-recently-used map that is bounded by bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic

from encoder_svc.cache.entry import EntryT
from encoder_svc.cache.lingering import Lingering


class ByteLru(Generic[EntryT]):
    """Keeps the entries that were used last, as many as fit ``max_bytes`` beside those that were pushed out and are
    still being read.

    Attributes:
        evictions: entries that were pushed out to make room.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.evictions = 0
        self._kept_bytes = 0
        self._entries: OrderedDict[str, EntryT] = OrderedDict()
        self._lingering: Lingering[EntryT] = Lingering()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Of the entries that are kept, and of those that were pushed out while they are being read; never above
        ``max_bytes``."""
        return self._kept_bytes + self._lingering.num_bytes

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
        """Keeps an entry that is not kept yet, and evicts what has to go. False if there is no room: it alone is over
        the bound, or with what is still being read."""
        assert key not in self._entries
        self._lingering.discard(entry)
        room = self.max_bytes - entry.nbytes
        if self._lingering.num_bytes > room:
            return False
        while self._entries and self.num_bytes > room:
            self._evict()
        if self.num_bytes > room:
            return False
        self._entries[key] = entry
        self._kept_bytes += entry.nbytes
        return True

    def _evict(self) -> None:
        _, evicted = self._entries.popitem(last=False)
        self._kept_bytes -= evicted.nbytes
        self._lingering.add(evicted)
        self.evictions += 1

    def pop(self, key: str) -> EntryT | None:
        """Takes an entry out; None if it is not kept."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._kept_bytes -= entry.nbytes
        return entry

    def disown(self, entry: EntryT) -> None:
        """It counts elsewhere now, should it have been pushed out and still be read."""
        self._lingering.discard(entry)
