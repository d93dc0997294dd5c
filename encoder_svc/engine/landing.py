"""Where a GPU writes embeddings by itself: the page-locked part of memory that other processes read.

To lock a GiB takes a second, and more memory than will be used is at hand. So an arena is locked from its beginning, in
steps, by a thread, and that always farther than it is used: what does not fit in the locked part all the same takes the
way through memory of torch's own.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Protocol

import torch

if TYPE_CHECKING:
    from encoder_svc.transport.arena import Arena

logger = logging.getLogger(__name__)

_STEP_BYTES: Final = 64 * 2**20
_AHEAD_BYTES: Final = 2**30
"""How much more is locked than was ever used, and before anything is."""

# Of Linux since 5.14; Python has no name for it.
_MADV_POPULATE_WRITE: Final = 23


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
        self._lock_beyond(0)

    def land(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A copy of a device's tensor in a block, on its way when this returns, or None: there is no block now.

        What was locked in one step is copied by itself: a copy into the pages of two is not asynchronous, but waits for
        the device.
        """
        block = self.take(tensor.nbytes)
        if block is None:
            return None
        host, source = torch.frombuffer(block, dtype=torch.uint8), tensor.contiguous().flatten().view(torch.uint8)
        for part in pieces(self._arena.offset(block), tensor.nbytes, _STEP_BYTES):
            host[part].copy_(source[part], non_blocking=True)
        return host.view(tensor.dtype).view(tensor.shape)

    def take(self, num_bytes: int) -> memoryview | None:
        """A block that the device may write, or None: there is none now. See :meth:`Arena.take`."""
        try:
            block = self._arena.take(num_bytes)
        except MemoryError:
            return None
        end = self._arena.offset(block) + num_bytes
        is_locked = end <= self.locked_bytes
        self._lock_beyond(end)
        return block if is_locked else None

    def _lock_beyond(self, used: int) -> None:
        end = min(used + _AHEAD_BYTES, self._arena.num_bytes)
        if self.locked_bytes < end and not self._refused and (self._locking is None or not self._locking.is_alive()):
            self._locking = threading.Thread(target=self._lock_up_to, args=(end,), name="page-lock", daemon=True)
            self._locking.start()

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


def pieces(start: int, num_bytes: int, step: int) -> list[slice]:
    """So many bytes from ``start`` on, cut where multiples of ``step`` are; each counted from ``start``."""
    cuts = [0, *range(step - start % step, num_bytes, step), num_bytes]
    return [slice(begin, end) for begin, end in pairwise(cuts)]


class CudaPages:
    """Pages that CUDA knows.

    Args:
        device: in whose context; a thread's own would be the first GPU's, whichever is served.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def lock(self, address: int, num_bytes: int) -> None:
        """See :class:`Pages`; so with the other."""
        # First the system finds the pages: the driver would do so too, but whoever launches a kernel would wait for it.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _MADV_POPULATE_WRITE)
        cudart = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            error = cudart.cudaHostRegister(address, num_bytes, 0)
        if int(error) != 0:
            raise RuntimeError(cudart.cudaGetErrorString(error))

    def unlock(self, address: int) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(address)
