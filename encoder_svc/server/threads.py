"""The threads that images are decoded and resized in."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

_YIELD: Final = 5
"""How much nicer than the process they are: forwards and the event loop go first (docs/engine.md, "Measured")."""


def image_threads(number: int) -> ThreadPoolExecutor:
    """``number`` threads, all of them started. In each torch keeps to the thread itself: with a team of its own for
    every one of them there would be more threads than cores, and a forward's would wait for theirs. Linux gives them
    less time than others where there is not enough."""
    num_torch_threads = torch.get_num_threads()
    started = threading.Barrier(number + 1)

    def begin() -> None:
        torch.get_num_threads()  # whose first call in a thread takes the process's number, and would undo ours
        torch.set_num_threads(1)
        if sys.platform == "linux":
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + _YIELD, 19))
        started.wait()

    pool = ThreadPoolExecutor(number, thread_name_prefix="image", initializer=begin)
    for _ in range(number):
        pool.submit(lambda: None)
    started.wait()
    torch.set_num_threads(num_torch_threads)  # some of what was set is the whole process's, not a thread's
    return pool
