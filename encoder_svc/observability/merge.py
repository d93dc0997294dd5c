"""One set of metrics for a server of several processes: what each of them counted, added up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from prometheus_client import Metric
from prometheus_client.samples import Exemplar, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client import CollectorRegistry

# Of one process each, and of no meaning as a sum.
_NOT_ADDED: Final = ("process_start_time_seconds", "process_max_fds", "python_info")
_ONLY_GROW: Final = ("_total", "_bucket", "_count", "_sum")

Counted = dict[tuple[str, tuple[tuple[str, str], ...]], Sample]
"""Samples by name and labels."""


def portable(registry: CollectorRegistry) -> list[list[Any]]:
    """A process's samples, fit for JSON."""
    return [
        [sample.name, sample.labels, sample.value, sample.exemplar and _exemplar_fields(sample.exemplar)]
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name not in _NOT_ADDED
    ]


def counted(fields: Iterable[list[Any]]) -> Counted:
    """What :func:`portable` made."""
    samples = (
        Sample(name, labels, value, None, exemplar and Exemplar(*exemplar)) for name, labels, value, exemplar in fields
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
    """

    def __init__(self, own: CollectorRegistry, others: Callable[[], Counted]) -> None:
        self._own = own
        self._others = others

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client.registry.Collector."""
        others = self._others()
        for metric in self._own.collect():
            merged = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            own: Counted = {_identity(sample): sample for sample in metric.samples}
            names = {sample.name for sample in metric.samples} or {metric.name, f"{metric.name}_total"}
            add(own, {identity: sample for identity, sample in others.items() if identity[0] in names})
            merged.samples = list(own.values())
            yield merged


def _identity(sample: Sample) -> tuple[str, tuple[tuple[str, str], ...]]:
    return sample.name, tuple(sorted(sample.labels.items()))


def _sum(one: Sample, other: Sample) -> Sample:
    exemplars = [exemplar for exemplar in (one.exemplar, other.exemplar) if exemplar]
    newest = max(exemplars, key=lambda exemplar: float(exemplar.timestamp or 0), default=None)
    return Sample(one.name, one.labels, one.value + other.value, None, newest)


def _exemplar_fields(exemplar: Exemplar) -> list[Any]:
    return [exemplar.labels, exemplar.value, exemplar.timestamp]
