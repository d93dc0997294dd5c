"""When the next batch may be made up and given to the device. Belongs to the event loop.

A device that computes one batch while the next is packed and copied needs two at a time that it has not computed. A
batch that is computed is on its way back to the host for a while, and nobody need wait for that. And a batch that is
full is packed earlier still: nothing that comes later could join it.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Places:
    """Those of batches in flight.

    Args:
        depth: how many there are. Of several, the last is for a batch that is full, or while another is computed.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._num_in_flight = 0
        self._num_not_computed = 0
        self._num_packed_now = 0
        self._changed = asyncio.Event()

    async def take(self, is_full: Callable[[], bool]) -> Place:
        """Waits for one.

        Args:
            is_full: whether the next batch would be. Asked again after :meth:`look_again`.
        """
        while not self._has_one(is_full):
            self._changed.clear()
            await self._changed.wait()
        self._num_in_flight += 1
        self._num_not_computed += 1
        return Place(self)

    def _has_one(self, is_full: Callable[[], bool]) -> bool:
        if self._num_packed_now or self._num_in_flight >= self._depth:
            return False
        return self._num_not_computed < max(self._depth - 1, 1) or is_full()

    def look_again(self) -> None:
        """Something else changed that a place may depend on."""
        self._changed.set()

    @contextmanager
    def packing(self) -> Iterator[None]:
        """While the device's thread is about to pack a batch, or does: what comes meanwhile rides along in the next."""
        self._num_packed_now += 1
        try:
            yield
        finally:
            self._num_packed_now -= 1
            self.look_again()

    def _left(self, *, computed: int = 0, ended: int = 0) -> None:
        self._num_not_computed -= computed
        self._num_in_flight -= ended
        self.look_again()


class Place:
    """One batch's."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._is_computed = False

    def computed(self) -> None:
        """The device works on it no longer. May be said again."""
        if not self._is_computed:
            self._is_computed = True
            self._places._left(computed=1)

    def end(self) -> None:
        """Once."""
        self.computed()
        self._places._left(ended=1)
