"""What is pending, the budgets on it, and the refusals of what is beyond them. Pure, and so small that another process
can be shown it (server/frontends/door.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from encoder_svc.errors import Reason, request_error

if TYPE_CHECKING:
    from encoder_svc.errors import RequestError

_MIN_RETRY_S = 0.05
_MAX_RETRY_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """Bounds on what is pending, from admission until an image is sent or has failed. An idle service takes one request
    of any size that the limits allow."""

    max_queued_patches: int
    max_inflight_images: int
    max_inflight_bytes: int


class Load(NamedTuple):
    """What is pending, and what one more request is likely to bring: all that it takes to refuse one unread."""

    num_requests: float = 0
    pending_images: float = 0
    pending_bytes: float = 0
    pending_patches: float = 0
    expected_patches: float = 0
    mean_request_patches: float = 0
    patches_per_s: float = 0
    foreseen_patches: float = 0

    def refusal_at_the_door(self, budgets: Budgets) -> RequestError | None:
        """Why no request would be let in now; None if one may be. For refusing a call before its message is read."""
        if not self.num_requests:
            return None
        if self.pending_images >= budgets.max_inflight_images:
            return self.images_full(budgets)
        if self.pending_bytes >= budgets.max_inflight_bytes:
            return self.bytes_full(budgets)
        if not self.has_room_for(self.mean_request_patches, budgets):
            return self.probably_full(self.mean_request_patches, budgets)
        return None

    def has_room_for(self, expected_patches: float, budgets: Budgets) -> bool:
        """By estimate. A queue that is not half full refuses nobody by it."""
        max_patches = budgets.max_queued_patches
        pending = self.pending_patches + self.expected_patches
        return pending < max_patches and pending + min(expected_patches, max_patches / 2) <= max_patches

    def is_half_empty(self, budgets: Budgets, *, num_requests: int, num_images: int, num_bytes: int) -> bool:
        """Whether requests may have their headers read before they are let in: they are unlikely to be refused.

        Args:
            num_requests: those that do, and what they hold.
        """
        expected_patches = self.expected_patches + num_requests * self.mean_request_patches
        return (
            self.pending_images + num_images <= budgets.max_inflight_images / 2
            and self.pending_bytes + num_bytes <= budgets.max_inflight_bytes / 2
            and self.pending_patches + expected_patches <= budgets.max_queued_patches / 2
        )

    def images_full(self, budgets: Budgets, num_images: int = 0) -> RequestError:
        """That so many more images are too many. Without them: that there are too many already; so with bytes."""
        pending, allowed = self.pending_images, budgets.max_inflight_images
        return self._full(Reason.INFLIGHT_IMAGES, "images", pending, num_images, allowed)

    def bytes_full(self, budgets: Budgets, num_bytes: int = 0) -> RequestError:
        """See :meth:`images_full`."""
        return self._full(Reason.INFLIGHT_BYTES, "bytes", self.pending_bytes, num_bytes, budgets.max_inflight_bytes)

    def queue_full(self, num_patches: int, budgets: Budgets) -> RequestError:
        """That so many more patches are too many, with the time until the excess is done."""
        pending, allowed = self.pending_patches, budgets.max_queued_patches
        excess_patches = pending + num_patches - allowed
        return self._full(Reason.QUEUE_FULL, "patches", pending, num_patches, allowed, wait_patches=excess_patches)

    def probably_full(self, expected_patches: float, budgets: Budgets) -> RequestError:
        """See :meth:`has_room_for`."""
        pending, allowed = self.pending_patches + self.expected_patches, budgets.max_queued_patches
        return self._full(Reason.QUEUE_FULL, "patches", pending, math.ceil(expected_patches), allowed, about="about ")

    def _full(
        self,
        reason: Reason,
        what: str,
        pending: float,
        more: int,
        allowed: int,
        *,
        about: str = "",
        wait_patches: float = 0,
    ) -> RequestError:
        """That a budget is.

        Args:
            wait_patches: until these are done it stays so; 0: a tenth of what is pending. The delay is that of as many
                as the rate says something of.
        """
        if pending < allowed:
            why = f"{about}{pending:.0f} {what} pending, this request adds {about}{more}, and {allowed} are allowed"
        else:  # one request of any size is taken, so that there may be more
            why = f"{about}{pending:.0f} {what} pending, and no more are taken until there are fewer than {allowed}"
        wait_patches = wait_patches or max(self.pending_patches // 10, 1)
        retry_s = min(wait_patches, self.foreseen_patches) / self.patches_per_s if self.patches_per_s else 1.0
        retry_s = min(max(retry_s, _MIN_RETRY_S), _MAX_RETRY_S)
        return request_error(
            reason,
            f"There are {why}. Try again in about {retry_s:.2g} s, or on another replica.",
            retry_after_s=retry_s,
        )
