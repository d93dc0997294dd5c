"""How many patches a second leave the service while it has work. Pure: the clock is passed in."""

from __future__ import annotations

from typing import Final

_HALF_LIFE_S: Final = 5.0


class ThroughputMeter:
    """A decaying mean over busy time: what happened five busy seconds ago counts half.

    Time in which nothing was pending does not count, so an idle service keeps its rate.
    """

    def __init__(self) -> None:
        self._patches = 0.0
        self._busy_s = 0.0
        self._counted_until_s: float | None = None

    @property
    def patches_per_s(self) -> float | None:
        """None until something was measured."""
        return self._patches / self._busy_s if self._patches and self._busy_s else None

    def begin(self, now_s: float) -> None:
        """Work is pending from now on; does nothing if it was already."""
        if self._counted_until_s is None:
            self._counted_until_s = now_s

    def done(self, num_patches: int, now_s: float, *, idle: bool) -> None:
        """``num_patches`` have left. ``idle`` says that nothing is pending any more."""
        self.begin(now_s)
        assert self._counted_until_s is not None
        elapsed_s = now_s - self._counted_until_s
        decay = 0.5 ** (elapsed_s / _HALF_LIFE_S)
        self._patches = self._patches * decay + num_patches
        self._busy_s = self._busy_s * decay + elapsed_s
        self._counted_until_s = None if idle else now_s
