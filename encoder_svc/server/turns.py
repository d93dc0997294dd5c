"""Whose embeddings are written now: those that were ready first.

All images of a batch are ready at once. Written side by side, each would be whole only when all are.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from types import TracebackType

# While gRPC takes one image's chunk, another's is made.
_AT_A_TIME: Final = 2
# A caller that takes a chunk no sooner than this is waited for beside the others.
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

    async def write(self, chunk: Awaitable[None]) -> None:
        """Waits while a chunk is written, and lets others go on if that takes long."""
        if not self._is_ours:
            await self.__aenter__()
        impatience = asyncio.get_running_loop().call_later(self._turns.patience_s, self._give_back)
        try:
            await chunk
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
