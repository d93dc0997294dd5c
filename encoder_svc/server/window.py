"""How much of something is taken at a time: a request's patches in work or unread, pixels that wait for the device."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from concurrent.futures import Future


class Window:
    """Lets in, in order, what fits. What is larger than the window is let in when it is empty; what takes nothing waits
    for nobody.

    Attributes:
        size: how much fits.
        held: how much is inside.
    """

    def __init__(self, size: int) -> None:
        self.held = 0
        self.size = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def room(self, amount: int) -> AsyncIterator[Room]:
        """Waits for room, and gives back at the end what is left of it, unless a thread keeps it."""
        if amount:
            await self._enter(amount)
        room = Room(self, amount)
        try:
            yield room
        finally:
            if not room.is_kept:
                room.shrink(0)

    async def _enter(self, amount: int) -> None:
        entered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, entered))
        self._let_in()
        try:
            await entered
        except asyncio.CancelledError:
            if entered.done() and not entered.cancelled():
                self.held -= amount
            self._let_in()
            raise

    def give_back(self, amount: int) -> None:
        """Lets others in to so much."""
        self.held -= amount
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            amount, entered = self._waiting[0]
            if not entered.done():
                if self.held and self.held + amount > self.size:
                    return
                self.held += amount
                entered.set_result(None)
            self._waiting.popleft()


class Room:
    """What somebody holds of a window.

    Attributes:
        is_kept: see :meth:`keep_for`.
    """

    def __init__(self, window: Window, amount: int) -> None:
        self.is_kept = False
        self._window = window
        self._amount = amount

    def shrink(self, amount: int) -> None:
        """So much is still needed; the rest is given back."""
        self._window.give_back(self._amount - amount)
        self._amount = amount

    def keep_for(self, job: Future[Any]) -> None:
        """Until ``job`` is through, which cannot be interrupted, though whoever waited for it leaves."""
        self.is_kept = True
        give_back = partial(asyncio.get_running_loop().call_soon_threadsafe, self.shrink, 0)

        def ended(_: Future[Any]) -> None:
            with suppress(RuntimeError):  # the loop has ended before it, and all that was held with it
                give_back()

        job.add_done_callback(ended)
