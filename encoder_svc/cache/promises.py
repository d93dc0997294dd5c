"""Keys that somebody is about to retain, so that a fetch which comes too early waits and is not told "unknown"."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Promises:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._promised: Counter[str] = Counter()
        self._settled: dict[str, asyncio.Event] = {}

    @contextmanager
    def promise(self, key: str) -> Iterator[None]:
        """While inside, :meth:`wait` waits. Leave it once the key is retained, or will not be."""
        self._promised[key] += 1
        try:
            yield
        finally:
            self._promised[key] -= 1
            if not self._promised[key]:
                del self._promised[key]
                settled = self._settled.pop(key, None)
                if settled is not None:
                    settled.set()

    async def wait(self, key: str) -> None:
        """Returns once nobody promises the key; at once if nobody does."""
        if self._promised[key]:
            await self._settled.setdefault(key, asyncio.Event()).wait()
