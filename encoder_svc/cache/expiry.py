"""Which key expires next. Pure: times are given, none is read."""

from __future__ import annotations

import heapq

_SLACK = 16
"""Stale heap items that are let be, so that a short queue is not rebuilt over and over."""


class ExpiryQueue:
    """Keys by the time at which each expires; every step costs O(log n), averaged over many.

    A changed or dropped key leaves a stale item in the heap. Stale items are skipped when they surface, and the heap is
    rebuilt when they outnumber the live ones, so memory stays in proportion to the keys.
    """

    def __init__(self) -> None:
        self._expires_s: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._expires_s)

    @property
    def next_s(self) -> float | None:
        """When the next key expires; None if there is none."""
        self._drop_stale()
        return self._heap[0][0] if self._heap else None

    def extend(self, key: str, expires_s: float) -> float:
        """Adds ``key``, or moves its expiry later, never earlier. Returns when it expires now."""
        known_s = self._expires_s.get(key)
        if known_s is not None and known_s >= expires_s:
            return known_s
        self._expires_s[key] = expires_s
        heapq.heappush(self._heap, (expires_s, key))
        if len(self._heap) > 2 * len(self._expires_s) + _SLACK:
            self._heap = [(time_s, live) for live, time_s in self._expires_s.items()]
            heapq.heapify(self._heap)
        return expires_s

    def discard(self, key: str) -> None:
        """Forgets ``key``, if it is there."""
        self._expires_s.pop(key, None)

    def pop_due(self, now_s: float) -> list[str]:
        """Takes out the keys that have expired at ``now_s``, soonest first, equals in the keys' own order."""
        due: list[str] = []
        while (next_s := self.next_s) is not None and next_s <= now_s:
            _, key = heapq.heappop(self._heap)
            del self._expires_s[key]
            due.append(key)
        return due

    def _drop_stale(self) -> None:
        while self._heap and self._expires_s.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
