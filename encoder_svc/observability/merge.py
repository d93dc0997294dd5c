"""One set of metrics for a server of several processes: what each of them counted, added up."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import Metric
from prometheus_client.samples import Exemplar, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client import CollectorRegistry

# Of one process each, and of no meaning as a sum.
_NOT_ADDED: Final = ("process_start_time_seconds", "process_max_fds", "python_info")
_ONLY_GROW: Final = ("_total", "_bucket", "_count", "_sum")
_PAUSE_S: Final = 0.0002

Counted = dict[tuple[str, tuple[tuple[str, str], ...]], Sample]
"""Samples by name and labels."""


def give_way() -> None:
    """Lets other threads have Python's lock: a scrape is long work of many small pieces, and nobody's hurry. To sleep
    for no time at all would take the lock again before they wake."""
    time.sleep(_PAUSE_S)


def portable(registry: CollectorRegistry) -> str:
    """A process's samples, to be sent: what adds nothing to a sum is left out. In a thread."""
    fields: list[list[Any]] = []
    for metric in registry.collect():
        give_way()
        seen = {_unbounded(sample) for sample in metric.samples if sample.name.endswith("_count") and sample.value}
        fields += (
            [sample.name, sample.labels, sample.value, sample.exemplar and _exemplar_fields(sample.exemplar)]
            for sample in metric.samples
            if sample.name not in _NOT_ADDED
            and (_unbounded(sample) in seen if metric.type == "histogram" else sample.value)
        )
    return json.dumps(fields, separators=(",", ":"))


def _unbounded(sample: Sample) -> tuple[str, ...]:
    """A series of a histogram, whichever of its samples it is."""
    return tuple(value for name, value in sorted(sample.labels.items()) if name != "le")


def counted(said: str) -> Counted:
    """What :func:`portable` made."""
    samples = (
        Sample(name, labels, value, None, exemplar and Exemplar(*exemplar))
        for name, labels, value, exemplar in json.loads(said)
    )
    return {_identity(sample): sample for sample in samples}


def what_only_grows(samples: Counted) -> Counted:
    """What a process that is gone has counted, and is still to be counted: no counter may fall."""
    return {identity: sample for identity, sample in samples.items() if sample.name.endswith(_ONLY_GROW)}


def add(total: Counted, samples: Counted) -> None:
    """Adds samples to a total, in place. Of two exemplars the newer stays."""
    for identity, sample in samples.items():
        known = total.get(identity)
        total[identity] = sample if known is None else _sum(known, sample)


class MergedRegistry:
    """A registry for a scrape: this process's own, and what others counted.

    Args:
        others: gives that; called in the scrape's thread.
        names: of the samples that are wanted; all, unless given.
    """

    def __init__(
        self, own: CollectorRegistry, others: Callable[[], Counted] = dict, names: Iterable[str] | None = None
    ) -> None:
        self._own = own
        self._others = others
        self._names = None if names is None else frozenset(names)

    def restricted_registry(self, names: Iterable[str]) -> MergedRegistry:
        """See prometheus_client.registry.CollectorRegistry: for a scrape of some samples alone."""
        return MergedRegistry(self._own, self._others, names)

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client.registry.Collector."""
        others: dict[str, Counted] = {}
        for identity, sample in self._others().items():
            others.setdefault(identity[0], {})[identity] = sample
        for metric in self._own.collect():
            give_way()
            merged = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            own: Counted = {_identity(sample): sample for sample in metric.samples}
            for name in {sample.name for sample in metric.samples} or {metric.name, f"{metric.name}_total"}:
                add(own, others.get(name, {}))
            merged.samples = [s for s in own.values() if self._names is None or s.name in self._names]
            if merged.samples or self._names is None:
                yield merged


def _identity(sample: Sample) -> tuple[str, tuple[tuple[str, str], ...]]:
    return sample.name, tuple(sorted(sample.labels.items()))


def _sum(one: Sample, other: Sample) -> Sample:
    exemplars = [exemplar for exemplar in (one.exemplar, other.exemplar) if exemplar]
    newest = max(exemplars, key=lambda exemplar: float(exemplar.timestamp or 0), default=None)
    return Sample(one.name, one.labels, one.value + other.value, None, newest)


def _exemplar_fields(exemplar: Exemplar) -> list[Any]:
    return [exemplar.labels, exemplar.value, exemplar.timestamp]
