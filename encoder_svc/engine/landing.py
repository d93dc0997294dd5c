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
    from collections.abc import Sequence

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
        self._memory = torch.frombuffer(arena.whole, dtype=torch.uint8)
        self._locking: threading.Thread | None = None
        self._refused = False
        self._lock_beyond(0)

    def land(self, parts: Sequence[torch.Tensor]) -> list[memoryview] | None:
        """Copies of a device's tensors, each in a block, on their way when this returns; None: there are no blocks now.

        What was locked in one step is copied by itself: a copy into the pages of two is not asynchronous, but waits for
        the device.
        """
        blocks = self.take([part.nbytes for part in parts])
        if blocks is not None:
            copy_bytes(parts, self._memory, [self._arena.offset(block) for block in blocks], _STEP_BYTES)
        return blocks

    def take(self, sizes: Sequence[int]) -> list[memoryview] | None:
        """Blocks that the device may write, or None: there are none now. See :meth:`Arena.take_all`."""
        try:
            blocks = self._arena.take_all(sizes)
        except MemoryError:
            return None
        end = max(self._arena.offset(block) + block.nbytes for block in blocks)
        are_locked = end <= self.locked_bytes
        self._lock_beyond(end)
        return blocks if are_locked else None

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


def copy_bytes(
    parts: Sequence[torch.Tensor], host: torch.Tensor, offsets: Sequence[int], step: int | None = None
) -> None:
    """Copies each tensor's bytes to its place, without waiting. Those that are neighbours on both sides go as one: a
    copy costs the thread that asks for it more than the device.

    Args:
        host: uint8 [bytes], page-locked.
        offsets: of each tensor there.
        step: no copy crosses a multiple of it.
    """
    flats = [part.contiguous().view(-1).view(torch.uint8) for part in parts]
    index = 0
    while index < len(flats):
        first, at, size = flats[index], offsets[index], 0
        storage, address = first.untyped_storage().data_ptr(), first.data_ptr()
        while (
            index < len(flats)
            and offsets[index] == at + size
            and flats[index].data_ptr() == address + size
            and flats[index].untyped_storage().data_ptr() == storage
        ):
            size += len(flats[index])
            index += 1
        source = first.as_strided((size,), (1,))
        for piece in pieces(at, size, step or at + size):
            host[at + piece.start : at + piece.stop].copy_(source[piece], non_blocking=True)


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
