"""Joins the scheduler and the device: the event loop schedules, one thread does nothing but submit batches."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from encoder_svc.engine.gaps import Job
from encoder_svc.engine.places import Places
from encoder_svc.engine.work import (
    Ride,
    Work,
    device_broken,
    fail,
    fail_broken,
    fail_expired,
    finish,
    halves,
)
from encoder_svc.errors import AttentionKernelError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Hashable

    from encoder_svc.engine.device import BatchResult, Runner, Submitted
    from encoder_svc.engine.gaps import LayerGaps
    from encoder_svc.engine.places import Place
    from encoder_svc.engine.scheduler import Scheduler
    from encoder_svc.engine.work import EncodedItem
    from encoder_svc.images.types import EncoderImage
    from encoder_svc.observability.device import DeviceWatch

logger = logging.getLogger(__name__)

# What goes at once between the layers of an image that is being encoded holds at most so small a part of its patches.
_GAP_PART = 4


class Engine:
    """Encodes images in batches. Lives on one event loop; the queue belongs to it.

    Args:
        watchdog_s: a batch that takes longer hangs, and with it the device.
        watch: is told of every batch.

    Attributes:
        watch: as given.
        broken: set once the device can encode nothing any more. What waits then has failed; the process should end.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler[Work],
        *,
        watch: DeviceWatch,
        watchdog_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.broken = asyncio.Event()
        self._runner = runner
        self._scheduler = scheduler
        self._scheduler.separates = runner.gaps is not None
        self.watch = watch
        self._watchdog_s = watchdog_s
        self._clock = clock
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._waiters = ThreadPoolExecutor(max_workers=runner.depth, thread_name_prefix="device-wait")
        self._places = Places(runner.depth)
        self._pump: asyncio.Task[None] | None = None
        self._batches: set[asyncio.Task[None]] = set()
        self._largest_running = 0
        self._gap_patches = 0
        self._in_gap: asyncio.Task[None] | None = None

    @property
    def queued_patches(self) -> int:
        """Patches that wait for the device."""
        return self._scheduler.queued_patches

    @property
    def queued_images(self) -> int:
        """Images that wait for the device."""
        return len(self._scheduler)

    async def encode(self, image: EncoderImage, *, flow: Hashable = None, timeout_s: float = math.inf) -> EncodedItem:
        """Encodes one image, together with whatever else waits.

        Cancelling the caller takes the image out of the queue, if its batch has not begun.

        Args:
            flow: what it shares its turn with; see engine/scheduler.py.
            timeout_s: how long it may wait for its batch.

        Raises:
            RequestError: DEADLINE_EXCEEDED, OUTPUT_NOT_FINITE, DEVICE_OUT_OF_MEMORY, ENCODER_FAILED or DEVICE_BROKEN.
        """
        if self.broken.is_set():
            raise device_broken()
        now_s = self._clock()
        work = Work(
            num_patches=image.grid.num_patches,
            flow=flow,
            deadline_s=now_s + timeout_s,
            enqueued_s=now_s,
            image=image,
            result=asyncio.get_running_loop().create_future(),
        )
        self._scheduler.add(work)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run_until_empty())
        self._places.look_again()
        self._fill_gap()
        try:
            return await work.result
        except asyncio.CancelledError:
            self._scheduler.remove(work)
            raise

    async def aclose(self) -> None:
        """Waits for the batches that run and ends the device's threads. Nothing may be encoded afterwards."""
        if self._pump is not None and not self.broken.is_set():
            await asyncio.wait([self._pump])
        if self._batches and not self.broken.is_set():
            await asyncio.wait(self._batches)
        # The thread of a device that hangs never ends; the process has to.
        self._device.shutdown(wait=not self.broken.is_set())
        self._waiters.shutdown(wait=not self.broken.is_set())

    async def _run_until_empty(self) -> None:
        while len(self._scheduler):
            place = await self._places.take(self._scheduler.has_full_batch)
            batch, expired = self._scheduler.next_batch(self._clock())
            fail_expired(expired)
            if not batch:
                place.end()
                continue
            self._keep(self._run_in_place(batch, place))
            await asyncio.sleep(0)  # it begins

    def _keep(self, running: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(running)
        self._batches.add(task)
        task.add_done_callback(self._batches.discard)
        return task

    async def _run_in_place(self, batch: list[Work], place: Place) -> None:
        self._largest_running = self._gap_patches = max(work.num_patches for work in batch)
        self._fill_gap()
        try:
            await self._run(batch, place.computed)
        finally:
            self._largest_running = 0
            place.end()

    def _fill_gap(self) -> None:
        """Lets what is short beside an image that is being encoded go between its layers, up to that image's length."""
        if self._runner.gaps is None or self._in_gap is not None or self.broken.is_set():
            return
        at_most_patches = min(self._largest_running // _GAP_PART, self._gap_patches)
        batch, expired = self._scheduler.next_batch(self._clock(), at_most_patches)
        fail_expired(expired)
        if batch:
            self._gap_patches -= sum(work.num_patches for work in batch)
            self._in_gap = self._keep(self._run_in_gap(batch, self._runner.gaps))

    async def _run_in_gap(self, batch: list[Work], gaps: LayerGaps) -> None:
        try:
            await self._run(batch, lambda: None, gaps)
        finally:
            self._in_gap = None
            self._fill_gap()

    async def _run(self, batch: list[Work], computed: Callable[[], None], gaps: LayerGaps | None = None) -> None:
        """Runs a batch and answers its images. One that fails is run again in parts, so that only the images fail that
        cannot be encoded.

        Args:
            computed: called once the device works on it no longer, while the embeddings are on their way.
            gaps: it need not wait for the batch that runs.
        """
        batch = [work for work in batch if not work.result.done()]
        if self.broken.is_set():
            fail_broken(batch)
        if self.broken.is_set() or not batch:
            return
        ended = partial(
            self.watch.end,
            self.watch.begin(),
            num_images=len(batch),
            num_patches=sum(work.num_patches for work in batch),
        )
        try:
            async with asyncio.timeout(self._watchdog_s if self._watchdog_s < math.inf else None):
                ride = await self._through_device(batch, computed, gaps)
        except TimeoutError:
            ended("hung")
            self._break(f"a batch of {len(batch)} images did not end within {self._watchdog_s:g} s")
            fail_broken(batch)
        except Exception as error:
            out_of_memory = self._runner.is_out_of_memory(error)
            ended("out_of_memory" if out_of_memory else "failed")
            if out_of_memory and gaps is not None:
                await self._run(batch, computed)  # a large image had the memory then: it says nothing of this batch
            else:
                await self._recover(batch, computed, error)
        else:
            ended(
                "encoded", busy_s=ride.result.resize_s + ride.result.forward_s, padding_ratio=ride.result.padding_ratio
            )
            finish(batch, ride)

    async def _through_device(self, batch: list[Work], computed: Callable[[], None], gaps: LayerGaps | None) -> Ride:
        loop = asyncio.get_running_loop()
        job = Job(partial(self._submit, [work.image for work in batch]))
        with self._places.packing():
            self._device.submit(job)
            if gaps is not None:
                gaps.offer(job)
            begun_s, submitted = await asyncio.wrap_future(job.future)
        computed_there = partial(loop.call_soon_threadsafe, computed)
        result, ended_s = await loop.run_in_executor(self._waiters, self._wait, submitted, computed_there)
        return Ride(result, begun_s, ended_s)

    def _submit(self, images: list[EncoderImage]) -> tuple[float, Submitted]:
        begun_s = self._clock()
        return begun_s, self._runner.submit(images)

    def _wait(self, submitted: Submitted, computed: Callable[[], object]) -> tuple[BatchResult, float]:
        submitted.wait_until_computed()
        computed()
        result = submitted.wait()
        return result, self._clock()

    async def _recover(self, batch: list[Work], computed: Callable[[], None], error: Exception) -> None:
        out_of_memory = self._runner.is_out_of_memory(error)
        patches = sum(work.num_patches for work in batch)
        if out_of_memory:
            logger.warning("a batch of %d images, %d patches, did not fit the device's memory", len(batch), patches)
        else:
            logger.error("a batch of %d images failed on the device", len(batch), exc_info=error)
            loop = asyncio.get_running_loop()
            if await loop.run_in_executor(self._device, self._runner.is_broken):
                self._break("the device answers nothing but errors")
                fail_broken(batch)
                return
        if len(batch) > 1:
            if out_of_memory:
                self._scheduler.max_batch_patches = max(min(self._scheduler.max_batch_patches, patches) // 2, 1)
                logger.warning("batches hold %d patches at most from now on", self._scheduler.max_batch_patches)
            for part in halves(batch) if out_of_memory else [[work] for work in batch]:
                await self._run(part, computed)
        elif out_of_memory:
            fail(batch, Reason.DEVICE_OUT_OF_MEMORY, "The image does not fit the device's free memory.")
        else:
            # The kernel's own name is the operator's to know, and the caller's to report.
            said = str(error) if isinstance(error, AttentionKernelError) else "The encoder failed on this image."
            fail(batch, Reason.ENCODER_FAILED, said)

    def _break(self, why: str) -> None:
        logger.critical("the device is broken: %s", why)
        self.broken.set()
        while len(self._scheduler):
            batch, expired = self._scheduler.next_batch(self._clock())
            fail_broken(batch + expired)
