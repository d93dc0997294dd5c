"""glibc's malloc, told to keep a process's memory flat and at hand.

By default glibc gives each thread a heap of its own. Photographs of all sizes, decoded on several threads, leave holes
in each of them, and resident memory creeps up (docs/memory.md has the figures). One shared heap fills its holes. The
lock costs nothing that could be measured here: each call takes few and large blocks.

It also gives freed memory back at once where that lies at the heap's end, so that the next image finds the same pages
anew: some two hundred page faults for each of a small model, thousands where rows are wide.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Final

# <malloc.h>
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

_KEPT_BYTES: Final = 128 * 2**20
_LARGEST_OF_HEAP_BYTES: Final = 32 * 2**20
"""As much as glibc takes. By itself it begins at 128 KiB and goes there as blocks are freed; not so once it was told
what to keep."""


def use_one_heap() -> None:
    """Takes effect for threads that start afterwards. Elsewhere than on glibc it does nothing: no other allocator has
    these faults."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_OF_HEAP_BYTES)


def give_back_what_is_free() -> None:
    """Pages that hold nothing, wherever in the heap they are, but for what is kept at its end."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(_KEPT_BYTES)
