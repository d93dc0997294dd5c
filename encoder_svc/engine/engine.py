"""Joins the scheduler and the devices: there is one queue, and each device has a lane out of it (engine/lane.py)."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING

from encoder_svc.engine.lane import Lane
from encoder_svc.engine.work import Work, device_broken, fail_broken, fail_expired

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from encoder_svc.engine.device import Runner
    from encoder_svc.engine.scheduler import Scheduler
    from encoder_svc.engine.work import EncodedItem
    from encoder_svc.images.types import EncoderImage
    from encoder_svc.observability.device import DeviceWatch

logger = logging.getLogger(__name__)


class Engine:
    """Encodes images in batches. Lives on one event loop; the queue belongs to it.

    Args:
        runners: the devices, alike: any of them may encode any image.
        watchdog_s: a batch that takes longer hangs, and with it its device.
        watch: is told of every batch.

    Attributes:
        watch: as given.
        broken: set once a device can encode nothing any more. What waits then has failed; the process should end.
    """

    def __init__(
        self,
        runners: Sequence[Runner],
        scheduler: Scheduler[Work],
        *,
        watch: DeviceWatch,
        watchdog_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.broken = asyncio.Event()
        self.watch = watch
        self._scheduler = scheduler
        self._scheduler.separates = any(runner.gaps is not None for runner in runners)
        self._clock = clock
        self._lanes = [
            Lane(number, runner, self, watch=watch, watchdog_s=watchdog_s, clock=clock)
            for number, runner in enumerate(runners)
        ]

    @property
    def queued_patches(self) -> int:
        """Patches that wait for a device."""
        return self._scheduler.queued_patches

    @property
    def queued_images(self) -> int:
        """Images that wait for a device."""
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
        for lane in self._lanes:
            lane.look()
        if not any(lane.is_idle for lane in self._lanes):
            for lane in self._lanes:
                lane.fill_gap()
        try:
            return await work.result
        except asyncio.CancelledError:
            self._scheduler.remove(work)
            raise
        finally:
            del work  # it has the error, whose traceback has this frame

    async def aclose(self) -> None:
        """Waits for the batches that run and ends the devices' threads. Nothing may be encoded afterwards."""
        for lane in self._lanes:
            await lane.aclose()

    def is_empty(self) -> bool:
        """See :class:`encoder_svc.engine.lane.Queue`; so with all of these."""
        return not len(self._scheduler)

    def has_full_batch(self) -> bool:
        return self._scheduler.has_full_batch()

    def next_batch(self, at_most_patches: int | None = None) -> list[Work]:
        num_idle = sum(lane.is_idle for lane in self._lanes)
        batch, expired = self._scheduler.next_batch(self._clock(), at_most_patches, num_sharers=max(num_idle, 1))
        fail_expired(expired)
        return batch

    def shrink_batches(self, num_patches: int) -> None:
        self._scheduler.max_batch_patches = max(min(self._scheduler.max_batch_patches, num_patches) // 2, 1)
        logger.warning("batches hold %d patches at most from now on", self._scheduler.max_batch_patches)

    def give_up(self, why: str) -> None:
        if not self.broken.is_set():  # several may find it out
            logger.critical("the device is broken: %s", why)
        self.broken.set()
        while len(self._scheduler):
            batch, expired = self._scheduler.next_batch(self._clock())
            fail_broken(batch + expired)
