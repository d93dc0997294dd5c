"""Callers of every kind, for tests that watch a server at work."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from PIL import Image

from encoder_svc.client import EncoderClient
from encoder_svc.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

PHOTO = Path(__file__).parent / "photos" / "cat.jpg"
MAX_INFLIGHT_IMAGES = 24
"""What to give the server as ``--max-inflight-images``, so that some of these callers are refused."""


class Traffic:
    """Callers in threads, while inside: new and repeated images, broken ones, ones that are retained and fetched;
    requests that are too large, in too much of a hurry, or more than there is room for."""

    def __init__(self, target: str, num_callers: int = 4) -> None:
        self._target = target
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(num_callers)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self, seed: int) -> None:
        chance = random.Random(seed)
        photo = np.asarray(Image.open(PHOTO).convert("RGB"))

        def crop() -> np.ndarray:
            """One that the cache has hardly seen."""
            height, width = chance.randrange(112, 280, 28), chance.randrange(112, 280, 28)
            top, left = chance.randrange(photo.shape[0] - height), chance.randrange(photo.shape[1] - width)
            return np.ascontiguousarray(photo[top : top + height, left : left + width])

        with EncoderClient(self._target, timeout_s=30) as client:
            calls: list[Callable[[], object]] = [
                lambda: client.encode([crop() for _ in range(chance.randint(1, 6))]),
                lambda: client.encode([PHOTO]),
                lambda: list(client.stream([b"not an image", crop()])),
                lambda: list(client.fetch([kept.key for kept in client.retain([crop()], lease_s=5)])),
                lambda: client.encode([crop() for _ in range(MAX_INFLIGHT_IMAGES)]),
                lambda: client.encode([crop()] * 65),
                lambda: client.encode([crop() for _ in range(8)], timeout_s=0.004),
            ]
            try:
                for call in itertools.cycle(calls):
                    if self._stop.wait(chance.uniform(0, 0.05)):
                        return
                    with contextlib.suppress(RequestError):  # some are meant to fail
                        call()
            except BaseException as error:
                self._failure = error
