"""One device: the thread that submits its batches, those in flight, and what goes beside a long one."""

from __future__ import annotations

import asyncio
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Protocol

from encoder_svc.engine.gaps import Job
from encoder_svc.engine.places import Places
from encoder_svc.engine.work import Ride, fail, fail_broken, finish, halves
from encoder_svc.errors import AttentionKernelError, Reason, without_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from encoder_svc.engine.device import BatchResult, Gaps, Runner, Submitted
    from encoder_svc.engine.places import Place
    from encoder_svc.engine.work import Work
    from encoder_svc.images.types import EncoderImage
    from encoder_svc.observability.device import DeviceWatch

logger = logging.getLogger(__name__)

# What goes at once between the layers of an image that is being encoded holds at most so small a part of its patches.
_GAP_PART = 4


class Queue(Protocol):
    """What waits for the devices, as each of them sees it."""

    broken: asyncio.Event

    def is_empty(self) -> bool:
        """Whether nothing waits."""

    def has_full_batch(self) -> bool:
        """Whether as much waits as one batch may hold."""

    def next_batch(self, at_most_patches: int | None = None) -> list[Work]:
        """Takes a batch off it; empty if nothing waits that may go. What is out of time is answered."""

    def shrink_batches(self, num_patches: int) -> None:
        """A batch of so many patches did not fit a device: none shall be more than half as large from now on."""

    def give_up(self, why: str) -> None:
        """A device is broken."""


class Lane:
    """Takes batches for one device whenever it can have one. Lives on the event loop.

    Args:
        number: of the device; its threads are named after it.
        watch: is told of every batch.
        watchdog_s: a batch that takes longer hangs, and with it the device.
    """

    def __init__(
        self,
        number: int,
        runner: Runner,
        queue: Queue,
        *,
        watch: DeviceWatch,
        watchdog_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._runner = runner
        self._queue = queue
        self._watch = watch
        self._watchdog_s = watchdog_s
        self._clock = clock
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"device-{number}")
        num_waited_for = runner.depth + (runner.gaps is not None)
        self._waiters = ThreadPoolExecutor(max_workers=num_waited_for, thread_name_prefix=f"device-{number}-wait")
        self._places = Places(runner.depth)
        self._pump: asyncio.Task[None] | None = None
        self._batches: set[asyncio.Task[None]] = set()
        self._largest_running = 0
        self._gap_patches = 0
        self._in_gap: asyncio.Task[None] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it has no batch."""
        return not self._batches

    def look(self) -> None:
        """Something waits that did not before."""
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run_until_empty())
        self._places.look_again()

    def fill_gap(self) -> None:
        """Lets what is short beside an image that is being encoded go between its layers, up to that image's length."""
        if self._runner.gaps is None or self._in_gap is not None or self._queue.broken.is_set():
            return
        at_most_patches = min(self._largest_running // _GAP_PART, self._gap_patches)
        batch = self._queue.next_batch(at_most_patches)
        if batch:
            self._gap_patches -= sum(work.num_patches for work in batch)
            self._in_gap = self._keep(self._run_in_gap(batch, self._runner.gaps))

    async def aclose(self) -> None:
        """Waits for the batches that run and ends the device's threads."""
        if self._pump is not None and not self._queue.broken.is_set():
            await asyncio.wait([self._pump])
        if self._batches and not self._queue.broken.is_set():
            await asyncio.wait(self._batches)
        # The thread of a device that hangs never ends; the process has to.
        self._device.shutdown(wait=not self._queue.broken.is_set())
        self._waiters.shutdown(wait=not self._queue.broken.is_set())

    async def _run_until_empty(self) -> None:
        while not self._queue.is_empty():
            place = await self._places.take(self._queue.has_full_batch)
            batch = self._queue.next_batch()
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
        self.fill_gap()
        try:
            await self._run(batch, place.computed)
        finally:
            self._largest_running = 0
            place.end()

    async def _run_in_gap(self, batch: list[Work], gaps: Gaps) -> None:
        try:
            await self._run(batch, lambda: None, gaps)
        finally:
            self._in_gap = None
            self.fill_gap()

    async def _run(self, batch: list[Work], computed: Callable[[], None], gaps: Gaps | None = None) -> None:
        """Runs a batch and answers its images. One that fails is run again in parts, so that only the images fail that
        cannot be encoded.

        Args:
            computed: called once the device works on it no longer, while the embeddings are on their way.
            gaps: it need not wait for the batch that runs.
        """
        batch = [work for work in batch if not work.result.done()]
        if self._queue.broken.is_set():
            fail_broken(batch)
        if self._queue.broken.is_set() or not batch:
            return
        ended = partial(
            self._watch.end,
            self._watch.begin(),
            num_images=len(batch),
            num_patches=sum(work.num_patches for work in batch),
        )
        try:
            async with asyncio.timeout(self._watchdog_s if self._watchdog_s < math.inf else None):
                ride = await self._through_device(batch, computed, gaps)
        except TimeoutError:
            ended("hung")
            self._queue.give_up(f"a batch of {len(batch)} images did not end within {self._watchdog_s:g} s")
            fail_broken(batch)
        except Exception as error:
            out_of_memory = self._runner.is_out_of_memory(error)
            ended("out_of_memory" if out_of_memory else "failed")
            if not out_of_memory and not self._queue.broken.is_set():  # which has been said
                logger.error("a batch of %d images failed on the device", len(batch), exc_info=error)
            without_frames(error)  # they hold what the batch took of the device's memory, which its parts need
            if out_of_memory and gaps is not None:
                await self._run(batch, computed)  # a large image had the memory then: it says nothing of this batch
            else:
                await self._recover(batch, computed, error)
        else:
            ended(
                "encoded", busy_s=ride.result.resize_s + ride.result.forward_s, padding_ratio=ride.result.padding_ratio
            )
            finish(batch, ride)

    async def _through_device(self, batch: list[Work], computed: Callable[[], None], gaps: Gaps | None) -> Ride:
        loop = asyncio.get_running_loop()
        job = Job(partial(self._submit, [work.image for work in batch]))
        given = asyncio.wrap_future(job.future)
        with self._places.packing():
            self._device.submit(job)
            if gaps is not None:
                gaps.offer(job)
            begun_s, submitted = await given
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
        if self._queue.broken.is_set():
            fail_broken(batch)
            return
        out_of_memory = self._runner.is_out_of_memory(error)
        patches = sum(work.num_patches for work in batch)
        if out_of_memory:
            logger.warning("a batch of %d images, %d patches, did not fit the device's memory", len(batch), patches)
        else:
            loop = asyncio.get_running_loop()
            if await loop.run_in_executor(self._device, self._runner.is_broken):
                self._queue.give_up("the device answers nothing but errors")
                fail_broken(batch)
                return
        if len(batch) > 1:
            if out_of_memory:
                self._queue.shrink_batches(patches)
            for part in halves(batch) if out_of_memory else [[work] for work in batch]:
                await self._run(part, computed)
        elif out_of_memory:
            fail(batch, Reason.DEVICE_OUT_OF_MEMORY, "The image does not fit the device's free memory.")
        else:
            # The kernel's own name is the operator's to know, and the caller's to report.
            said = str(error) if isinstance(error, AttentionKernelError) else "The encoder failed on this image."
            fail(batch, Reason.ENCODER_FAILED, said)
