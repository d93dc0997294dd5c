"""The threads that images are decoded in."""

from __future__ import annotations

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
