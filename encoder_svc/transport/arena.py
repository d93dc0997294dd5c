"""Memory that several processes see. One of them deals it out in blocks, the others read what they are told of."""

from __future__ import annotations

import mmap
import os
import threading
import time
import weakref
from bisect import bisect_left
from collections import deque
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Of a cache line, so that no block begins in another's.
_ALIGNMENT: Final = 64
_LOOK_AGAIN_S: Final = 0.002


def new_shared_file(name: str) -> int:
    """A file without a place, of no size yet, which other processes may be given; its descriptor."""
    return os.memfd_create(name, os.MFD_CLOEXEC)


def _aligned(num_bytes: int) -> int:
    return -(-max(num_bytes, 1) // _ALIGNMENT) * _ALIGNMENT


class Arena:
    """Deals out blocks of a shared file. Safe in many threads.

    Pages are the system's own until they are first written, so that an arena may be larger than it will ever be filled.

    Args:
        file: its descriptor, which stays the caller's.
        num_bytes: what the file is made to hold.
    """

    def __init__(self, file: int, num_bytes: int) -> None:
        os.ftruncate(file, num_bytes)
        self._bytes = np.frombuffer(mmap.mmap(file, num_bytes), np.uint8)
        self._address: int = self._bytes.ctypes.data
        self._free = FreeList(num_bytes)
        self._lock = threading.Lock()
        # By the collector, in any thread and anywhere: so it takes no lock.
        self._returned: deque[tuple[int, int]] = deque()

    @property
    def num_bytes(self) -> int:
        """All that it can deal out."""
        return len(self._bytes)

    @property
    def whole(self) -> memoryview:
        """All of it, to be written where a block is."""
        return self._bytes.data

    @property
    def address(self) -> int:
        """Where it begins in this process's memory."""
        return self._address

    def call_when_freed(self, call: Callable[[], object]) -> None:
        """Before its memory is given back: when nothing refers to it, nor to a block of it."""
        weakref.finalize(self._bytes, call).atexit = False

    @property
    def taken_bytes(self) -> int:
        """What is dealt out."""
        with self._lock:
            self._take_back()
            return len(self._bytes) - self._free.num_bytes

    def take(self, num_bytes: int, wait_s: float = 0.0) -> memoryview:
        """A block, to be written. It is free again once nothing refers to what is returned, nor to a view of it.

        Args:
            wait_s: for how long to wait for others to be freed.

        Raises:
            MemoryError: there is no room.
        """
        ends_s = time.monotonic() + wait_s
        while (start := self._find(_aligned(num_bytes))) is None:
            if time.monotonic() >= ends_s:
                raise MemoryError(f"{num_bytes} bytes do not fit in an arena of {self.num_bytes}")
            time.sleep(_LOOK_AGAIN_S)
        return self._block(start, num_bytes)

    def take_all(self, sizes: Sequence[int]) -> list[memoryview]:
        """Several blocks at once, each free again by itself: one behind the other, where there is room for that.

        Raises:
            MemoryError: there is no room.
        """
        start = self._find(sum(map(_aligned, sizes)))
        if start is None:
            return [self.take(size) for size in sizes]
        starts = accumulate(map(_aligned, sizes[:-1]), initial=start)
        return [self._block(at, size) for at, size in zip(starts, sizes, strict=True)]

    def _block(self, start: int, num_bytes: int) -> memoryview:
        block = self._bytes[start : start + num_bytes]
        weakref.finalize(block, self._returned.append, (start, _aligned(num_bytes))).atexit = False
        return block.data

    def holds(self, data: memoryview) -> bool:
        """Whether it is a block of this arena, or a view of one."""
        return 0 <= self._distance(data) < self.num_bytes

    def own(self, data: memoryview) -> memoryview:
        """A copy of some bytes, to be read.

        Raises:
            MemoryError: there is no room.
        """
        block = self.take(data.nbytes)
        np.copyto(np.asarray(block), np.frombuffer(data, np.uint8))  # others run meanwhile, as not with bytes()
        return block.toreadonly()

    def offset(self, block: memoryview) -> int:
        """Where in the file a block, or a view of one, begins."""
        offset = self._distance(block)
        assert 0 <= offset <= self.num_bytes - block.nbytes, "no block of this arena"
        return offset

    def _distance(self, data: memoryview) -> int:
        """From this arena's beginning to that of any bytes of this process."""
        address: int = np.frombuffer(data, np.uint8).ctypes.data
        return address - self._address

    def _find(self, size: int) -> int | None:
        with self._lock:
            self._take_back()
            return self._free.take(size)

    def _take_back(self) -> None:
        while self._returned:
            self._free.give_back(*self._returned.popleft())


class ArenaView:
    """A shared file as the others see it.

    Args:
        writable: whether its bytes may be changed; torch takes no others.
    """

    def __init__(self, file: int, *, writable: bool = False) -> None:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._bytes = memoryview(mmap.mmap(file, os.fstat(file).st_size, access=access))

    def view(self, offset: int, num_bytes: int) -> memoryview:
        """Some of its bytes.

        Raises:
            ValueError: they are not in the file.
        """
        if not 0 <= offset <= offset + num_bytes <= len(self._bytes):
            raise ValueError(f"{num_bytes} bytes at {offset} are not in a file of {len(self._bytes)}")
        return self._bytes[offset : offset + num_bytes]


class FreeList:
    """Which parts of a range are free. Takes the lowest that fit, so that pages that were used are used again."""

    def __init__(self, size: int) -> None:
        self._starts = [0]
        self._sizes = [size]

    @property
    def num_bytes(self) -> int:
        """All that is free."""
        return sum(self._sizes)

    def take(self, size: int) -> int | None:
        """Where a part begins that is now taken; None if none is large enough."""
        for place, free in enumerate(self._sizes):
            if free >= size:
                start = self._starts[place]
                if free == size:
                    del self._starts[place], self._sizes[place]
                else:
                    self._starts[place] += size
                    self._sizes[place] -= size
                return start
        return None

    def give_back(self, start: int, size: int) -> None:
        """A part that was taken is free again, and one with what is free beside it."""
        place = bisect_left(self._starts, start)
        joins_before = place > 0 and self._starts[place - 1] + self._sizes[place - 1] == start
        joins_after = place < len(self._starts) and start + size == self._starts[place]
        if joins_before and joins_after:
            self._sizes[place - 1] += size + self._sizes[place]
            del self._starts[place], self._sizes[place]
        elif joins_before:
            self._sizes[place - 1] += size
        elif joins_after:
            self._starts[place] = start
            self._sizes[place] += size
        else:
            self._starts.insert(place, start)
            self._sizes.insert(place, size)
