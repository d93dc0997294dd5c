"""What the device is at: how busy it is, and whether anything still comes back from it."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc.observability.metrics import Metrics

_DUTY_WINDOW_S: Final = 15.0


class DeviceWatch:
    """Told of every batch; belongs to the event loop. A scrape's thread may read it.

    Args:
        num_devices: that batches are given to, alike: how busy they are is said of them in the mean.

    Attributes:
        last_progress_s: seconds since 1970 at which a batch last came back; that of the start until one has.
    """

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic, *, num_devices: int = 1) -> None:
        self.last_progress_s = time.time()
        self._metrics = metrics
        self._clock = clock
        self._num_devices = num_devices
        self._begun_s: dict[int, float] = {}
        self._num_begun = 0
        # Busy seconds, forgotten exponentially; in the long run of a full device they are the window's length.
        self._busy_s = 0.0
        self._forgotten_until_s = clock()

    @property
    def batch_age_s(self) -> float:
        """For how long the oldest batch has been with the device; 0 if there is none."""
        begun_s = min(self._begun_s.copy().values(), default=None)
        return 0.0 if begun_s is None else self._clock() - begun_s

    @property
    def busy_ratio(self) -> float:
        """The share of the last fifteen seconds or so that was spent in forward passes, 0 to 1."""
        return min(self._remembered_s(self._clock()) / _DUTY_WINDOW_S, 1.0)

    def begin(self) -> int:
        """A batch is given to the device. Returns the number to end it by."""
        self._num_begun += 1
        self._begun_s[self._num_begun] = self._clock()
        return self._num_begun

    def end(
        self,
        batch: int,
        outcome: str,
        *,
        num_images: int,
        num_patches: int,
        busy_s: float = 0.0,
        padding_ratio: float = 0.0,
    ) -> None:
        """A batch came back, or never will. ``busy_s``: its forward pass."""
        now_s = self._clock()
        busy_s /= self._num_devices
        del self._begun_s[batch]
        self._busy_s = self._remembered_s(now_s) + busy_s
        self._forgotten_until_s = now_s
        if outcome == "encoded":
            self.last_progress_s = time.time()
        self._metrics.batch_ended(
            outcome, num_images=num_images, num_patches=num_patches, busy_s=busy_s, padding_ratio=padding_ratio
        )

    def _remembered_s(self, now_s: float) -> float:
        return self._busy_s * math.exp((self._forgotten_until_s - now_s) / _DUTY_WINDOW_S)
