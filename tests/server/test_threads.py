"""The threads that images are decoded in."""

from __future__ import annotations

import subprocess
import sys
import threading

import torch

from encoder_svc.server.threads import image_threads


def test_torch_keeps_to_an_image_thread_and_nowhere_else() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with image_threads(2) as pool:
            inside = {pool.submit(torch.get_num_threads).result() for _ in range(8)}
        assert inside == {1}
        assert torch.get_num_threads() == 2
        beside: list[int] = []
        thread = threading.Thread(target=lambda: beside.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert beside == [2]
    finally:
        torch.set_num_threads(before)


# Stacks of which few fit into what it leaves itself.
SHORT_OF_MEMORY = """
import resource, threading
from pathlib import Path
from encoder_svc.errors import ConfigError
from encoder_svc.server.threads import image_threads
threading.stack_size(64 << 20)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30),) * 2)
try:
    image_threads(100)
except ConfigError as error:
    print(error)
    print(threading.active_count())
"""


def test_threads_that_cannot_be_had_are_refused_by_their_option_and_those_that_began_end() -> None:
    run = [sys.executable, "-c", SHORT_OF_MEMORY]
    done = subprocess.run(run, check=True, capture_output=True, text=True, timeout=30)
    said, num_left = done.stdout.splitlines()
    assert said.startswith("--decode-threads 100: this process may not have so many")
    assert num_left == "1"
