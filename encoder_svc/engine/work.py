"""An image on its way through the engine: its ticket, what comes of it, and how whoever waits for it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from encoder_svc.engine.scheduler import Ticket
from encoder_svc.errors import Reason, request_error

if TYPE_CHECKING:
    import asyncio

    from encoder_svc.engine.device import BatchResult
    from encoder_svc.images.types import EncoderImage


@dataclass(frozen=True, slots=True)
class EncodedItem:
    """One image's embeddings.

    Attributes:
        data: [rows, width] of the tower's dtype, as bytes: a view of its batch's memory, to be copied by who keeps it.
        queue_s: from the queue's door to the start of its batch.
        build_s, device_wait_s, h2d_s, resize_s, forward_s, d2h_s: of the batch it rode in; see observability/stages.py.
        split_s: to cut that batch into images.
        ended_s: when that was done, on the engine's clock.
    """

    data: memoryview
    queue_s: float
    build_s: float
    device_wait_s: float
    h2d_s: float
    resize_s: float
    forward_s: float
    d2h_s: float
    split_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Ride:
    """A batch's way through the device; its times are taken in the threads themselves."""

    result: BatchResult
    begun_s: float
    ended_s: float

    @property
    def device_wait_s(self) -> float:
        """What is none of the batch's own stages: the batch before it was at the device, or a thread was waited for."""
        result = self.result
        on_device_s = result.h2d_s + result.resize_s + result.forward_s + result.d2h_s
        named_s = result.build_s + on_device_s + result.split_s
        return max(self.ended_s - self.begun_s - named_s, 0.0)


@dataclass(eq=False, kw_only=True, slots=True)
class Work(Ticket):
    """A ticket, the image it stands for, and who waits for it."""

    image: EncoderImage
    result: asyncio.Future[EncodedItem]


def halves(batch: list[Work]) -> list[list[Work]]:
    """A batch of at least two, in two."""
    middle = len(batch) // 2
    return [batch[:middle], batch[middle:]]


def finish(batch: list[Work], ride: Ride) -> None:
    """Answers each image of a batch that came back."""
    result = ride.result
    for work, data in zip(batch, result.embeddings, strict=True):
        if data is None:
            fail([work], Reason.OUTPUT_NOT_FINITE, "The image's embeddings hold NaN or infinity.")
        elif not work.result.done():
            work.result.set_result(
                EncodedItem(
                    data,
                    queue_s=ride.begun_s - work.enqueued_s,
                    build_s=result.build_s,
                    device_wait_s=ride.device_wait_s,
                    h2d_s=result.h2d_s,
                    resize_s=result.resize_s,
                    forward_s=result.forward_s,
                    d2h_s=result.d2h_s,
                    split_s=result.split_s,
                    ended_s=ride.ended_s,
                )
            )


def fail(works: list[Work], reason: Reason, message: str) -> None:
    """Answers those that still wait with an error."""
    for work in works:
        if not work.result.done():
            work.result.set_exception(request_error(reason, message))


def fail_expired(works: list[Work]) -> None:
    """With DEADLINE_EXCEEDED."""
    fail(works, Reason.DEADLINE_EXCEEDED, "The deadline passed while the image waited for the device.")


def fail_broken(works: list[Work]) -> None:
    """With DEVICE_BROKEN."""
    for work in works:
        if not work.result.done():
            work.result.set_exception(device_broken())


def device_broken() -> Exception:
    """What everyone is told once the device is broken."""
    return request_error(Reason.DEVICE_BROKEN, "This replica's device is broken and it is shutting down; try another.")
