"""What the client sends along for tracing."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from opentelemetry.sdk.trace import TracerProvider

from encoder_svc.client import trace
from encoder_svc.client.trace import trace_metadata
from tests.serving import ENVIRONMENT

if TYPE_CHECKING:
    import pytest


def test_the_current_span_becomes_w3c_trace_context() -> None:
    with TracerProvider().get_tracer("test").start_as_current_span("lm") as span:
        context, metadata = span.get_span_context(), dict(trace_metadata() or ())
    assert metadata.keys() == {"traceparent"}
    assert metadata["traceparent"].startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")


def test_without_a_span_nothing_is_sent() -> None:
    assert trace_metadata() is None


def test_headers_in_capitals_are_lowered_as_grpc_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def inject(carrier: dict[str, str]) -> None:
        carrier["X-Amzn-Trace-Id"] = "Root=1-5"

    monkeypatch.setattr(trace, "_inject", lambda: inject)
    assert trace_metadata() == (("x-amzn-trace-id", "Root=1-5"),)


def test_without_opentelemetry_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    trace._inject.cache_clear()
    monkeypatch.setitem(sys.modules, "opentelemetry.propagate", None)
    assert trace_metadata() is None
    trace._inject.cache_clear()


def test_propagators_that_are_not_installed_cost_one_warning_and_no_call() -> None:
    calls = "from encoder_svc.client.trace import trace_metadata; print(trace_metadata(), trace_metadata())"
    done = subprocess.run(
        [sys.executable, "-c", calls],
        check=False,
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"OTEL_PROPAGATORS": "tracecontext,nowhere"},
    )
    assert done.stdout == "None None\n", done.stderr
    assert done.stderr.count("OpenTelemetry's propagators cannot be loaded") == 1
    assert "nowhere" in done.stderr
