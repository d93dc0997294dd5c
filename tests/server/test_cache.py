"""The same image again: from the cache, from whoever encodes it now, or from a lease."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.client import AsyncEncoderClient, EncoderClient, InvalidInputError, NotFoundError, OverloadedError
from tests.serving import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.serving import ServerProcess


def noise(side: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def test_a_cached_answer_is_the_fresh_one_byte_for_byte(server: Callable[..., ServerProcess]) -> None:
    with EncoderClient(server("qwen3_vl").target) as client:
        [fresh], [cached] = client.encode([noise(200, 1)]), client.encode([noise(200, 1)])
    assert cached.embeddings.tobytes() == fresh.embeddings.tobytes()
    assert cached.content_key == fresh.content_key
    assert fresh.timings.decode_s > 0
    assert cached.timings.decode_s == cached.timings.forward_s == 0


def test_without_a_cache_every_image_is_encoded(server: Callable[..., ServerProcess]) -> None:
    with EncoderClient(server("qwen3_vl", "--cache-bytes", "0").target) as client:
        for _ in range(2):
            assert client.encode([noise(200, 1)])[0].timings.forward_s > 0


def test_a_small_cache_evicts_what_was_used_longest_ago(server: Callable[..., ServerProcess]) -> None:
    with EncoderClient(server("qwen2_vl", "--cache-bytes", "64KiB").target) as client:
        one = 7 * 7 * 64 * 4
        images = [noise(196, seed) for seed in range(2 + 64 * 1024 // one)]
        for image in images:
            assert client.encode([image])[0].embeddings.nbytes == one
        assert client.encode([images[-1]])[0].timings.forward_s == 0
        assert client.encode([images[0]])[0].timings.forward_s > 0


async def test_a_hundred_concurrent_requests_for_one_image_are_one_forward(
    server: Callable[..., ServerProcess],
) -> None:
    image = noise(420, 2)
    async with AsyncEncoderClient(server("qwen3_vl").target) as client:
        answers = await asyncio.gather(*[client.encode([image]) for _ in range(100)])
    assert len({answer[0].embeddings.tobytes() for answer in answers}) == 1
    # One forward has one time, and those that found its result in the cache have none.
    assert len({answer[0].timings.forward_s for answer in answers} - {0.0}) == 1


async def test_a_caller_that_leaves_does_not_end_the_work_of_others(server: Callable[..., ServerProcess]) -> None:
    image = noise(1200, 3)
    target = server("qwen2_vl", "--cache-bytes", "0", "--max-pixels", "4000000").target
    async with AsyncEncoderClient(target) as client:
        leader = asyncio.create_task(client.encode([image]))
        await asyncio.sleep(0.05)
        follower = asyncio.create_task(client.encode([image]))
        await asyncio.sleep(0.1)
        leader.cancel()
        assert (await follower)[0].embeddings.any()


async def test_a_leader_without_time_does_not_fail_a_follower_with_time(server: Callable[..., ServerProcess]) -> None:
    target = server("qwen2_vl", "--cache-bytes", "0", "--max-pixels", "4000000").target
    async with AsyncEncoderClient(target) as client:
        busy = asyncio.create_task(client.encode([noise(1600, 4)]))
        await asyncio.sleep(0.1)
        pressed = asyncio.create_task(client.encode([noise(300, 5)], timeout_s=0.15))
        await asyncio.sleep(0.02)
        patient = asyncio.create_task(client.encode([noise(300, 5)], timeout_s=60))
        results = await asyncio.gather(busy, pressed, patient, return_exceptions=True)
    assert results[2][0].embeddings.any()


FETCH = """
import json, sys
from encoder_svc.client import EncoderClient, NotFoundError
with EncoderClient(sys.argv[1]) as client:
    try:
        [image] = client.fetch([sys.argv[2]])
        print(json.dumps({"sum": float(image.embeddings.sum()), "grid": image.grid_thw}))
    except NotFoundError as error:
        print(json.dumps({"reason": error.reason}))
