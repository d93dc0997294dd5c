"""What is let in: budgets on everything that is pending, and deadlines that can be met. Pure: a clock passed in.

A request takes a :class:`Grant` before anything is done for it, says how many patches it makes once its headers were
read, and gives them back image by image. Until then it counts with as many as images lately made, so that no more
requests have their headers read than can be let in. Beyond a budget the answer is RESOURCE_EXHAUSTED at once, with the
time after which, at the rate that was measured, the budget has room again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from encoder_svc.engine.throughput import ThroughputMeter
from encoder_svc.errors import Reason, request_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc.errors import RequestError

_MIN_RETRY_S = 0.05
_MAX_RETRY_S = 60.0
# Of the mean over recent requests: what one request adds to it.
_MEAN_GAIN = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """Bounds on what is pending, from admission until an image is sent or has failed. An idle service takes one request
    of any size that the limits allow."""

    max_queued_patches: int
    max_inflight_images: int
    max_inflight_bytes: int


class Admission:
    """Keeps the budgets. Belongs to the event loop."""

    def __init__(self, budgets: Budgets, clock: Callable[[], float]) -> None:
        self.budgets = budgets
        self.meter = ThroughputMeter()
        self.pending_patches = 0
        self.expected_patches = 0
        self.pending_images = 0
        self.pending_bytes = 0
        self.num_requests = 0
        self._clock = clock
        self._mean_image_patches = 0.0
        self._mean_request_patches = 0.0

    def refusal_at_the_door(self) -> RequestError | None:
        """Why no request would be let in now; None if one may be. For refusing a call before its message is read."""
        budgets = self.budgets
        if not self.num_requests:
            return None
        if self.pending_images >= budgets.max_inflight_images:
            return self._full(Reason.INFLIGHT_IMAGES, "images", self.pending_images, budgets.max_inflight_images)
        if self.pending_bytes >= budgets.max_inflight_bytes:
            return self._full(Reason.INFLIGHT_BYTES, "bytes", self.pending_bytes, budgets.max_inflight_bytes)
        if self._has_no_room_for(self._mean_request_patches):
            return self._queue_full()
        return None

    def admit(self, *, num_images: int, num_bytes: int) -> Grant:
        """Lets a request in, before its images are looked at.

        Raises:
            RequestError: QUEUE_FULL, INFLIGHT_IMAGES or INFLIGHT_BYTES, each with ``retry_after_s``.
        """
        budgets = self.budgets
        if self.num_requests:
            if self._has_no_room_for(num_images * self._mean_image_patches):
                raise self._queue_full()
            if self.pending_images + num_images > budgets.max_inflight_images:
                raise self._full(Reason.INFLIGHT_IMAGES, "images", self.pending_images, budgets.max_inflight_images)
            if self.pending_bytes + num_bytes > budgets.max_inflight_bytes:
                raise self._full(Reason.INFLIGHT_BYTES, "bytes", self.pending_bytes, budgets.max_inflight_bytes)
        return Grant(self, num_images, num_bytes, round(num_images * self._mean_image_patches))

    def _has_no_room_for(self, expected_patches: float) -> bool:
        """By estimate. A queue that is not half full refuses nobody by it."""
        max_patches = self.budgets.max_queued_patches
        pending = self.pending_patches + self.expected_patches
        return pending >= max_patches or pending + min(expected_patches, max_patches / 2) > max_patches

    def _queue_full(self) -> RequestError:
        return self._full(Reason.QUEUE_FULL, "patches", self.pending_patches, self.budgets.max_queued_patches)

    def predicted_delay_s(self, num_patches: int) -> float:
        """How long a request of so many patches will take at the least, at the measured rate; 0 while none is known.

        Requests share the device fairly, so that one need not wait for all that is pending: of the others no more than
        its own patches each.
        """
        rate = self.meter.patches_per_s
        if rate is None:
            return 0.0
        return (min(self.pending_patches, num_patches * self.num_requests) + num_patches) / rate

    def check_room(self, num_patches: int, time_remaining_s: float) -> None:
        """
        Raises:
            RequestError: QUEUE_FULL, with ``retry_after_s``; or DEADLINE_EXCEEDED, if the time cannot suffice.
        """
        if self.pending_patches and self.pending_patches + num_patches > self.budgets.max_queued_patches:
            raise self._full(
                Reason.QUEUE_FULL,
                "patches",
                self.pending_patches,
                self.budgets.max_queued_patches,
                excess=self.pending_patches + num_patches - self.budgets.max_queued_patches,
            )
        delay_s = self.predicted_delay_s(num_patches)
        if delay_s > time_remaining_s:
            raise request_error(
                Reason.DEADLINE_EXCEEDED,
                f"The request would take about {delay_s:.1f} s now and has {max(time_remaining_s, 0.0):.1f} s left.",
            )

    def learn(self, num_images: int, num_patches: int) -> None:
        """Takes a request into the means that others are expected by. Images that were cached make no patches."""
        self._mean_image_patches += _MEAN_GAIN * (num_patches / num_images - self._mean_image_patches)
        self._mean_request_patches += _MEAN_GAIN * (num_patches - self._mean_request_patches)

    def changed(
        self, *, images: int = 0, num_bytes: int = 0, patches: int = 0, expected: int = 0, completed: bool = False
    ) -> None:
        """Books a change of what is pending. ``completed``: patches that left were encoded."""
        now_s = self._clock()
        if patches > 0:
            self.meter.begin(now_s)
        self.pending_images += images
        self.pending_bytes += num_bytes
        self.pending_patches += patches
        self.expected_patches += expected
        assert min(self.pending_images, self.pending_bytes, self.pending_patches, self.expected_patches) >= 0
        if patches < 0:
            self.meter.done(-patches if completed else 0, now_s, idle=not self.pending_patches)

    def _full(self, reason: Reason, what: str, pending: int, allowed: int, excess: int = 0) -> RequestError:
        rate = self.meter.patches_per_s
        wait_patches = excess or max(self.pending_patches // 10, 1)
        retry_s = min(max(wait_patches / rate if rate else 1.0, _MIN_RETRY_S), _MAX_RETRY_S)
        return request_error(
            reason,
            f"{pending} {what} are pending and at most {allowed} may be. Try again in about {retry_s:.2g} s, or on "
            "another replica.",
            retry_after_s=retry_s,
        )


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
        self._admission.changed(images=-self._images, num_bytes=-self._bytes, patches=-self._patches)
        self._admission.num_requests -= 1
        self._images = self._bytes = self._patches = 0

    def _expect_nothing(self) -> None:
        self._admission.changed(expected=-self._expected)
        self._expected = 0
