"""Calls are turned away before their message is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from encoder_svc._generated.encoder.v1 import encoder_pb2_grpc
from encoder_svc.engine.admission import Admission
from encoder_svc.engine.load import Budgets
from encoder_svc.observability.metrics import Metrics
from encoder_svc.observability.request import Observer
from encoder_svc.server.gate import Gate
from encoder_svc.server.servicer import EncoderServicer
from encoder_svc.server.serving import Serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SERVING = Serving(request_window_patches=100, send_timeout_s=5, lease_s=60, max_lease_s=60)


class FullPipeline:
    """A pipeline so far as the door is concerned."""

    def __init__(self) -> None:
        budgets = Budgets(max_queued_patches=10, max_inflight_images=10, max_inflight_bytes=10)
        self.core = Admission(budgets, lambda: 0.0)
        self.core.admit(num_images=1, num_bytes=1).reserve(10, 60.0)


@pytest.fixture
def observer() -> Observer:
    return Observer(Metrics())


@pytest.fixture
async def channel(request: pytest.FixtureRequest, observer: Observer) -> AsyncIterator[grpc.aio.Channel]:
    """To a server whose pipeline is the test's parameter."""
    servicer = EncoderServicer(SERVING, observer)
    if request.param is not None:
        servicer.open(request.param())
    server = grpc.aio.server(interceptors=[Gate(servicer, observer)])
    encoder_pb2_grpc.add_EncoderServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


@pytest.mark.parametrize(
    ("channel", "method", "reason"),
    [
        (None, "EncodeImages", "STARTING"),
        (None, "GetModelInfo", "STARTING"),
        (FullPipeline, "EncodeImages", "QUEUE_FULL"),
    ],
    indirect=["channel"],
)
async def test_a_call_that_sends_nothing_hears_why(
    channel: grpc.aio.Channel, observer: Observer, method: str, reason: str
) -> None:
    call = channel.stream_stream(f"/encoder.v1.Encoder/{method}")(timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    detail = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(caught.value)
    assert status is not None
    assert status.details[0].Unpack(detail)
    assert detail.reason == reason
    labels = {"method": method, "code": caught.value.code().name, "reason": reason}
    assert observer.metrics.registry.get_sample_value("encoder_requests_total", labels) == 1
    assert observer.num_running == 0


@pytest.mark.parametrize("channel", [FullPipeline], indirect=True)
async def test_a_full_queue_turns_no_fetch_away_unread(channel: grpc.aio.Channel) -> None:
    call = channel.stream_stream("/encoder.v1.Encoder/FetchEmbeddings")(timeout=0.3)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


class EmptyPipeline(FullPipeline):
    """One that has room."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Admission(self.core.budgets, lambda: 0.0)


@pytest.mark.parametrize("channel", [EmptyPipeline], indirect=True)
@pytest.mark.parametrize("method", ["EncodeImages", "GetModelInfo", "FetchEmbeddings", "ReleaseEmbeddings"])
async def test_bytes_that_are_no_message_are_named(channel: grpc.aio.Channel, observer: Observer, method: str) -> None:
    call = channel.unary_stream(f"/encoder.v1.Encoder/{method}")(b"\x0a\xff\xff\xff", timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    detail = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(caught.value)
    assert status is not None
    assert status.details[0].Unpack(detail)
    assert detail.reason == "REQUEST_MALFORMED"
    bad = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad)
    assert [violation.field for violation in bad.field_violations] == [""]
    labels = {"method": method, "code": "INVALID_ARGUMENT", "reason": "REQUEST_MALFORMED"}
    assert observer.metrics.registry.get_sample_value("encoder_requests_total", labels) == 1
