"""Where a GPU writes embeddings by itself: the page-locked part of memory that other processes read.

Locking takes a tenth of a second for each quarter of a GiB, and makes the system find the pages. So an arena is locked
from its beginning, as far as it is used: what does not fit in the locked part takes the way through memory of torch's
own, and has a thread lock more.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc.transport.arena import Arena

logger = logging.getLogger(__name__)

_STEP_BYTES: Final = 256 * 2**20


class Landing:
    """Deals out an arena's page-locked blocks. Belongs to the device's thread.

    Args:
        lock_pages: locks the pages at an address, so many bytes; raises RuntimeError where the system refuses.

    Attributes:
        locked_bytes: of the arena's beginning.
    """

    def __init__(self, arena: Arena, lock_pages: Callable[[int, int], None]) -> None:
        self.locked_bytes = 0
        self._arena = arena
        self._lock_pages = lock_pages
        self._locking: threading.Thread | None = None
        self._refused = False

    def take(self, num_bytes: int) -> memoryview | None:
        """A block that the device may write, or None: there is none now. See :meth:`Arena.take`."""
        try:
            block = self._arena.take(num_bytes)
        except MemoryError:
            return None
        end = self._arena.offset(block) + num_bytes
        if end <= self.locked_bytes:
            return block
        if not self._refused and (self._locking is None or not self._locking.is_alive()):
            self._locking = threading.Thread(target=self._lock_up_to, args=(end,), name="page-lock", daemon=True)
            self._locking.start()
        return None

    def _lock_up_to(self, end: int) -> None:
        while self.locked_bytes < end:
            start = self.locked_bytes
            size = min(_STEP_BYTES, self._arena.num_bytes - start)
            try:
                self._lock_pages(self._arena.address + start, size)
            except RuntimeError as error:
                logger.warning("embeddings take one copy more: pages that processes share cannot be locked: %s", error)
                self._refused = True
                return
            self.locked_bytes = start + size


def lock_for_cuda(address: int, num_bytes: int) -> None:
    """Has CUDA lock pages of this process, for as long as it lives.

    Raises:
        RuntimeError: it refuses.
    """
    cudart = torch.cuda.cudart()
    error = cudart.cudaHostRegister(address, num_bytes, 0)
    if int(error) != 0:
        raise RuntimeError(cudart.cudaGetErrorString(error))
