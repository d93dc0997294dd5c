"""One trace from the LM's process through the server, seen by a collector."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
import pytest
from opentelemetry.sdk.trace import SpanProcessor

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.client import EncoderClient
from encoder_svc.config import Config
from encoder_svc.errors import ConfigError
from encoder_svc.observability import tracing
from encoder_svc.observability.stages import STAGES
from encoder_svc.observability.tracer import make_tracer
from encoder_svc.observability.tracing import OpenTelemetryTracer
from tests.observability.collectors import grpc_collector, http_collector
from tests.serving import ENVIRONMENT, ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"

# An LM's process as it is where it traces itself: it knows nothing of how its encoder does.
LM_PROCESS = """
import sys
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from encoder_svc.client import EncoderClient

provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(provider)
with trace.get_tracer("lm").start_as_current_span("generate"), EncoderClient(sys.argv[1]) as client:
    client.encode(sys.argv[2:], request_id="r-1")
"""


def exporting_to(endpoint: str, **variables: str) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"} | variables


@pytest.fixture
def start(tiny_checkpoint: Callable[[str], Path]) -> Callable[..., ServerProcess]:
    def make(environment: dict[str, str], *options: str) -> ServerProcess:
        model = ("--model", tiny_checkpoint("qwen2_vl"), "--device", "cpu")
        return ServerProcess(*model, "--tracing", "on", *options, environment=environment)

    return make


def test_a_trace_goes_from_the_lms_process_through_the_server(
    start: Callable[..., ServerProcess], photos: list[Path]
) -> None:
    with grpc_collector() as collector:
        environment = exporting_to(collector.endpoint)
        with start(environment) as serving:
            subprocess.run(
                [sys.executable, "-c", LM_PROCESS, serving.target, *map(str, photos[:2])],
                check=True,
                env=ENVIRONMENT | environment | {"OTEL_SERVICE_NAME": "lm"},
            )
            collector.until(lambda spans: {"generate", "encoder.v1.Encoder/EncodeImages"} <= {s.name for _, s in spans})
            collector.until(lambda spans: sum(s.name == "send" for _, s in spans) == 2)
        spans = collector.spans
    [generate] = [span for service, span in spans if service == "lm"]
    [call] = [span for _, span in spans if span.name == "encoder.v1.Encoder/EncodeImages"]
    images = [span for _, span in spans if span.name == "image"]
    assert {service for service, _ in spans} == {"lm", "encoder-svc"}
    assert {span.trace_id for _, span in spans} == {generate.trace_id}
    assert call.parent_span_id == generate.span_id
    assert [image.parent_span_id for image in images] == [call.span_id] * 2
    attributes = {a.key: a.value for a in call.attributes}
    assert attributes["encoder.request_id"].string_value == "r-1"
    assert attributes["encoder.images"].int_value == 2
    assert attributes["rpc.grpc.status_code"].int_value == 0
    for image in images:
        stages = [span for _, span in spans if span.parent_span_id == image.span_id]
        assert {"admission", "decode_wait", "decode", "forward", "send"} <= {span.name for span in stages}
        assert [span.name for span in stages] == [name for name in STAGES if name in {span.name for span in stages}]
        assert stages[0].start_time_unix_nano == image.start_time_unix_nano
        assert stages[-1].end_time_unix_nano == image.end_time_unix_nano
        assert generate.start_time_unix_nano < image.start_time_unix_nano
        assert image.end_time_unix_nano <= call.end_time_unix_nano < generate.end_time_unix_nano


def test_spans_go_over_http_where_the_variables_say_so(start: Callable[..., ServerProcess], photos: list[Path]) -> None:
    with http_collector() as collector:
        names = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_SERVICE_NAME": "e1"}
        environment = exporting_to(collector.endpoint, **names)
        with start(environment) as serving, EncoderClient(serving.target) as client:
            client.encode(photos[:1])
            collector.until(lambda spans: ("e1", "forward") in {(service, span.name) for service, span in spans})


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_context_is_given_back_with_the_servers_span(
    start: Callable[..., ServerProcess], photos: list[Path], fails: bool
) -> None:
    images = [] if fails else [encoder_pb2.Image(encoded=photos[0].read_bytes())]
    with start({"OTEL_TRACES_EXPORTER": "none"}) as serving, grpc.insecure_channel(serving.target) as channel:
        call = encoder_pb2_grpc.EncoderStub(channel).EncodeImages(
            encoder_pb2.EncodeImagesRequest(images=images),
            metadata=[("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")],
        )
        with suppress(grpc.RpcError):
            list(call)
        code = call.code()
        metadata = dict(call.trailing_metadata())
        assert serving.wait_for_log(f"trace_id={TRACE_ID}")
    assert code == (grpc.StatusCode.INVALID_ARGUMENT if fails else grpc.StatusCode.OK)
    version, trace_id, span_id, flags = metadata["traceparent"].split("-")
    assert (version, trace_id, flags) == ("00", TRACE_ID, "01")
    assert span_id != PARENT_ID
    assert fails == ("grpc-status-details-bin" in metadata)


def test_a_call_that_the_caller_does_not_sample_sends_no_spans(
    start: Callable[..., ServerProcess], photos: list[Path]
) -> None:
    with grpc_collector() as collector:
        with start(exporting_to(collector.endpoint)) as serving, grpc.insecure_channel(serving.target) as channel:
            request = encoder_pb2.EncodeImagesRequest(images=[encoder_pb2.Image(encoded=photos[0].read_bytes())])
            stub = encoder_pb2_grpc.EncoderStub(channel)
            list(stub.EncodeImages(request, metadata=[("traceparent", f"00-{'a' * 32}-{PARENT_ID}-00")]))
            list(stub.EncodeImages(request, metadata=[("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")]))
            assert serving.stop() == 0
        assert {span.trace_id.hex() for _, span in collector.spans} == {TRACE_ID}


def test_a_collector_that_is_not_there_keeps_nobody_waiting(
    start: Callable[..., ServerProcess], photos: list[Path]
) -> None:
    with start(exporting_to("http://127.0.0.1:9")) as serving, EncoderClient(serving.target, timeout_s=20) as client:
        assert len(client.encode(photos)) == len(photos)
        assert serving.stop(timeout_s=4) == 0


def test_what_is_left_is_sent_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    class Deaf(SpanProcessor):
        def shutdown(self) -> None:
            answered.wait(20)

    monkeypatch.setattr(tracing, "_FLUSH_S", 0.1)
    tracer = OpenTelemetryTracer({"OTEL_TRACES_EXPORTER": "none"})
    tracer._provider.add_span_processor(Deaf())
    began_s = time.monotonic()
    tracer.close()
    assert time.monotonic() - began_s < 10
    answered.set()


def test_where_opentelemetry_is_disabled_there_is_no_trace_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    span = OpenTelemetryTracer({"OTEL_TRACES_EXPORTER": "none"}).begin("GetModelInfo", {})
    assert (span.trace_id, span.metadata()) == ("", ())


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("OTEL_TRACES_EXPORTER", "carrier-pigeon", "no exporter 'carrier-pigeon' is installed"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "does not take its variables (ValueError: max_queue_size must be"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "99999", "does not take its variables (ValueError: max_export_batch_size"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "abc", "does not take its variables (ValueError: could not convert"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli", "does not take its variables (InvalidCompression"),
    ],
)
def test_variables_that_opentelemetry_does_not_take_are_refused_at_start_up(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"--tracing: .*{re.escape(said)}.*{variable}"):
        make_tracer(Config(tracing=True))
