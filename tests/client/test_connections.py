"""Connections of a client's own, of which a call takes the one with the fewest images under way."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.client import AsyncEncoderClient, EncoderClient
from encoder_svc.client.connections import SHUNNED_S, Connections

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.serving import ServerProcess

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class Silent(encoder_pb2_grpc.EncoderServicer):
    """Answers no request for images before the caller goes; remembers where each call came from."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.encoding: list[str] = []
        self.arrived = threading.Event()
        self.left = threading.Event()

    def EncodeImages(self, request: Any, context: Any) -> Iterator[Any]:
        context.add_callback(self.left.set)
        self.encoding.append(context.peer())
        self.arrived.set()
        self.left.wait(20)
        yield from ()

    def GetModelInfo(self, request: Any, context: Any) -> Any:
        self.asked.append(context.peer())
        return encoder_pb2.GetModelInfoResponse()


@pytest.fixture
def silent() -> Iterator[tuple[Silent, str]]:
    service = Silent()
    server = grpc.server(ThreadPoolExecutor(4))
    encoder_pb2_grpc.add_EncoderServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, f"127.0.0.1:{port}"
    service.left.set()
    server.stop(0).wait()


def to(server: ServerProcess) -> set[tuple[str, int]]:
    """Where the connections that a server has come from."""
    connections = psutil.Process(server.process.pid).net_connections("tcp")
    return {connection.raddr for connection in connections if connection.status == psutil.CONN_ESTABLISHED}


@pytest.mark.parametrize("connections", [1, 3])
def test_calls_take_turns_on_so_many(server: Callable[..., ServerProcess], connections: int) -> None:
    running = server("qwen2_vl", "--max-images", "7")
    before = to(running)
    with EncoderClient(running.target, connections=connections) as client:
        for _ in range(6):
            client.info()
        assert len(to(running) - before) == connections


async def test_so_with_the_async_client(server: Callable[..., ServerProcess]) -> None:
    running = server("qwen2_vl", "--max-images", "8")
    before = to(running)
    async with AsyncEncoderClient(running.target, connections=3) as client:
        for _ in range(6):
            await client.info()
        assert len(to(running) - before) == 3


@pytest.mark.parametrize("connections", [0, -1])
def test_fewer_than_one_are_refused(connections: int) -> None:
    with pytest.raises(ValueError, match="needs 1 connection or more"):
        EncoderClient("127.0.0.1:1", connections=connections)


@pytest.mark.parametrize(
    ("under_way", "taken"),
    [([0, 0, 0], [0, 1, 2, 0]), ([3, 0, 1], [1, 2, 1, 2]), ([1, 1, 0], [2, 0, 1, 2])],
    ids=["in turn", "the fewest", "ties in turn"],
)
def test_the_one_with_the_fewest_images_is_taken(under_way: list[int], taken: list[int]) -> None:
    connections = Connections(["0", "1", "2"])
    for number in under_way:  # each takes the next, since none has as many
        connections.take(number + 10)
    assert [connections.take(1)[0] for _ in range(4)] == [str(index) for index in taken]


def test_what_has_ended_counts_no_more() -> None:
    connections = Connections(["0", "1"])
    _, ended = connections.take(5)
    connections.take(2)
    ended(grpc.StatusCode.OK)
    assert [connections.take(1)[0] for _ in range(2)] == ["0", "0"]


def test_one_that_broke_is_the_last_to_be_taken_for_a_while() -> None:
    now_s = [0.0]
    connections = Connections(["0", "1"], clock=lambda: now_s[0])
    with pytest.raises(Broke), connections.taken(1):
        raise Broke
    assert [connections.take(1)[0] for _ in range(3)] == ["1"] * 3
    now_s[0] = SHUNNED_S
    assert [connections.take(1)[0] for _ in range(3)] == ["0"] * 3


def test_if_all_broke_calls_are_tried_all_the_same() -> None:
    connections = Connections(["0", "1"], clock=lambda: 0.0)
    for _ in range(2):
        connections.take(1)[1](UNAVAILABLE)
    assert {connections.take(1)[0] for _ in range(2)} == {"0", "1"}


def test_calls_go_where_nothing_is_under_way(silent: tuple[Silent, str]) -> None:
    service, target = silent
    with EncoderClient(target, connections=2) as client:
        answer = client.stream([b"an image"] * 3)
        assert service.arrived.wait(10)
        for _ in range(4):
            client.info()
        assert service.encoding[0] not in service.asked
        del answer


async def test_so_with_the_async_clients_calls(silent: tuple[Silent, str]) -> None:
    service, target = silent
    async with AsyncEncoderClient(target, connections=2) as client:
        reading = asyncio.create_task(client.encode([b"an image"] * 3))
        assert await asyncio.to_thread(service.arrived.wait, 10)
        for _ in range(4):
            await client.info()
        assert service.encoding[0] not in service.asked
        reading.cancel()


def test_an_answer_that_nobody_began_to_read_is_cancelled(silent: tuple[Silent, str]) -> None:
    service, target = silent
    with EncoderClient(target, connections=2) as client:
        answer = client.stream([b"an image"])
        assert service.arrived.wait(10)
        del answer
        gc.collect()
        assert service.left.wait(10)


class Broke(grpc.RpcError):
    """An error of a connection."""

    def code(self) -> grpc.StatusCode:
        return UNAVAILABLE
