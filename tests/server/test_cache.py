"""The same image again: from the cache, or from whoever encodes it now."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from encoder_svc.client import AsyncEncoderClient, EncoderClient

if TYPE_CHECKING:
    from collections.abc import Callable

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
