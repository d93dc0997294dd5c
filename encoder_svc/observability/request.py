"""What became of one call: written down while it runs; at its end it makes metrics, one line of the log, and spans."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from encoder_svc.observability.stages import STAGES, Stages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from encoder_svc.observability.metrics import Metrics

logger = logging.getLogger(__name__)

# https://www.w3.org/TR/trace-context/#traceparent-header
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")

_REFUSALS_EVERY_S: Final = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """One image that was answered. ``reason`` is that of a failure; a failed image has no stages."""

    index: int
    outcome: str
    stages: Stages = field(default_factory=Stages)
    reason: str = ""


class Span(Protocol):
    """One call's part of a distributed trace."""

    trace_id: str

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What the caller is told of it."""

    def end(self, record: RequestRecord) -> None:
        """Sends the call and its images' stages on their way to the collector."""


class Tracer(Protocol):
    """Begins a span for each call; see tracing.py."""

    def begin(self, method: str, metadata: dict[str, str]) -> Span:
        """``metadata``: the call's, where the caller's context may be."""


class Observer:
    """Makes a record for each call.

    Args:
        tracer: None to trace nothing.
    """

    def __init__(
        self, metrics: Metrics, tracer: Tracer | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.metrics = metrics
        self.num_running = 0
        self._tracer = tracer
        # Of those that no line of the log tells yet, and when the next line may be, by method and reason.
        self._refusals: dict[tuple[str, str], tuple[int, float]] = {}
        self._clock = clock

    def request(self, method: str, request_id: str, metadata: Iterable[tuple[str, str | bytes]]) -> RequestRecord:
        """A call has arrived. ``request_id`` is the caller's, and may be anything."""
        texts = {name: value for name, value in metadata if isinstance(value, str)}
        span = self._tracer.begin(method, texts) if self._tracer else None
        self.num_running += 1
        return RequestRecord(self, method, request_id, span, _trace_id(texts), self._clock)

    def refused(
        self, method: str, metadata: Iterable[tuple[str, str | bytes]], code: str, reason: str
    ) -> tuple[tuple[str, str], ...]:
        """A call was turned away unread. There may be hundreds a second of them, so that the log gets a line a second
        for all of one reason. Returns what goes back to the caller beside the status."""
        record = self.request(method, "", metadata)
        record.failed(code, reason)
        self.num_running -= 1
        self.metrics.request_ended(method, code, reason, record.duration_s, record.trace_id)
        record.end_span()
        self._log_refusal(method, code, reason)
        return record.metadata()

    def _log_refusal(self, method: str, code: str, reason: str) -> None:
        number, next_s = self._refusals.get((method, reason), (0, 0.0))
        if (now_s := self._clock()) < next_s:
            self._refusals[method, reason] = number + 1, next_s
            return
        self._refusals[method, reason] = 0, now_s + _REFUSALS_EVERY_S
        fields = {"method": method, "code": code, "reason": reason, "refused": number + 1}
        logger.info("%s %s", method, reason, extra={"fields": fields})

    def ended(self, record: RequestRecord) -> None:
        """A call is over. Called once by its record."""
        self.num_running -= 1
        self.metrics.request_ended(record.method, record.code, record.reason, record.duration_s, record.trace_id)
        for _ in range(record.num_images - len(record.images)):
            self.metrics.image_ended("cancelled")
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s %s", record.method, record.reason or record.code, extra={"fields": record.fields()})


class RequestRecord:
    """One call. Use it in a ``with``, whose end is the call's. Belongs to the event loop.

    Attributes:
        arrived_s: on the observer's clock.
        trace_id: 32 hex digits, the caller's or our own; empty if nobody traces.
        num_images: of the admitted request; those that are never answered count as cancelled.
        code, reason: the status that the call ends with.
    """

    def __init__(
        self,
        observer: Observer,
        method: str,
        request_id: str,
        span: Span | None,
        trace_id: str,
        clock: Callable[[], float],
    ) -> None:
        self.method = method
        self.request_id = request_id
        self.arrived_s = clock()
        self.arrived_unix_ns = time.time_ns()
        self.duration_s = 0.0
        self.trace_id = span.trace_id if span else trace_id
        self.num_images = 0
        self.num_rows = 0
        self.num_bytes = 0
        self.first_embedding_s: float | None = None
        self.images: list[ImageRecord] = []
        self.code = "OK"
        self.reason = ""
        self._observer = observer
        self._span = span
        self._clock = clock

    def elapsed_s(self) -> float:
        """Since the call arrived."""
        return self._clock() - self.arrived_s

    def admitted(self, num_images: int, num_bytes: int = 0) -> None:
        """The call was let in. ``num_bytes``: of the request."""
        self.num_images = num_images
        self._observer.metrics.bytes_received(num_bytes)

    def image_sent(
        self, index: int, outcome: str, stages: Stages, *, num_rows: int, num_bytes: int, transport: str = "stream"
    ) -> None:
        """An image's embeddings were written, or retained if ``num_bytes`` is 0."""
        metrics = self._observer.metrics
        if self.first_embedding_s is None:
            self.first_embedding_s = self.elapsed_s()
            metrics.first_embedding(self.method, self.first_embedding_s, self.trace_id)
        self.num_rows += num_rows
        self.num_bytes += num_bytes
        self.images.append(ImageRecord(index=index, outcome=outcome, stages=stages))
        metrics.image_ended(outcome, stages, trace_id=self.trace_id)
        metrics.bytes_sent(transport, num_bytes)

    def image_failed(self, index: int, reason: str) -> None:
        """An image's error was written."""
        self.images.append(ImageRecord(index=index, outcome="failed", reason=reason))
        self._observer.metrics.image_ended("failed", reason=reason)

    def failed(self, code: str, reason: str) -> None:
        """The call as a whole ends with this status."""
        self.code, self.reason = code, reason

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes back to the caller beside the answer."""
        return self._span.metadata() if self._span else ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The call is over, whatever became of it."""
        self.duration_s = self.elapsed_s()
        self._observer.ended(self)
        self.end_span()

    def end_span(self) -> None:
        """Sends what is traced of the call."""
        if self._span:
            self._span.end(self)

    def fields(self) -> dict[str, Any]:
        """For the log. Stages are means over the request's images, in milliseconds; those of none are left out."""
        sums_s = dict.fromkeys(STAGES, 0.0)
        sent = [image.stages for image in self.images if image.outcome != "failed"]
        for stages in sent:
            for stage, seconds in stages.items():
                sums_s[stage] += seconds
        return {
            "method": self.method,
            "code": self.code,
            "reason": self.reason,
            "request_id": self.request_id,
            "trace_id": self.trace_id,
            "images": self.num_images,
            "failed": sum(image.outcome == "failed" for image in self.images),
            "rows": self.num_rows,
            "bytes": self.num_bytes,
            "duration_ms": round(self.duration_s * 1e3, 3),
            "stages_ms": {stage: round(sum_s / len(sent) * 1e3, 3) for stage, sum_s in sums_s.items() if sum_s},
        }


def _trace_id(metadata: dict[str, str]) -> str:
    """The caller's trace, read also where nothing is traced here: logs and exemplars then name it."""
    found = _TRACEPARENT.fullmatch(metadata.get("traceparent", ""))
    return found[1] if found else ""