"""


def fetch_in_another_process(target: str, key: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", FETCH, target, key], check=True, capture_output=True, text=True, env=ENVIRONMENT
    )
    return json.loads(done.stdout)


def test_one_process_encodes_another_fetches_and_a_third_is_too_late(server, photos: list[Path]) -> None:
    target = server("qwen3_vl", "--cache-bytes", "0").target
    with EncoderClient(target) as client:
        [streamed] = client.encode(photos[:1])
        [retained] = client.retain(photos[:1], lease_s=6)
        retained_at_s = time.monotonic()
        assert retained.key == streamed.content_key
        assert (retained.grid_thw, retained.rows, retained.width) == (streamed.grid_thw, *streamed.embeddings.shape)
        fetched = fetch_in_another_process(target, retained.key)
        assert tuple(fetched["grid"]) == streamed.grid_thw
        assert fetched["sum"] == pytest.approx(float(streamed.embeddings.sum()), rel=1e-3)
        time.sleep(max(0.0, retained_at_s + 6.1 - time.monotonic()))
    assert fetch_in_another_process(target, retained.key) == {"reason": "KEY_EXPIRED"}
    assert fetch_in_another_process(target, "0" * 64) == {"reason": "KEY_UNKNOWN"}


def test_a_retained_answer_has_no_chunks(server, photos: list[Path]) -> None:
    with grpc.insecure_channel(server("qwen2_vl").target) as channel:
        request = encoder_pb2.EncodeImagesRequest(
            images=[encoder_pb2.Image(encoded=photos[0].read_bytes())], delivery=encoder_pb2.DELIVERY_RETAIN
        )
        events = [r.WhichOneof("event") for r in encoder_pb2_grpc.EncoderStub(channel).EncodeImages(request)]
    assert events == ["header", "done", "summary"]


def test_a_released_key_is_gone_and_can_be_released_once(server) -> None:
    with EncoderClient(server("qwen2_vl").target) as client:
        [retained] = client.retain([noise(100, 20)])
        assert client.fetch([retained.key])[0].embeddings.any()
        assert client.release([retained.key, "f" * 64]) == 1
        with pytest.raises(NotFoundError):
            client.fetch([retained.key])
        assert client.release([retained.key]) == 0


@pytest.mark.parametrize("num_keys", [0, 65])
@pytest.mark.parametrize("call", ["fetch", "release"])
def test_no_keys_and_too_many_keys_are_refused(server, call: str, num_keys: int) -> None:
    with EncoderClient(server("qwen2_vl").target) as client, pytest.raises(InvalidInputError):
        getattr(client, call)(["0" * 64] * num_keys)


def test_more_than_may_be_retained_is_refused(server) -> None:
    with EncoderClient(server("qwen2_vl", "--max-leased-bytes", "20000").target) as client:
        client.retain([noise(196, 6)], lease_s=30)
        with pytest.raises(OverloadedError) as caught:
            client.retain([noise(196, 7)])
        assert caught.value.reason == "LEASE_BYTES_EXHAUSTED"
        # The lease that holds the room is not evicted by images that are merely encoded.
        client.encode([noise(196, seed) for seed in range(8, 12)])


@pytest.mark.parametrize("lease_s", [-1.0, 601.0, float("nan"), float("inf")])
def test_a_lease_out_of_bounds_is_refused(server, photos: list[Path], lease_s: float) -> None:
    with EncoderClient(server("qwen2_vl").target) as client, pytest.raises(InvalidInputError) as caught:
        client.retain(photos[:1], lease_s=lease_s)
    assert caught.value.reason == "LEASE_INVALID"


async def test_a_fetch_waits_for_an_image_that_is_still_being_encoded(server) -> None:
    image = noise(1500, 13)
    target = server("qwen2_vl", "--max-pixels", "4000000").target
    key = content_key(target, image)
    async with AsyncEncoderClient(target) as client:
        retaining = asyncio.create_task(client.retain([image]))
        await asyncio.sleep(0.3)
        assert not retaining.done()
        fetched = await client.fetch([key])
        [retained] = await retaining
    assert retained.key == key
    assert fetched[0].embeddings.any()


def content_key(target: str, image: np.ndarray) -> str:
    """The key that the server will give a raw image, worked out as it does."""
    from encoder_svc.cache.keys import ContentKeys

    with EncoderClient(target) as client:
        info = client.info()
    keys = ContentKeys(info.config_hash, info.processor.hash)
    height, width, _ = image.shape
    return keys.key((b"raw-rgb", str(height).encode(), str(width).encode(), image.tobytes()))
