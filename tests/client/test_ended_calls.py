"""Calls that end without an answer, and whose doing that was."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from encoder_svc._generated.encoder.v1 import encoder_pb2_grpc
from encoder_svc.client import AsyncEncoderClient, EncoderClient, RequestError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Ending(encoder_pb2_grpc.EncoderServicer):
    """Ends a call as gRPC's own server does that stops as it comes; or waits until it may."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.may_end = threading.Event()

    def GetModelInfo(self, request: Any, context: Any) -> Any:
        self._wait(context)

    def EncodeImages(self, request: Any, context: Any) -> Any:
        self._wait(context)

    def _wait(self, context: Any) -> None:
        self.arrived.set()
        self.may_end.wait(20)
        context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")


@pytest.fixture
def ending() -> Iterator[tuple[Ending, str]]:
    service, server = Ending(), grpc.server(ThreadPoolExecutor(4))
    encoder_pb2_grpc.add_EncoderServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, f"127.0.0.1:{port}"
    service.may_end.set()
    server.stop(None).wait()


def test_a_call_that_the_server_ends_may_be_made_again(ending: tuple[Ending, str]) -> None:
    service, target = ending
    service.may_end.set()
    with EncoderClient(target) as client, pytest.raises(UnavailableError, match=r"ended the call .*UNREACHABLE"):
        client.info()


async def test_so_with_the_async_client(ending: tuple[Ending, str]) -> None:
    service, target = ending
    service.may_end.set()
    async with AsyncEncoderClient(target) as client:
        with pytest.raises(UnavailableError, match=r"ended the call .*UNREACHABLE"):
            await client.info()


def test_a_call_whose_client_is_closed_was_cancelled(ending: tuple[Ending, str]) -> None:
    service, target = ending
    client = EncoderClient(target)
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(client.info)
        assert service.arrived.wait(10)
        client.close()
        error = asking.exception(10)
    assert isinstance(error, RequestError)
    assert error.reason == "CANCELLED"


@pytest.mark.parametrize("method", ["info", "encode"])
async def test_so_with_the_async_client_whose_callers_were_not_cancelled(
    ending: tuple[Ending, str], method: str
) -> None:
    service, target = ending
    client = AsyncEncoderClient(target)
    asking = asyncio.create_task(client.info() if method == "info" else client.encode([b"an image"]))
    assert await asyncio.to_thread(service.arrived.wait, 10)
    await client.close()
    [error] = await asyncio.gather(asking, return_exceptions=True)
    assert not asking.cancelled()
    assert isinstance(error, RequestError)
    assert error.reason == "CANCELLED"


@pytest.mark.parametrize("method", ["info", "encode"])
async def test_a_caller_that_is_cancelled_is_cancelled(ending: tuple[Ending, str], method: str) -> None:
    service, target = ending
    async with AsyncEncoderClient(target) as client:
        asking = asyncio.create_task(client.info() if method == "info" else client.encode([b"an image"]))
        assert await asyncio.to_thread(service.arrived.wait, 10)
        asking.cancel()
        await client.close()
        await asyncio.wait([asking])
    assert asking.cancelled()
