"""How much of one request is in work or unread at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class PatchWindow:
    """Lets images in, in order, while their patches fit. One larger than the window is let in when it is empty."""

    def __init__(self, max_patches: int) -> None:
        self._max_patches = max_patches
        self._patches = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def room(self, num_patches: int) -> AsyncIterator[None]:
        """Waits for room, and gives it back at the end."""
        await self._enter(num_patches)
        try:
            yield
        finally:
            self._patches -= num_patches
            self._let_in()

    async def _enter(self, num_patches: int) -> None:
        entered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((num_patches, entered))
        self._let_in()
        try:
            await entered
        except asyncio.CancelledError:
            if entered.done() and not entered.cancelled():
                self._patches -= num_patches
            self._let_in()
            raise

    def _let_in(self) -> None:
        while self._waiting:
            num_patches, entered = self._waiting[0]
            if not entered.done():
                if self._patches and self._patches + num_patches > self._max_patches:
                    return
                self._patches += num_patches
                entered.set_result(None)
            self._waiting.popleft()
