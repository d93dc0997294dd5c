"""The threads that images are decoded and resized in."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def image_threads(number: int) -> ThreadPoolExecutor:
    """``number`` threads, all of them started. In each torch keeps to the thread itself: with a team of its own for
    every one of them there would be more threads than cores, and a forward's would wait for theirs."""
    num_torch_threads = torch.get_num_threads()
    started = threading.Barrier(number + 1)

    def begin() -> None:
        torch.get_num_threads()  # whose first call in a thread takes the process's number, and would undo ours
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(number, thread_name_prefix="image", initializer=begin)
    for _ in range(number):
        pool.submit(lambda: None)
    started.wait()
    torch.set_num_threads(num_torch_threads)  # some of what was set is the whole process's, not a thread's
    return pool
