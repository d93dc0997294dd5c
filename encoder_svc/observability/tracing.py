"""Spans by OpenTelemetry: one for each call, one for each of its images, one for each stage of an image.

Imported only with ``--tracing on``. Where spans go is said by the standard ``OTEL_…`` variables; a call's stages were
measured anyway, so that its spans are made when it is over.

Sources: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/ for the variables,
https://opentelemetry.io/docs/specs/semconv/rpc/grpc/ for the names of attributes.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from threading import Thread
from typing import TYPE_CHECKING, Final

from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from encoder_svc import __version__
from encoder_svc.errors import CODE_NUMBERS, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry import trace
    from opentelemetry.sdk.trace.export import SpanExporter

    from encoder_svc.observability.request import ImageRecord, RequestRecord

_SERVICE: Final = "encoder.v1.Encoder"
# A stop shall not wait for a collector that is away.
_FLUSH_S: Final = 1.0
_LONGEST_TEXT: Final = 128
_CONTEXT: Final = TraceContextTextMapPropagator()


class OpenTelemetryTracer:
    """A :class:`encoder_svc.observability.request.Tracer`.

    Args:
        variables: ``OTEL_…``, as they are set; the SDK reads most of them by itself.

    Raises:
        ConfigError: they name an exporter that is not installed, or one has a value that is not taken.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        try:
            self._provider = _provider(variables)
        except ConfigError:
            raise
        except Exception as error:  # the SDK raises ValueError, StopIteration and its exporters' own
            raise ConfigError(
                f"--tracing: OpenTelemetry does not take its variables ({type(error).__name__}: {error}). "
                f"Set are {', '.join(sorted(variables)) or 'none'}."
            ) from error
        self._tracer = self._provider.get_tracer("encoder_svc", __version__)

    def begin(self, method: str, metadata: dict[str, str]) -> CallSpan:
        """Begins a call's span: a child of the caller's, if its metadata has W3C trace context."""
        span = self._tracer.start_span(
            f"{_SERVICE}/{method}",
            context=_CONTEXT.extract(metadata),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": _SERVICE, "rpc.method": method},
        )
        return CallSpan(self._tracer, span)

    def close(self) -> None:
        """Sends what is left, for a second at the most."""
        # The SDK heeds no limit of its own: https://github.com/open-telemetry/opentelemetry-python/issues/4568
        sending = Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        sending.join(_FLUSH_S)


class CallSpan:
    """A :class:`encoder_svc.observability.request.Span`."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        context = span.get_span_context()
        self.trace_id = format_trace_id(context.trace_id) if context.is_valid else ""  # OTEL_SDK_DISABLED makes none
        self._tracer = tracer
        self._span = span

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """W3C trace context with this span as the parent."""
        carrier: dict[str, str] = {}
        _CONTEXT.inject(carrier, set_span_in_context(self._span))
        return tuple(carrier.items())

    def end(self, record: RequestRecord) -> None:
        """Makes the images' spans, and ends the call's."""
        if self._span.is_recording():
            self._describe(record)
            for image in record.images:
                self._add_image(image, record.arrived_unix_ns)
        self._span.end(record.arrived_unix_ns + _ns(record.duration_s))

    def _describe(self, record: RequestRecord) -> None:
        self._span.set_attributes(
            {
                "rpc.grpc.status_code": CODE_NUMBERS.get(record.code, 0),
                "encoder.request_id": record.request_id[:_LONGEST_TEXT],
                "encoder.images": record.num_images,
                "encoder.rows": record.num_rows,
                "encoder.bytes": record.num_bytes,
            }
        )
        if record.reason:
            self._span.set_attribute("encoder.reason", record.reason)
            self._span.set_status(StatusCode.ERROR, record.reason)

    def _add_image(self, image: ImageRecord, arrived_ns: int) -> None:
        """An image and, inside it, its stages end to end; admission, which a request's images share, included."""
        if image.reason:
            self._span.add_event("image failed", {"encoder.index": image.index, "encoder.reason": image.reason})
            return
        span = self._tracer.start_span(
            "image",
            context=set_span_in_context(self._span),
            start_time=arrived_ns,
            attributes={"encoder.index": image.index, "encoder.outcome": image.outcome},
        )
        inside, began_ns = set_span_in_context(span), arrived_ns
        for stage, seconds in image.stages.items():
            if seconds:
                ended_ns = began_ns + _ns(seconds)
                self._tracer.start_span(stage, context=inside, start_time=began_ns).end(ended_ns)
                began_ns = ended_ns
        span.end(began_ns)


def _provider(variables: Mapping[str, str]) -> TracerProvider:
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "encoder-svc"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in _exporters(variables):
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _exporters(variables: Mapping[str, str]) -> list[SpanExporter]:
    protocol = variables.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or variables.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    otlp = {"http/protobuf": "otlp_proto_http"}.get(protocol or "grpc", f"otlp_proto_{protocol or 'grpc'}")
    exporters = []
    for name in (variables.get("OTEL_TRACES_EXPORTER") or "otlp").split(","):
        wanted = otlp if name.strip() == "otlp" else name.strip()
        if wanted == "none":
            continue
        found = list(entry_points(group="opentelemetry_traces_exporter", name=wanted))
        if not found:
            raise ConfigError(
                f"--tracing: no exporter {wanted!r} is installed (OTEL_TRACES_EXPORTER, OTEL_EXPORTER_OTLP_PROTOCOL)."
            )
        exporters.append(found[0].load()())
    return exporters


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
