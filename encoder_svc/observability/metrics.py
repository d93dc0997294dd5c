"""One server's Prometheus metrics. What each of them means is said in catalogue.py.

Counters and histograms are told what happened; the state of queues, caches and budgets is read when a scrape comes,
from whoever owns it, so that keeping it costs nothing.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, GCCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from encoder_svc.errors import CODES, Reason
from encoder_svc.observability.catalogue import METRICS
from encoder_svc.observability.histogram import LoopHistogram
from encoder_svc.observability.merge import MergedRegistry
from encoder_svc.observability.stages import STAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from encoder_svc.observability.merge import Counted
    from encoder_svc.observability.stages import Stages

_FOUND_BY_THE_CLIENT = (Reason.CHECKSUM_MISMATCH, Reason.PROTOCOL_ERROR, Reason.UNREACHABLE)


class Metrics:
    """One server's metrics, in a registry of their own. Belongs to the event loop; a scrape may come in any thread.

    A ``trace_id`` becomes the exemplar of what it was observed with; empty for none.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._others: Callable[[], Counted] = dict
        self._state = _State()
        self.registry.register(self._state)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._requests = self._counter("encoder_requests_total")
        self._request_duration = self._histogram("encoder_request_duration_seconds")
        self._first_embedding = self._histogram("encoder_time_to_first_embedding_seconds")
        self._images = self._counter("encoder_images_total")
        self._image_failures = self._counter("encoder_image_failures_total")
        self._request_bytes = self._counter("encoder_request_bytes_total")
        self._response_bytes = self._counter("encoder_response_bytes_total")
        self._batches = self._counter("encoder_batches_total")
        self._batch_patches = self._histogram("encoder_batch_patches").series()
        self._batch_images = self._histogram("encoder_batch_images").series()
        self._batch_padding = self._histogram("encoder_batch_padding_ratio").series()
        self._device_busy = self._counter("encoder_device_busy_seconds_total")
        self._loop_lag = self._histogram("encoder_event_loop_lag_seconds").series()
        stage_duration = self._histogram("encoder_stage_duration_seconds")
        self._stages = {stage: stage_duration.series(stage) for stage in STAGES}
        self._start_series_at_zero()

    def request_ended(self, method: str, code: str, reason: str, duration_s: float, trace_id: str = "") -> None:
        """A call has ended with this gRPC status; ``reason`` is empty if it is OK."""
        self._requests.labels(method, code, reason).inc()
        self._request_duration.series(method, code).observe(duration_s, trace_id)

    def first_embedding(self, method: str, seconds: float, trace_id: str = "") -> None:
        """A call's first image has been written."""
        self._first_embedding.series(method).observe(seconds, trace_id)

    def image_ended(self, outcome: str, stages: Stages | None = None, *, reason: str = "", trace_id: str = "") -> None:
        """One image is done with. ``reason`` is that of a failure."""
        self._images.labels(outcome).inc()
        if reason:
            self._image_failures.labels(reason).inc()
        for stage, seconds in stages.items() if stages else ():
            if seconds:
                self._stages[stage].observe(seconds, trace_id)

    def bytes_received(self, num_bytes: int) -> None:
        """A request was admitted."""
        self._request_bytes.inc(num_bytes)

    def bytes_sent(self, transport: str, num_bytes: int) -> None:
        """Embeddings have left."""
        self._response_bytes.labels(transport).inc(num_bytes)

    def batch_ended(
        self, outcome: str, *, num_images: int, num_patches: int, busy_s: float = 0.0, padding_ratio: float = 0.0
    ) -> None:
        """The device is done with a batch. ``busy_s``: its forward pass."""
        self._batches.labels(outcome).inc()
        self._batch_images.observe(num_images)
        self._batch_patches.observe(num_patches)
        if outcome == "encoded":
            self._batch_padding.observe(padding_ratio)
            self._device_busy.inc(busy_s)

    def loop_lag(self, seconds: float) -> None:
        """A timer of the event loop fired so much too late."""
        self._loop_lag.observe(seconds)

    def set_build_info(self, **labels: str) -> None:
        """Says what is served. Labels as in the catalogue."""
        assert labels.keys() == METRICS["encoder_build_info"].labels.keys()
        self._state.build_info = labels

    def set_start(self, seconds: Mapping[str, float]) -> None:
        """Says how long each phase of the start took."""
        self._state.start_s = seconds

    def read_at_scrape(self, sources: Mapping[str, Callable[[], float]]) -> None:
        """From now on each of these metrics, by name, is what its function returns when a scrape comes. The functions
        run in the scrape's thread: they read numbers and change nothing."""
        assert sources.keys() <= METRICS.keys()
        self._state.sources |= sources

    def add_others(self, others: Callable[[], Counted]) -> None:
        """What other processes of this server counted is added at every scrape, in its thread."""
        self._others = others

    def scraped(self) -> MergedRegistry:
        """The whole server's."""
        return MergedRegistry(self.registry, self._others)

    def _counter(self, name: str) -> Counter:
        metric = METRICS[name]
        return Counter(name, metric.meaning, tuple(metric.labels), registry=self.registry)

    def _histogram(self, name: str) -> LoopHistogram:
        histogram = LoopHistogram(METRICS[name])
        self.registry.register(histogram)
        return histogram

    def _start_series_at_zero(self) -> None:
        """A series that is born with its first event has no increase that Prometheus could see."""
        for name, counter in (
            ("encoder_images_total", self._images),
            ("encoder_batches_total", self._batches),
            ("encoder_response_bytes_total", self._response_bytes),
        ):
            for values in product(*(values or () for values in METRICS[name].labels.values())):
                counter.labels(*values)
        for method in METRICS["encoder_requests_total"].labels["method"] or ():
            self._requests.labels(method, "OK", "")
            self._request_duration.series(method, "OK")
        for method in METRICS["encoder_time_to_first_embedding_seconds"].labels["method"] or ():
            self._first_embedding.series(method)
        for reason in Reason:
            if reason not in _FOUND_BY_THE_CLIENT:
                self._requests.labels("EncodeImages", CODES[reason], reason)
                self._image_failures.labels(reason)


class _State:
    """The collector of what is read at a scrape."""

    def __init__(self) -> None:
        self.sources: dict[str, Callable[[], float]] = {}
        self.build_info: dict[str, str] | None = None
        self.start_s: Mapping[str, float] | None = None

    def collect(self) -> Iterator[Metric]:
        for name, read in list(self.sources.items()):
            metric = METRICS[name]
            family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            yield family(name, metric.meaning, value=read())
        if self.build_info is not None:
            info = METRICS["encoder_build_info"]
            gauge = GaugeMetricFamily(info.name, info.meaning, labels=tuple(info.labels))
            gauge.add_metric([self.build_info[label] for label in info.labels], 1)
            yield gauge
        if self.start_s is not None:
            start = METRICS["encoder_start_seconds"]
            gauge = GaugeMetricFamily(start.name, start.meaning, labels=tuple(start.labels))
            for phase, seconds in self.start_s.items():
                gauge.add_metric([phase], seconds)
            yield gauge
