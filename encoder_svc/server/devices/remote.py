"""A device in a process of its own, as the engine sees it: batches go over a link, images and embeddings through memory
that both processes see."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from encoder_svc.engine.device import BatchResult
from encoder_svc.errors import AttentionKernelError
from encoder_svc.server.shared_images import copied, describe_image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    from encoder_svc.engine.device import Submitted
    from encoder_svc.images.types import EncoderImage
    from encoder_svc.transport.arena import Arena


# For the batch before to be let go, whose images a thread holds for a moment after its answer.
_ROOM_S: Final = 10.0


class GapsThere:
    """The process looks for gaps by itself: what is shorter than a batch that it has goes into the next."""

    def offer(self, job: Callable[[], None]) -> None:
        """See :class:`encoder_svc.engine.device.Gaps`. The device's thread gives it to the process at once anyway."""


class RemoteDevice:
    """See :class:`encoder_svc.engine.device.Runner`.

    Args:
        link: to the process, which has loaded the model.
        images: memory for what is given to it, and embeddings: for what comes back.
        row_bytes: of one embedding row; merge_size: the square root of how many patches make one.
    """

    def __init__(
        self,
        link: Connection,
        images: Arena,
        embeddings: Arena,
        *,
        row_bytes: int,
        merge_size: int,
    ) -> None:
        self.depth = 1
        self.gaps = GapsThere()
        self._link = link
        self._images = images
        self._embeddings = embeddings
        self._row_bytes = row_bytes
        self._merge_size = merge_size
        self._on_lost: Callable[[], object] = lambda: None
        self._lock = threading.Lock()
        self._is_lost = False
        self._last_batch = 0
        # By number: how many patches a batch has, and what becomes of it.
        self._waiting: dict[int, tuple[int, Future[dict[str, Any]]]] = {}
        self._listener = threading.Thread(target=self._listen, name="device-link", daemon=True)
        self._listener.start()

    def submit(self, images: Sequence[EncoderImage]) -> Submitted:
        """See :class:`encoder_svc.engine.device.Runner`; so with the next two."""
        given = [copied(image, self._images, _ROOM_S) for image in images]
        sizes = [image.grid.num_rows(self._merge_size) * self._row_bytes for image in images]
        blocks = self._embeddings.take_all(sizes)
        num_patches = sum(image.grid.num_patches for image in images)
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._is_lost:
                raise _gone()
            is_beside = any(num_patches < longer for longer, _ in self._waiting.values())
            self._last_batch += 1
            self._waiting[self._last_batch] = num_patches, answer
            message = {
                "batch": self._last_batch,
                "is_beside": is_beside,
                "images": [describe_image(image, self._images.offset) for image in given],
                "rows": [(self._embeddings.offset(block), block.nbytes) for block in blocks],
            }
            try:
                self._link.send_bytes(json.dumps(message).encode())
            except OSError:  # it ended just now; who listens will hear of it too
                self._is_lost = True
                raise _gone() from None
        return _Sent(answer, given, blocks)

    def is_out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)

    def is_broken(self) -> bool:
        return self._is_lost

    def call_when_lost(self, call: Callable[[], object]) -> None:
        """``call`` is called once, in a thread, when the process is gone."""
        with self._lock:
            self._on_lost, is_lost = call, self._is_lost
        if is_lost:
            call()

    def _listen(self) -> None:
        try:
            while True:
                message = json.loads(self._link.recv_bytes())
                with self._lock:
                    _, answer = self._waiting.pop(message["batch"])
                if "result" in message:
                    answer.set_result(message["result"])
                else:
                    answer.set_exception(_raised(**message["error"]))
        except (EOFError, OSError):
            with self._lock:
                self._is_lost = True
                lost, self._waiting = self._waiting, {}
                on_lost = self._on_lost
            try:
                on_lost()  # first: the batches' failure is no news then
            finally:
                for _, answer in lost.values():
                    answer.set_exception(_gone())


@dataclass(frozen=True, slots=True)
class _Sent:
    """A batch that the process has. ``given`` is what it reads, until it has answered."""

    answer: Future[dict[str, Any]]
    given: list[EncoderImage]
    blocks: list[memoryview]

    def wait_until_computed(self) -> None:
        """See :class:`encoder_svc.engine.device.Submitted`; so with the other."""
        self.answer.exception()

    def wait(self) -> BatchResult:
        result = self.answer.result()
        are_finite = result.pop("are_finite")
        rows = [
            block.toreadonly() if is_finite else None for block, is_finite in zip(self.blocks, are_finite, strict=True)
        ]
        return BatchResult(rows, **result)


def _raised(text: str, out_of_memory: bool, kernel: list[str] | None) -> Exception:
    """What the device raised, in its process."""
    if out_of_memory:
        return MemoryError(text)
    return AttentionKernelError(*kernel) if kernel is not None else RuntimeError(text)


def _gone() -> Exception:
    return RuntimeError("the process of the device ended")
