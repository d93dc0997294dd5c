"""Joins the scheduler and the device: the event loop schedules, one thread does nothing but run batches."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from encoder_svc.engine.scheduler import Scheduler, Ticket
from encoder_svc.errors import AttentionKernelError, Reason, request_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc.engine.runner import BatchResult, DeviceRunner
    from encoder_svc.images.types import ProcessedImage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodedItem:
    """One image's embeddings.

    Attributes:
        data: [rows, width] of the tower's dtype, as bytes.
        queue_s: from the queue's door to the start of its batch.
        h2d_s, forward_s, d2h_s: of the batch it rode in.
    """

    data: memoryview
    queue_s: float
    h2d_s: float
    forward_s: float
    d2h_s: float


@dataclass(eq=False, kw_only=True, slots=True)
class Work(Ticket):
    """A ticket, the image it stands for, and who waits for it."""

    image: ProcessedImage
    result: asyncio.Future[EncodedItem]


class Engine:
    """Encodes images in batches. Lives on one event loop; the queue belongs to it."""

    def __init__(
        self, runner: DeviceRunner, scheduler: Scheduler[Work], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._clock = clock
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._running: asyncio.Task[None] | None = None

    @property
    def queued_patches(self) -> int:
        """Patches that wait for the device."""
        return self._scheduler.queued_patches

    async def encode(self, image: ProcessedImage, *, timeout_s: float = math.inf) -> EncodedItem:
        """Encodes one image, together with whatever else waits.

        Cancelling the caller takes the image out of the queue, if its batch has not begun.

        Args:
            timeout_s: how long it may wait for its batch.

        Raises:
            RequestError: QUEUE_FULL, DEADLINE_EXCEEDED or ENCODER_FAILED.
        """
        now_s = self._clock()
        work = Work(
            num_patches=image.grid.num_patches,
            deadline_s=now_s + timeout_s,
            enqueued_s=now_s,
            image=image,
            result=asyncio.get_running_loop().create_future(),
        )
        if not self._scheduler.add(work):
            raise request_error(
                Reason.QUEUE_FULL,
                f"{self._scheduler.queued_patches} patches wait already; at most "
                f"{self._scheduler.max_queued_patches} may. Try again later or on another replica.",
            )
        self._wake()
        try:
            return await work.result
        except asyncio.CancelledError:
            self._scheduler.remove(work)
            raise

    async def aclose(self) -> None:
        """Waits for the batch that runs and ends the device thread. Nothing may be encoded afterwards."""
        if self._running is not None:
            await asyncio.wait([self._running])
        self._device.shutdown()

    def _wake(self) -> None:
        if self._running is None or self._running.done():
            self._running = asyncio.get_running_loop().create_task(self._run_until_empty())

    async def _run_until_empty(self) -> None:
        while len(self._scheduler):
            batch, expired = self._scheduler.next_batch(self._clock())
            _fail(expired, Reason.DEADLINE_EXCEEDED, "The deadline passed while the image waited for the device.")
            if batch:
                await self._run(batch)

    async def _run(self, batch: list[Work]) -> None:
        started_s = self._clock()
        images = [work.image for work in batch]
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._device, self._runner.run, images)
        except AttentionKernelError as error:
            logger.exception("a batch of %d images failed on the device: %s", len(images), error.why)
            _fail(batch, Reason.ENCODER_FAILED, str(error))
            return
        except Exception:
            logger.exception("a batch of %d images failed on the device", len(images))
            _fail(batch, Reason.ENCODER_FAILED, "The encoder failed on the batch that held this image.")
            return
        _finish(batch, result, started_s)


def _finish(batch: list[Work], result: BatchResult, started_s: float) -> None:
    for work, data in zip(batch, result.embeddings, strict=True):
        if not work.result.done():
            work.result.set_result(
                EncodedItem(data, started_s - work.enqueued_s, result.h2d_s, result.forward_s, result.d2h_s)
            )


def _fail(works: list[Work], reason: Reason, message: str) -> None:
    for work in works:
        if not work.result.done():
            work.result.set_exception(request_error(reason, message))
