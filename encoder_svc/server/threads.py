"""The threads that images are decoded and resized in."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from encoder_svc.errors import ConfigError


def image_threads(number: int) -> ThreadPoolExecutor:
    """``number`` threads, all of them started. In each torch keeps to the thread itself: with a team of its own for
    every one of them there would be more threads than cores, and a forward's would wait for theirs.

    Raises:
        ConfigError: the system starts no such number. Those that it did start have ended.
    """
    num_torch_threads = torch.get_num_threads()
    all_begun = threading.Event()

    def begin() -> None:
        torch.get_num_threads()  # whose first call in a thread takes the process's number, and would undo ours
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(number, thread_name_prefix="image", initializer=begin)
    try:
        # A thread that waits takes no other's work, so that there is one for each.
        begun = [pool.submit(all_begun.wait) for _ in range(number)]
        all_begun.set()
        for thread in begun:
            thread.result()
    except RuntimeError as error:
        all_begun.set()
        pool.shutdown()
        raise ConfigError(
            f"--decode-threads {number}: this process may not have so many; its memory or its number of threads is "
            "limited (ulimit -v, ulimit -u, a container's pids limit)."
        ) from error
    torch.set_num_threads(num_torch_threads)  # some of what was set is the whole process's, not a thread's
    return pool
