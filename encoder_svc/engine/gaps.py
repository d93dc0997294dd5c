"""Short jobs between the layers of a long forward, on the thread that is at it.

A CPU runs one forward at a time, and one of a large image takes as long as dozens of small ones. Between two of its
layers a small batch's whole forward can run without disturbing it, so that small images do not wait for large ones.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc.models.base import VisionEncoder

T = TypeVar("T")


class Job(Generic[T]):
    """Work that several threads may come to; the first of them does it.

    Attributes:
        future: what it returned or raised. To be taken before anyone comes to it: those who come later may do so much
            later, and must not keep the batch until then.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self.future: Future[T] = Future()
        self._work = work
        self._begun = Lock()

    def __call__(self) -> None:
        """Does the work, unless another thread has it already or nobody wants it any more."""
        if not self._begun.acquire(blocking=False):
            return
        work, future = self._work, self.future
        del self._work, self.future
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        finally:
            del work, future  # the error's traceback holds this frame


class LayerGaps:
    """The gaps between an encoder's blocks, and between the parts of an attention that takes long. Offered to from any
    thread; the jobs run on the encoder's own.

    Attributes:
        taken_s: seconds that jobs have taken so far.
    """

    def __init__(self, encoder: VisionEncoder) -> None:
        self.taken_s = 0.0
        self._jobs: deque[Callable[[], None]] = deque()
        self._inside = False
        for block in encoder.blocks:
            block.register_forward_pre_hook(lambda *_: self._take())
        encoder.attention.backend.pause = self._take

    def offer(self, job: Callable[[], None]) -> None:
        """``job`` runs in the next gap that is come to, if any is; it must not raise."""
        self._jobs.append(job)

    def _take(self) -> None:
        if self._inside or not self._jobs:
            return
        self._inside, began_s = True, time.perf_counter()
        try:
            while self._jobs:
                self._jobs.popleft()()
        finally:
            self._inside = False
            self.taken_s += time.perf_counter() - began_s
