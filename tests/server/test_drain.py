"""How a server ends: what runs, what comes too late, and what does not finish."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.client import AsyncEncoderClient, EncoderClient, RequestError, UnavailableError
from tests.serving import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BIG = ("--max-pixels", "100000000", "--max-request-patches", "1000000", "--metrics-port", "0")


def noise(side: int) -> np.ndarray:
    """An image whose encoding takes a while: attention grows with the fourth power of its side."""
    return np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)


def test_sigterm_lets_a_running_request_finish(tiny_checkpoint: Callable[[str], Path]) -> None:
    with ServerProcess("--model", tiny_checkpoint("qwen2_vl"), *BIG) as draining:
        with EncoderClient(draining.target) as client:
            results = []
            encoding = threading.Thread(target=lambda: results.extend(client.encode([noise(1500)])))
            encoding.start()
            draining.wait_until_busy()
            code = draining.stop(signal.SIGTERM)
            encoding.join()
        assert code == 0
        assert results[0].embeddings.any()
        assert "stopped" in draining.log


def test_after_sigterm_new_requests_are_refused(tiny_checkpoint: Callable[[str], Path], photos: list[Path]) -> None:
    with ServerProcess("--model", tiny_checkpoint("qwen2_vl"), *BIG) as draining:
        with EncoderClient(draining.target) as client, EncoderClient(draining.target) as other:
            other.info()
            encoding = threading.Thread(target=lambda: client.encode([noise(1600)]))
            encoding.start()
            draining.wait_until_busy()
            draining.process.send_signal(signal.SIGTERM)
            draining.wait_for_log("draining")
            with pytest.raises(UnavailableError):
                other.encode(photos[:1])
            encoding.join()
        assert draining.process.wait(30) == 0


@pytest.mark.parametrize("frontend_processes", [0, 2])
async def test_callers_who_keep_coming_are_told_of_the_drain(
    tiny_checkpoint: Callable[[str], Path], frontend_processes: int
) -> None:
    """Not that they cancelled a call, as gRPC says of calls that come as it stops."""

    async def keep_coming(client: AsyncEncoderClient) -> str:
        while True:
            try:
                await client.encode([noise(60)])
            except RequestError as error:
                return error.reason

    flags = ("--device", "cpu", "--frontend-processes", str(frontend_processes))
    with ServerProcess("--model", tiny_checkpoint("qwen2_vl"), *flags) as draining:
        async with AsyncEncoderClient(draining.target, connections=4, timeout_s=20) as client:
            callers = [asyncio.create_task(keep_coming(client)) for _ in range(16)]
            await asyncio.sleep(1)
            draining.process.send_signal(signal.SIGTERM)
            assert set(await asyncio.gather(*callers)) == {"DRAINING"}
        assert draining.process.wait(30) == 0


def test_an_open_health_watch_does_not_delay_the_end(tiny_checkpoint: Callable[[str], Path]) -> None:
    with ServerProcess("--model", tiny_checkpoint("qwen2_vl"), "--device", "cpu") as watched:
        with grpc.insecure_channel(watched.target) as channel:
            updates = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(updates).status == health_pb2.HealthCheckResponse.SERVING
            started_s = time.monotonic()
            watched.process.send_signal(signal.SIGTERM)
            assert next(updates).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert watched.process.wait(30) == 0
        assert time.monotonic() - started_s < 5


def encode_in_background(client: EncoderClient, image: np.ndarray) -> tuple[threading.Thread, list]:
    outcome: list = []

    def encode() -> None:
        try:
            outcome.extend(client.encode([image]))
        except RequestError as error:
            outcome.append(error)

    thread = threading.Thread(target=encode)
    thread.start()
    return thread, outcome


@pytest.mark.parametrize("ending", ["drain_s passes", "a second signal comes"])
def test_requests_that_do_not_finish_in_time_are_ended_and_the_exit_code_says_so(tiny_checkpoint, ending: str) -> None:
    drain_s = "0.1" if ending == "drain_s passes" else "60"
    options = ("--device", "cpu", "--drain-s", drain_s, *BIG)
    with (
        ServerProcess("--model", tiny_checkpoint("qwen2_vl"), *options) as ended,
        EncoderClient(ended.target) as client,
    ):
        thread, outcome = encode_in_background(client, noise(1600))
        ended.wait_until_busy()
        ended.process.send_signal(signal.SIGTERM)
        ended.wait_for_log("draining")
        if ending == "a second signal comes":
            ended.process.send_signal(signal.SIGTERM)
        assert ended.process.wait(60) == 4
        thread.join()
        assert isinstance(outcome[0], UnavailableError)
        assert outcome[0].reason == "DRAINING"


@pytest.mark.parametrize("reads_on", [True, False], ids=["reads on", "never reads"])
def test_a_call_whose_answer_waits_to_be_read_is_ended_with_the_drain(tiny_checkpoint, *, reads_on: bool) -> None:
    """gRPC sends a status after what was written before it: who reads on in time gets it, who does not is not waited
    for."""
    options = ("--device", "cpu", "--drain-s", "0.1", "--max-pixels", "4000000")
    raw = encoder_pb2.RawImage(height=800, width=800, data=noise(800).tobytes())
    request = encoder_pb2.EncodeImagesRequest(images=[encoder_pb2.Image(raw=raw)] * 32)
    with (
        ServerProcess("--model", tiny_checkpoint("qwen3_vl"), *options) as ended,
        # With the probe a window on a busy machine may grow until the whole answer goes unread.
        grpc.insecure_channel(ended.target, [("grpc.http2.bdp_probe", 0)]) as channel,
    ):
        answer = encoder_pb2_grpc.EncoderStub(channel).EncodeImages(request)
        next(answer)
        time.sleep(1)  # for as much to be written as goes unread
        ended.process.send_signal(signal.SIGTERM)
        if reads_on:
            ended.wait_for_log("reason=DRAINING")
        else:
            assert ended.process.wait(10) == 4
        with pytest.raises(grpc.RpcError) as cut_short:
            list(answer)
        assert ended.process.wait(10) == 4
    assert cut_short.value.code() == grpc.StatusCode.UNAVAILABLE
    if reads_on:
        assert b"DRAINING" in rpc_status.from_call(cut_short.value).details[0].value
