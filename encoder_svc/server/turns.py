"""Whose embeddings are written now: those that were ready first.

All images of a batch are ready at once. Written side by side, each would be whole only when all are.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

# While gRPC takes one image's chunk, another's is made.
_AT_A_TIME: Final = 2
# A caller that does not take a message within this time is waited for beside the others, for the rest of its image.
_PATIENCE_S: Final = 0.01


class Turns:
    """Those of one process. Belongs to the event loop."""

    def __init__(self, at_a_time: int = _AT_A_TIME, patience_s: float = _PATIENCE_S) -> None:
        self.free = asyncio.Semaphore(at_a_time)
        self.patience_s = patience_s

    def turn(self) -> Turn:
        """One image's, in an ``async with``."""
        return Turn(self)


class Turn:
    """See :meth:`Turns.turn`."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._is_ours = False

    async def write(self, send: Callable[[], Awaitable[None]]) -> None:
        """Waits while ``send`` writes a message. Once that takes long, others go on."""
        impatience = asyncio.get_running_loop().call_later(self._turns.patience_s, self._give_back)
        try:
            await send()
        finally:
            impatience.cancel()

    async def __aenter__(self) -> Self:
        await self._turns.free.acquire()
        self._is_ours = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        if self._is_ours:
            self._is_ours = False
            self._turns.free.release()
