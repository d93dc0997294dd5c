"""Connections of a client's own, among which its calls take turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import pytest

from encoder_svc.client import AsyncEncoderClient, EncoderClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.serving import ServerProcess


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
