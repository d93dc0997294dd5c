"""Percentiles of values that keep coming, in bounded memory."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

MAX_SAMPLES: Final = 2**18
"""Values that are kept: 2 MiB of them."""

PERCENTILE_METHOD: Final = (
    f"numpy.percentile(method='linear') over every value; beyond {MAX_SAMPLES} values, over a uniform sample of as many"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """Count, mean, maximum and percentiles (:data:`PERCENTILE_METHOD`), in the unit of the values."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Samples:
    """Count, sum and maximum of every value; the values themselves up to a bound, and beyond it a uniform sample.

    The sample is a reservoir: Vitter, "Random Sampling with a Reservoir", 1985, algorithm R.
    """

    def __init__(self, *, seed: int = 0, max_samples: int = MAX_SAMPLES) -> None:
        self.count = 0
        self._total = 0.0
        self._max = 0.0
        self._kept = array("d")
        self._max_samples = max_samples
        self._random = random.Random(seed)  # noqa: S311

    def add(self, value: float) -> None:
        """Takes one value, which must not be negative."""
        self._max = max(self._max, value)
        self._total += value
        self.count += 1
        if len(self._kept) < self._max_samples:
            self._kept.append(value)
        elif (place := self._random.randrange(self.count)) < self._max_samples:
            self._kept[place] = value

    def values(self) -> npt.NDArray[np.float64]:
        """[min(count, max_samples)], a copy, in no promised order."""
        return np.array(self._kept, np.float64)

    def distribution(self) -> Distribution | None:
        """None without a value."""
        if not self.count:
            return None
        p50, p90, p95, p99 = np.percentile(self.values(), (50, 90, 95, 99), method="linear").tolist()
        return Distribution(
            count=self.count, mean=self._total / self.count, p50=p50, p90=p90, p95=p95, p99=p99, max=self._max
        )
