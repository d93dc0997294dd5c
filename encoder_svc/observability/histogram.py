"""Histograms that are told on one thread and read by another.

prometheus-client's own take two locks and walk the buckets for each observation. A call makes some twenty of them on
the event loop, where time is everybody's: here one costs a bisection and two additions.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import Exemplar, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from encoder_svc.observability.definitions import MetricDefinition


class Series:
    """One histogram under one set of labels. ``bounds`` are the buckets' upper bounds, infinity left out."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._exemplars: dict[int, tuple[str, float, float]] = {}

    def observe(self, value: float, trace_id: str = "") -> None:
        """Counts a value; ``trace_id`` becomes its bucket's exemplar."""
        bucket = bisect_left(self._bounds, value)
        self._counts[bucket] += 1
        self._sum += value
        if trace_id:
            self._exemplars[bucket] = (trace_id, value, time.time())

    def add_to(self, family: HistogramMetricFamily, labels: tuple[str, ...]) -> None:
        """Writes what was counted so far."""
        counts = accumulate(self._counts.copy())
        exemplars = {
            bucket: Exemplar({"trace_id": trace_id}, value, at_s)
            for bucket, (trace_id, value, at_s) in self._exemplars.copy().items()
        }
        names = [floatToGoString(bound) for bound in (*self._bounds, math.inf)]  # type: ignore[no-untyped-call]
        buckets = [
            (name, count, exemplars[bucket]) if bucket in exemplars else (name, count)
            for bucket, (name, count) in enumerate(zip(names, counts, strict=True))
        ]
        family.add_metric(labels, buckets, self._sum)


class LoopHistogram:
    """A histogram of the catalogue. Belongs to the event loop; :meth:`collect` may run in any thread."""

    def __init__(self, definition: MetricDefinition) -> None:
        self._definition = definition
        self._series: dict[tuple[str, ...], Series] = {}

    def series(self, *labels: str) -> Series:
        """The histogram under these labels' values, in the definition's order; an empty one if it is new."""
        found = self._series.get(labels)
        if found is None:
            assert len(labels) == len(self._definition.labels)
            found = self._series[labels] = Series(self._definition.buckets)
        return found

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client.registry.Collector."""
        definition = self._definition
        family = HistogramMetricFamily(definition.name, definition.meaning, labels=tuple(definition.labels))
        for labels, series in list(self._series.items()):
            series.add_to(family, labels)
        yield family
