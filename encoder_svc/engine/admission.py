"""What is let in: budgets on everything that is pending, and deadlines that can be met. Pure: a clock passed in.

A request takes a :class:`Grant` before anything is done for it, says how many patches it makes once its headers were
read, and gives them back image by image. Until then it counts with as many as images lately made, so that no more
requests have their headers read than can be let in. Beyond a budget the answer is RESOURCE_EXHAUSTED at once, with the
time after which, at the rate that was measured, the budget has room again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from encoder_svc.engine.load import Load
from encoder_svc.engine.throughput import ThroughputMeter
from encoder_svc.errors import Reason, request_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc.engine.load import Budgets
    from encoder_svc.errors import RequestError

# Of the mean over recent requests: what one request adds to it.
_MEAN_GAIN = 0.05


class Admission:
    """Keeps the budgets. Belongs to the event loop.

    Attributes:
        on_change: told of the load whenever it changes.
    """

    def __init__(self, budgets: Budgets, clock: Callable[[], float]) -> None:
        self.budgets = budgets
        self.on_change: Callable[[Load], None] | None = None
        self.meter = ThroughputMeter()
        self.pending_patches = 0
        self.expected_patches = 0
        self.pending_images = 0
        self.pending_bytes = 0
        self.num_requests = 0
        self._clock = clock
        self._mean_image_patches = 0.0
        self._mean_request_patches = 0.0

    def load(self) -> Load:
        """This moment's."""
        return Load(
            self.num_requests,
            self.pending_images,
            self.pending_bytes,
            self.pending_patches,
            self.expected_patches,
            self._mean_request_patches,
            self.meter.patches_per_s or 0.0,
            self.meter.foreseen_patches,
        )

    def refusal_at_the_door(self) -> RequestError | None:
        """See :meth:`Load.refusal_at_the_door`."""
        return self.load().refusal_at_the_door(self.budgets)

    def admit(self, *, num_images: int, num_bytes: int) -> Grant:
        """Lets a request in, before its images are looked at.

        Raises:
            RequestError: QUEUE_FULL, INFLIGHT_IMAGES or INFLIGHT_BYTES, each with ``retry_after_s``.
        """
        budgets, load = self.budgets, self.load()
        if self.num_requests:
            expected_patches = num_images * self._mean_image_patches
            if not load.has_room_for(expected_patches, budgets):
                raise load.probably_full(expected_patches, budgets)
            if self.pending_images + num_images > budgets.max_inflight_images:
                raise load.images_full(budgets, num_images)
            if self.pending_bytes + num_bytes > budgets.max_inflight_bytes:
                raise load.bytes_full(budgets, num_bytes)
        return Grant(self, num_images, num_bytes, round(num_images * self._mean_image_patches))

    def predicted_delay_s(self, num_patches: int) -> float:
        """How long a request of so many patches will take at the least, at the measured rate; 0 while none is known.

        Requests share the device fairly, so that one need not wait for all that is pending: of the others no more than
        its own patches each.
        """
        return self.meter.least_s(min(self.pending_patches, num_patches * self.num_requests) + num_patches)

    def check_room(self, num_patches: int, time_remaining_s: float) -> None:
        """
        Raises:
            RequestError: QUEUE_FULL, with ``retry_after_s``; or DEADLINE_EXCEEDED, if the time cannot suffice.
        """
        if self.pending_patches and self.pending_patches + num_patches > self.budgets.max_queued_patches:
            raise self.load().queue_full(num_patches, self.budgets)
        delay_s = self.predicted_delay_s(num_patches)
        if delay_s > time_remaining_s:
            raise request_error(
                Reason.DEADLINE_EXCEEDED,
                f"The request would take about {_duration(delay_s)} now and has "
                f"{_duration(max(time_remaining_s, 0.0))} left.",
            )

    def learn(self, num_images: int, num_patches: int) -> None:
        """Takes a request into the means that others are expected by. Images that were cached make no patches."""
        self._mean_image_patches += _MEAN_GAIN * (num_patches / num_images - self._mean_image_patches)
        self._mean_request_patches += _MEAN_GAIN * (num_patches - self._mean_request_patches)

    def changed(
        self, *, images: int = 0, num_bytes: int = 0, patches: int = 0, expected: int = 0, completed: bool = False
    ) -> None:
        """Books a change of what is pending. ``completed``: patches that left were encoded."""
        if patches:
            self.meter.pass_time(self._clock(), self.pending_patches)
        self.pending_images += images
        self.pending_bytes += num_bytes
        self.pending_patches += patches
        self.expected_patches += expected
        assert min(self.pending_images, self.pending_bytes, self.pending_patches, self.expected_patches) >= 0
        if patches < 0:
            self.meter.leave(-patches, done=completed)
        if self.on_change is not None:
            self.on_change(self.load())


class Grant:
    """One request's share of the budgets. Close it when the request ends, however it ends."""

    def __init__(self, admission: Admission, num_images: int, num_bytes: int, expected_patches: int) -> None:
        self._admission = admission
        self._images = num_images
        self._bytes = num_bytes
        self._expected = expected_patches
        self._patches = 0
        admission.num_requests += 1
        admission.changed(images=num_images, num_bytes=num_bytes, expected=expected_patches)

    def reserve(self, num_patches: int, time_remaining_s: float) -> None:
        """Takes room for the request's patches, once they are known.

        Raises:
            RequestError: QUEUE_FULL or DEADLINE_EXCEEDED; the grant is to be closed then.
        """
        self._expect_nothing()
        self._admission.learn(self._images, num_patches)
        self._admission.check_room(num_patches, time_remaining_s)
        self._patches += num_patches
        self._admission.changed(patches=num_patches)

    def image_done(self, num_patches: int, *, completed: bool) -> None:
        """Gives back one image and its patches. ``completed``: they went through the encoder."""
        self._images -= 1
        self._patches -= num_patches
        self._admission.changed(images=-1, patches=-num_patches, completed=completed)

    def close(self) -> None:
        """Gives back whatever is left."""
        self._expect_nothing()
        self._admission.num_requests -= 1
        self._admission.changed(images=-self._images, num_bytes=-self._bytes, patches=-self._patches)
        self._images = self._bytes = self._patches = 0

    def _expect_nothing(self) -> None:
        self._admission.changed(expected=-self._expected)
        self._expected = 0


def _duration(seconds: float) -> str:
    """For a person: in milliseconds while seconds would say nothing."""
    milliseconds = seconds * 1e3
    if milliseconds >= 10_000:
        return f"{seconds:.1f} s"
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.1f} ms"
