"""glibc's malloc, told to keep a server's memory flat.

By default glibc gives each thread a heap of its own. Photographs of all sizes, decoded on several threads, leave holes
in each of them, and resident memory creeps up (docs/memory.md has the figures). One shared heap fills its holes. The
lock costs nothing that could be measured here: each call takes few and large blocks.
"""

from __future__ import annotations

import ctypes
import gc
import platform
from typing import Final

_M_ARENA_MAX: Final = -8  # <malloc.h>


def use_one_heap() -> None:
    """Takes effect for threads that start afterwards. Elsewhere than on glibc it does nothing: no other allocator has
    this fault."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def spare_what_is_loaded() -> None:
    """Has Python's collector of cycles leave alone what is there by now: modules, weights, kernels. To look through
    those two hundred thousand objects again takes a tenth of a second, in which every thread stands still."""
    gc.collect()
    gc.freeze()
