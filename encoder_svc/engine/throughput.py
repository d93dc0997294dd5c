"""How many patches a second leave the service while it has work. Pure: the clock is passed in."""

from __future__ import annotations

from typing import Final

_HALF_LIFE_S: Final = 5.0
# Of what was pending while the rate was measured.
_FORESEEN: Final = 8


class ThroughputMeter:
    """A decaying mean over busy time: what happened five busy seconds ago counts half.

    Time in which nothing was pending does not count, so an idle service keeps its rate. What is pending before anything
    leaves says nothing yet: it counts from then on.
    """

    def __init__(self) -> None:
        self._patches = 0.0
        self._busy_s = 0.0
        self._pending_s = 0.0
        self._since_s = 0.0
        self._not_counted = (0.0, 0.0)

    @property
    def patches_per_s(self) -> float | None:
        """None until something was measured."""
        return self._patches / self._busy_s if self._patches and self._busy_s else None

    @property
    def foreseen_patches(self) -> float:
        """For how many patches the rate says how long they take at the least.

        Little at a time says nothing of how fast much goes: a device takes hardly longer for a hundred times the
        patches of a small image. So it is eight times what was pending in the mean.
        """
        return _FORESEEN * self._pending_s / self._busy_s if self._busy_s else 0.0

    def pass_time(self, now_s: float, num_pending: int) -> None:
        """So many patches were pending until now, since it was told last."""
        elapsed_s = now_s - self._since_s if num_pending else 0.0
        busy_s, pending_s = self._not_counted
        self._not_counted = (busy_s + elapsed_s, pending_s + elapsed_s * num_pending)
        self._since_s = now_s

    def leave(self, num_patches: int, *, done: bool) -> None:
        """So many pending ones have left by now, encoded if they are ``done``."""
        busy_s, pending_s = self._not_counted
        self._not_counted = (0.0, 0.0)
        decay = 0.5 ** (busy_s / _HALF_LIFE_S)
        self._patches = self._patches * decay + (num_patches if done else 0)
        self._busy_s = self._busy_s * decay + busy_s
        self._pending_s = self._pending_s * decay + pending_s

    def least_s(self, num_patches: int) -> float:
        """How long so many patches take at the least; 0 while no rate is known."""
        rate = self.patches_per_s
        return min(num_patches, self.foreseen_patches) / rate if rate else 0.0
