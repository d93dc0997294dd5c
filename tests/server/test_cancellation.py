"""Callers that leave take their work with them, and nothing else."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

from encoder_svc.client import AsyncEncoderClient
from encoder_svc.images.types import RawRgb
from tests.server.in_process import pending, serving

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from encoder_svc.images.processor import PlannedImage
    from encoder_svc.server.core import Decoded
    from tests.server.in_process import Inside

NUM_REQUESTS = 1_000
AT_ONCE = 100
# Threads of pools, which start one when they are first short of one, up to a number of their own.
POOLED = ("asyncio_", "header_", "image_", "device-0")


def images() -> list[np.ndarray]:
    random_ = np.random.default_rng(0)
    sides = random_.integers(28, 170, (NUM_REQUESTS, 2))
    return [random_.integers(0, 256, (height, width, 3), np.uint8) for height, width in sides]


async def reference(inside: Inside, image: np.ndarray) -> bytes:
    """The image encoded by itself."""
    plan = inside.pipeline.processor.plan(RawRgb(*image.shape[:2], image.tobytes()))
    return bytes((await inside.core.engine.encode(plan.process())).data)


def numbers(inside: Inside) -> dict[str, int]:
    """What is in work or kept, everywhere that something can be."""
    return pending(inside.core) | {
        "decoded": inside.pipeline.decoded.held,
        "tasks": len(asyncio.all_tasks()),
        "threads": sum(not thread.name.startswith(POOLED) for thread in threading.enumerate()),
        "files": psutil.Process().num_fds(),
    }


@pytest.mark.parametrize("place", ["host", "device"])
async def test_half_of_a_thousand_requests_leave(tiny_checkpoint: Callable[[str], Path], place: str) -> None:
    async with (
        # Of the pixels that wait for a device, as many as a few images have.
        serving(tiny_checkpoint("qwen2_5_vl"), image_processing=place, max_decoded_bytes="500000") as (
            inside,
            target,
        ),
        AsyncEncoderClient(target) as client,
    ):
        sent = images()
        await asyncio.gather(*(client.encode([image]) for image in sent[:AT_ONCE]))
        before = numbers(inside)
        chance = random.Random(1)
        leaving = set(chance.sample(range(NUM_REQUESTS), NUM_REQUESTS // 2))
        at_once = asyncio.Semaphore(AT_ONCE)
        received: dict[int, bytes] = {}

        async def one(index: int) -> None:
            async with at_once:
                call = asyncio.create_task(client.encode([sent[index]], timeout_s=60))
                if index in leaving:
                    # Anywhere in its life: being sent, read, decoded, queued, encoded, answered.
                    await asyncio.sleep(chance.uniform(0, 0.4))
                    call.cancel()
                done, _ = await asyncio.wait([call])
                if not call.cancelled():
                    received[index] = done.pop().result()[0].embeddings.tobytes()

        await asyncio.gather(*map(one, range(NUM_REQUESTS)))
        stayed = set(range(NUM_REQUESTS)) - leaving
        assert stayed <= received.keys()
        assert len(received) < NUM_REQUESTS - 50  # cancelling came in time for many
        for _ in range(100):
            gc.collect()
            after = numbers(inside)
            if not (left := {name: (before[name], after[name]) for name in before if after[name] > before[name]}):
                break
            await asyncio.sleep(0.05)
        assert not left, sorted(thread.name for thread in threading.enumerate())
        for index in chance.sample(sorted(received), 200):
            expected = np.frombuffer(await reference(inside, sent[index]), np.float32)
            seen = np.frombuffer(received[index], np.float32)
            np.testing.assert_allclose(seen, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


async def test_what_a_thread_still_decodes_holds_its_room_when_its_caller_is_gone(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes, may_end = threading.Event(), threading.Event()
    async with serving(tiny_checkpoint("qwen2_vl")) as (inside, target), AsyncEncoderClient(target) as client:
        process = inside.pipeline._process

        def slow(plan: PlannedImage) -> Decoded:
            decodes.set()
            assert may_end.wait(20)
            return process(plan)

        monkeypatch.setattr(inside.pipeline, "_process", slow)
        call = asyncio.create_task(client.encode([np.zeros((60, 60, 3), np.uint8)]))
        await asyncio.to_thread(decodes.wait, 20)
        held = inside.pipeline.decoded.held
        assert held
        call.cancel()
        while any(pending(inside.core).values()):
            await asyncio.sleep(0.01)
        assert inside.pipeline.decoded.held == held
        may_end.set()
        while inside.pipeline.decoded.held:
            await asyncio.sleep(0.01)
