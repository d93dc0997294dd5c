"""Several replicas behind one name."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from encoder_svc.client import ROUND_ROBIN, AsyncEncoderClient, EncoderClient
from tests.ports import free_port
from tests.serving import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def replicas(tiny_checkpoint: Callable[[str], Path]) -> Iterator[str]:
    """A name for two servers, which differ in their limit of images: 5 and 6."""
    port = free_port()
    same = ("--model", tiny_checkpoint("qwen2_vl"), "--device", "cpu", "--port", str(port))
    with (
        ServerProcess(*same, "--host", "127.0.0.1", "--max-images", "5"),
        ServerProcess(*same, "--host", "127.0.0.2", "--max-images", "6"),
    ):
        yield f"ipv4:127.0.0.1:{port},127.0.0.2:{port}"


def test_calls_go_to_every_replica_in_turn_where_that_is_asked_for(replicas: str) -> None:
    with EncoderClient(replicas, options=[ROUND_ROBIN]) as client:

        def ask() -> int:
            return client.info().limits.max_images

        wait_for(lambda: {ask(), ask()} == {5, 6})  # connections are made one after the other
        seen = [ask() for _ in range(10)]
    assert sorted(seen) == [5] * 5 + [6] * 5


async def test_the_async_client_balances_too(replicas: str) -> None:
    async with AsyncEncoderClient(replicas, options=[ROUND_ROBIN]) as client:
        seen = {(await client.info()).limits.max_images for _ in range(200)}
    assert seen == {5, 6}


def test_without_it_all_calls_go_to_one(replicas: str) -> None:
    with EncoderClient(replicas) as client:
        assert len({client.info().limits.max_images for _ in range(20)}) == 1


@pytest.mark.parametrize(("age", "ends"), [("0.5", True), ("0", False)])
def test_a_connection_ends_at_its_age_and_calls_go_on(
    server: Callable[..., ServerProcess], age: str, *, ends: bool
) -> None:
    target = server("qwen2_vl", "--max-connection-age-s", age, "--max-pixels", "100000000").target
    states: list[grpc.ChannelConnectivity] = []
    with grpc.insecure_channel(target) as channel, EncoderClient(target) as client:
        grpc.channel_ready_future(channel).result(10)
        channel.subscribe(states.append)
        noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
        [encoded] = client.encode([noise])
        assert encoded.embeddings.any()
        if encoded.timings.forward_s < 0.7:
            time.sleep(0.7)
        client.info()
        assert (grpc.ChannelConnectivity.IDLE in states) == ends


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(100):
        if condition():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it did not come about in 5 s")
