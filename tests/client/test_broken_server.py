"""Whatever a server answers, or something on the way makes of that: the client's own errors, and no others."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from encoder_svc.client import AsyncEncoderClient, EncoderClient, RequestError
from encoder_svc.client.assembler import Assembler

if TYPE_CHECKING:
    from collections.abc import Iterator

NO_MESSAGE = b"\xff\xff\xff"


@dataclass
class Broken(grpc.GenericRpcHandler):
    """Answers each call with these bytes, or ends it with this status and these details."""

    target: str = ""
    answer: bytes = b""
    code: grpc.StatusCode | None = None
    text: str = ""
    details: list[tuple[str, bytes]] = field(default_factory=list)

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        def one(_: bytes, context: grpc.ServicerContext) -> bytes:
            if self.code is not None:
                context.set_trailing_metadata(self.details)
                context.abort(self.code, self.text)
            return self.answer

        def stream(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            yield one(request, context)

        if call.method.endswith("EncodeImages"):
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(one)

    async def errors(self) -> list[RequestError]:
        """Of both clients, of a stream and of a plain call."""
        with EncoderClient(self.target, timeout_s=20) as client:
            with pytest.raises(RequestError) as stream:
                client.encode([b"an image"])
            with pytest.raises(RequestError) as plain:
                client.info()
        async with AsyncEncoderClient(self.target, timeout_s=20) as later:
            with pytest.raises(RequestError) as other_stream:
                await later.encode([b"an image"])
            with pytest.raises(RequestError) as other_plain:
                await later.info()
        return [stream.value, plain.value, other_stream.value, other_plain.value]


@pytest.fixture
def broken() -> Iterator[Broken]:
    handler, server = Broken(), grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((handler,))
    handler.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield handler
    server.stop(None).wait()


def test_a_stream_that_fails_keeps_nothing(broken: Broken) -> None:
    broken.code = grpc.StatusCode.INTERNAL
    gc.collect()  # of other tests
    gc.disable()
    try:
        with EncoderClient(broken.target, timeout_s=20) as client, suppress(RequestError):
            client.encode([b"an image"])
        assert not [thing for thing in gc.get_objects() if type(thing) is Assembler]
    finally:
        gc.enable()


@pytest.mark.parametrize("answer", [NO_MESSAGE, bytes(5 * 2**20)], ids=["no message", "longer than gRPC takes"])
async def test_what_cannot_be_read_breaks_the_protocol(broken: Broken, answer: bytes) -> None:
    broken.answer = answer
    assert {error.reason for error in await broken.errors()} == {"PROTOCOL_ERROR"}


def details(code: int, text: str, detail: bytes) -> bytes:
    status = status_pb2.Status(code=code, message=text)
    status.details.add(type_url=f"type.googleapis.com/{error_details_pb2.ErrorInfo.DESCRIPTOR.full_name}", value=detail)
    return status.SerializeToString()


QUEUE_FULL = error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="encoder-svc").SerializeToString()


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (details(13, "Full.", QUEUE_FULL), "QUEUE_FULL"),
        (details(13, "Of another text.", QUEUE_FULL), "INTERNAL"),
        (details(8, "Full.", QUEUE_FULL), "INTERNAL"),
        (details(13, "Full.", NO_MESSAGE), "INTERNAL"),
        (NO_MESSAGE, "INTERNAL"),
    ],
    ids=["good", "another text", "another code", "no detail", "no status"],
)
async def test_details_that_do_not_fit_their_status_are_left_out(broken: Broken, status: bytes, reason: str) -> None:
    broken.code, broken.text = grpc.StatusCode.INTERNAL, "Full."
    broken.details = [("grpc-status-details-bin", status)]
    errors = await broken.errors()
    assert {(error.code, error.reason) for error in errors} == {("INTERNAL", reason)}
