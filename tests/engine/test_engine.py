"""The engine on a stand-in for the device, the one part of it that is a declared seam."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from encoder_svc.engine.engine import Engine
from encoder_svc.engine.runner import BatchResult
from encoder_svc.engine.scheduler import Scheduler
from encoder_svc.errors import RequestError
from encoder_svc.images.types import GridThw, ProcessedImage


class Device:
    """Records its batches, waits at a gate, and answers each image with its own first byte."""

    def __init__(self, error: Exception | None = None) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self._error = error

    def run(self, images: list[ProcessedImage]) -> BatchResult:
        self.batches.append([name(image) for image in images])
        self.threads.add(threading.current_thread().name)
        self.gate.wait(10)
        if self._error is not None:
            raise self._error
        return BatchResult([memoryview(bytes([name(image)])) for image in images], 0.1, 0.2, 0.3)


def name(image: ProcessedImage) -> int:
    return int(image.patches.flat[0])


def image(number: int, patches: int = 4) -> ProcessedImage:
    return ProcessedImage(GridThw(1, 2, patches // 2), np.full((patches, 3, 2, 2), number, np.uint8))


def engine(device: Device, **bounds: int) -> Engine:
    defaults = {"max_batch_patches": 16, "max_batch_images": 8, "max_queued_patches": 1000}
    return Engine(device, Scheduler(**(defaults | bounds)))  # type: ignore[arg-type]


async def test_an_image_comes_back_with_its_own_bytes_and_times() -> None:
    running = engine(Device())
    item = await running.encode(image(7))
    assert bytes(item.data) == b"\x07"
    assert (item.h2d_s, item.forward_s, item.d2h_s) == (0.1, 0.2, 0.3)
    assert item.queue_s >= 0
    await running.aclose()


async def test_what_waits_while_a_batch_runs_goes_into_the_next_one() -> None:
    device = Device()
    device.gate.clear()
    running = engine(device)
    first = asyncio.create_task(running.encode(image(0)))
    while not device.batches:
        await asyncio.sleep(0.001)
    rest = [asyncio.create_task(running.encode(image(number))) for number in range(1, 7)]
    await asyncio.sleep(0.01)
    device.gate.set()
    items = await asyncio.gather(first, *rest)
    assert device.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert [bytes(item.data)[0] for item in items] == list(range(7))
    assert len(device.threads) == 1
    await running.aclose()


async def test_a_cancelled_image_never_reaches_the_device() -> None:
    device = Device()
    device.gate.clear()
    running = engine(device)
    first = asyncio.create_task(running.encode(image(0)))
    while not device.batches:
        await asyncio.sleep(0.001)
    unwanted, wanted = (asyncio.create_task(running.encode(image(number))) for number in (1, 2))
    await asyncio.sleep(0.01)
    unwanted.cancel()
    await asyncio.sleep(0.01)
    assert running.queued_patches == 4
    device.gate.set()
    await asyncio.gather(first, wanted)
    assert device.batches == [[0], [2]]
    await running.aclose()


async def test_cancelling_an_image_on_the_device_harms_nobody() -> None:
    device = Device()
    device.gate.clear()
    running = engine(device)
    tasks = [asyncio.create_task(running.encode(image(number))) for number in range(2)]
    while not device.batches:
        await asyncio.sleep(0.001)
    tasks[0].cancel()
    await asyncio.sleep(0.01)
    device.gate.set()
    assert bytes((await tasks[1]).data) == b"\x01"
    assert bytes((await running.encode(image(5))).data) == b"\x05"
    await running.aclose()


async def test_a_failing_batch_fails_its_images_and_the_next_one_runs() -> None:
    device = Device(error=RuntimeError("kernel"))
    running = engine(device)
    with pytest.raises(RequestError) as caught:
        await running.encode(image(1))
    assert caught.value.reason == "ENCODER_FAILED"
    assert "kernel" not in caught.value.message
    device._error = None
    assert bytes((await running.encode(image(2))).data) == b"\x02"
    await running.aclose()


async def test_an_image_whose_time_is_up_is_dropped_before_it_costs_anything() -> None:
    device = Device()
    device.gate.clear()
    running = engine(device)
    first = asyncio.create_task(running.encode(image(0)))
    while not device.batches:
        await asyncio.sleep(0.001)
    late = asyncio.create_task(running.encode(image(1), timeout_s=0.01))
    await asyncio.sleep(0.05)
    device.gate.set()
    with pytest.raises(RequestError) as caught:
        await late
    assert caught.value.reason == "DEADLINE_EXCEEDED"
    await first
    assert device.batches == [[0]]
    await running.aclose()


async def test_a_full_queue_refuses_at_once() -> None:
    device = Device()
    device.gate.clear()
    running = engine(device, max_queued_patches=8)
    first = asyncio.create_task(running.encode(image(0)))
    while not device.batches:
        await asyncio.sleep(0.001)
    queued = [asyncio.create_task(running.encode(image(number))) for number in (1, 2)]
    await asyncio.sleep(0.01)
    with pytest.raises(RequestError) as caught:
        await running.encode(image(3))
    assert (caught.value.reason, caught.value.code) == ("QUEUE_FULL", "RESOURCE_EXHAUSTED")
    device.gate.set()
    await asyncio.gather(first, *queued)
    await running.aclose()
