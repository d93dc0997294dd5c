"""Where a GPU writes embeddings by itself: the page-locked part of memory that other processes read.

Locking takes a tenth of a second for each quarter of a GiB, and makes the system find the pages. So an arena is locked
from its beginning, as far as it is used: what does not fit in the locked part takes the way through memory of torch's
own, and has a thread lock more.
"""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import torch

if TYPE_CHECKING:
    from encoder_svc.transport.arena import Arena

logger = logging.getLogger(__name__)

_STEP_BYTES: Final = 256 * 2**20


class Pages(Protocol):
    """Those of this process's memory."""

    def lock(self, address: int, num_bytes: int) -> None:
        """Keeps them where they are, for the device.

        Raises:
            RuntimeError: the system refuses.
        """

    def unlock(self, address: int) -> None:
        """Gives back what was locked at this address."""


class Landing:
    """Deals out an arena's page-locked blocks. Belongs to the device's thread.

    Attributes:
        locked_bytes: of the arena's beginning.
    """

    def __init__(self, arena: Arena, pages: Pages) -> None:
        self.locked_bytes = 0
        self._arena = arena
        self._pages = pages
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
                address = self._arena.address + start
                self._pages.lock(address, size)
            except RuntimeError as error:
                logger.warning("embeddings take one copy more: pages that processes share cannot be locked: %s", error)
                self._refused = True
                return
            self._arena.call_when_freed(partial(self._pages.unlock, address))
            self.locked_bytes = start + size


class CudaPages:
    """Pages that CUDA knows.

    Args:
        device: in whose context; a thread's own would be the first GPU's, whichever is served.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def lock(self, address: int, num_bytes: int) -> None:
        """See :class:`Pages`; so with the other."""
        cudart = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            error = cudart.cudaHostRegister(address, num_bytes, 0)
        if int(error) != 0:
            raise RuntimeError(cudart.cudaGetErrorString(error))

    def unlock(self, address: int) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(address)
