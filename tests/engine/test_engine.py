"""The engine on a stand-in for the device, the one part of it that is a declared seam."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from encoder_svc.engine.device import BatchResult
from encoder_svc.engine.engine import Engine
from encoder_svc.engine.scheduler import Scheduler
from encoder_svc.errors import AttentionKernelError, RequestError
from encoder_svc.images.types import GridThw, ProcessedImage
from encoder_svc.observability.device import DeviceWatch
from encoder_svc.observability.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable


class OutOfMemoryError(Exception):
    pass


@dataclass
class Submitted:
    finish: Callable[[], BatchResult]
    computed: threading.Event

    def wait_until_computed(self) -> None:
        self.computed.wait(10)

    def wait(self) -> BatchResult:
        return self.finish()


@dataclass
class Device:
    """Records its batches, waits at a gate, and answers each image with its own number.

    ``fault`` is called with the numbers of a batch and may raise.
    """

    depth: int = 1
    gaps: SimpleNamespace | None = None
    fault: Callable[[list[int]], None] = lambda numbers: None
    not_finite: frozenset[int] = frozenset()
    broken: bool = False
    batches: list[list[int]] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.computed = threading.Event()
        self.computed.set()

    def submit(self, images: list[ProcessedImage]) -> Submitted:
        numbers = [number(image) for image in images]
        self.batches.append(numbers)
        self.threads.add(threading.current_thread().name)
        self.fault(numbers)

        def finish() -> BatchResult:
            self.gate.wait(10)
            return BatchResult(
                [None if n in self.not_finite else memoryview(bytes([n])) for n in numbers], 0.1, 0.2, 0.3
            )

        return Submitted(finish, self.computed)

    def is_out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, OutOfMemoryError)

    def is_broken(self) -> bool:
        return self.broken


def number(image: ProcessedImage) -> int:
    return int(image.patches.flat[0])


def image(number: int, patches: int = 4) -> ProcessedImage:
    return ProcessedImage(GridThw(1, 2, patches // 2), np.full((patches, 3, 2, 2), number, np.uint8))


def engine(*devices: Device, watchdog_s: float = 10, watch: DeviceWatch | None = None, **bounds: int) -> Engine:
    return Engine(
        devices,
        Scheduler(**({"max_batch_patches": 16, "max_batch_images": 8} | bounds)),
        watch=watch or DeviceWatch(Metrics()),
        watchdog_s=watchdog_s,
    )


async def behind_a_gate(running: Engine, device: Device, *numbers: int) -> list:
    """Image 0 is on the device, which waits; then the others are queued."""
    device.gate.clear()
    tasks = [asyncio.create_task(running.encode(image(0)))]
    while not device.batches:
        await asyncio.sleep(0.001)
    tasks += [asyncio.create_task(running.encode(image(n))) for n in numbers]
    await asyncio.sleep(0.01)
    return tasks


async def behind_two_that_compute(running: Engine, device: Device) -> list:
    """Images 0 and 1 are on the device, in batches of their own, not computed and not on their way back."""
    device.computed.clear()
    tasks = await behind_a_gate(running, device, 1)
    while len(device.batches) < 2:
        await asyncio.sleep(0.001)
    return tasks


async def outcomes(tasks: list) -> list[int | str]:
    """Each image's number, or the reason that it failed for."""
    results = await asyncio.gather(*tasks, return_exceptions=True)
    return [result.reason if isinstance(result, RequestError) else bytes(result.data)[0] for result in results]


async def test_an_image_comes_back_with_its_own_bytes_and_times() -> None:
    running = engine(Device())
    item = await running.encode(image(7))
    assert bytes(item.data) == b"\x07"
    assert (item.h2d_s, item.forward_s, item.d2h_s) == (0.1, 0.2, 0.3)
    assert item.queue_s >= 0
    await running.aclose()


async def test_what_waits_while_a_batch_runs_goes_into_the_next_one() -> None:
    running = engine(device := Device())
    tasks = await behind_a_gate(running, device, *range(1, 7))
    device.gate.set()
    assert await outcomes(tasks) == list(range(7))
    assert device.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert len(device.threads) == 1
    await running.aclose()


async def test_what_comes_while_a_batch_is_packed_goes_into_one_more() -> None:
    """And not each into a batch of its own that its maker has no time for yet."""
    running = engine(device := Device(depth=3))
    packed = threading.Event()
    device.fault = lambda numbers: packed.wait(10)
    tasks = [asyncio.create_task(running.encode(image(0)))]
    while not device.batches:
        await asyncio.sleep(0.001)
    for number in (1, 2, 3):
        tasks.append(asyncio.create_task(running.encode(image(number))))
        await asyncio.sleep(0.01)
    packed.set()
    assert await outcomes(tasks) == [0, 1, 2, 3]
    assert device.batches == [[0], [1, 2, 3]]
    await running.aclose()


async def test_a_deep_device_gets_its_next_batch_while_one_runs() -> None:
    running = engine(device := Device(depth=3))
    tasks = await behind_two_that_compute(running, device)
    assert device.batches == [[0], [1]]
    tasks += [asyncio.create_task(running.encode(image(n))) for n in (2, 3)]
    await asyncio.sleep(0.01)
    assert device.batches == [[0], [1]]
    device.gate.set()
    device.computed.set()
    assert await outcomes(tasks) == [0, 1, 2, 3]
    assert device.batches == [[0], [1], [2, 3]]
    await running.aclose()


async def test_a_full_batch_is_packed_before_one_of_two_is_computed_and_no_fourth() -> None:
    running = engine(device := Device(depth=3))
    tasks = await behind_two_that_compute(running, device)
    tasks += [asyncio.create_task(running.encode(image(n))) for n in range(2, 10)]
    while len(device.batches) < 3:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    assert device.batches == [[0], [1], [2, 3, 4, 5]]
    device.gate.set()
    device.computed.set()
    assert await outcomes(tasks) == list(range(10))
    assert device.batches == [[0], [1], [2, 3, 4, 5], [6, 7, 8, 9]]
    await running.aclose()


async def test_what_is_computed_makes_room_while_it_is_on_its_way_back() -> None:
    running = engine(device := Device(depth=3))
    tasks = await behind_two_that_compute(running, device)
    tasks.append(asyncio.create_task(running.encode(image(2))))
    await asyncio.sleep(0.01)
    assert device.batches == [[0], [1]]
    device.computed.set()
    while len(device.batches) < 3:
        await asyncio.sleep(0.001)
    assert not any(task.done() for task in tasks)
    device.gate.set()
    assert await outcomes(tasks) == [0, 1, 2]
    await running.aclose()


async def test_devices_that_are_free_share_what_comes_at_once() -> None:
    running = engine(first := Device(), second := Device())
    assert await outcomes([running.encode(image(n)) for n in range(4)]) == [0, 1, 2, 3]
    assert (first.batches, second.batches) == ([[0, 1]], [[2, 3]])
    await running.aclose()


async def test_a_device_takes_what_comes_while_another_is_busy() -> None:
    running = engine(first := Device(), second := Device())
    held = await behind_a_gate(running, first)
    assert await outcomes([running.encode(image(n)) for n in (1, 2)]) == [1, 2]
    assert (first.batches, second.batches) == ([[0]], [[1, 2]])
    first.gate.set()
    assert await outcomes(held) == [0]
    await running.aclose()


async def test_a_short_image_takes_a_free_device_rather_than_a_gap_of_one_that_is_busy() -> None:
    gaps = SimpleNamespace(offer=lambda job: pytest.fail("a gap was taken"))
    running = engine(first := Device(gaps=gaps), second := Device(gaps=gaps))
    first.gate.clear()
    large = asyncio.create_task(running.encode(image(0, 16)))
    while not first.batches:
        await asyncio.sleep(0.001)
    assert await outcomes([running.encode(image(1))]) == [1]
    assert second.batches == [[1]]
    first.gate.set()
    assert await outcomes([large]) == [0]
    await running.aclose()


async def test_a_short_image_takes_a_gap_where_all_devices_are_busy() -> None:
    offered: SimpleQueue[Callable[[], None]] = SimpleQueue()
    busy = SimpleNamespace(offer=offered.put)
    devices = [Device(gaps=busy), Device(gaps=busy)]
    holding = threading.Event()

    def hold(numbers: list[int]) -> None:
        if numbers != [2]:
            holding.wait(10)

    for device in devices:
        device.fault = hold
    running = engine(*devices)
    large = [asyncio.create_task(running.encode(image(n, 16))) for n in (0, 1)]
    while not all(device.batches for device in devices):
        await asyncio.sleep(0.001)
    small = asyncio.create_task(running.encode(image(2)))
    while offered.empty():
        await asyncio.sleep(0.001)
    await asyncio.to_thread(offered.get(timeout=10))
    assert await outcomes([small]) == [2]
    holding.set()
    assert await outcomes(large) == [0, 1]
    await running.aclose()


async def test_one_device_that_breaks_breaks_the_engine() -> None:
    def fault(numbers: list[int]) -> None:
        raise RuntimeError("sticky")

    running = engine(Device(), Device(fault=fault, broken=True))
    assert await outcomes([running.encode(image(n)) for n in range(2)]) == [0, "DEVICE_BROKEN"]
    assert running.broken.is_set()
    await running.aclose()


@pytest.mark.parametrize("error", [OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("raises", ["itself", "from another"])
async def test_what_a_failed_batch_held_is_free_when_its_parts_run(
    caplog: pytest.LogCaptureFixture, error: type[Exception], raises: str
) -> None:
    caplog.set_level(logging.CRITICAL)  # a record that is kept keeps the traceback

    class Activations:
        pass

    held: list[weakref.ref[Activations]] = []
    left: list[int] = []

    def fault(numbers: list[int]) -> None:
        left.append(sum(one() is not None for one in held))
        activations = Activations()
        held.append(weakref.ref(activations))
        if raises == "itself":
            raise error
        try:
            raise ValueError
        except ValueError as cause:
            raise error from cause

    gc.disable()
    try:
        running = engine(device := Device(fault=fault))
        tasks = await behind_a_gate(running, device, 1, 2, 3)
        device.gate.set()
        assert len(await outcomes(tasks)) == 4
        assert len(left) >= 5
        assert not any(left)
        await running.aclose()
        assert not any(one() for one in held)
    finally:
        gc.enable()


async def test_a_cancelled_image_never_reaches_the_device() -> None:
    running = engine(device := Device())
    first, unwanted, wanted = await behind_a_gate(running, device, 1, 2)
    unwanted.cancel()
    await asyncio.sleep(0.01)
    assert running.queued_patches == 4
    device.gate.set()
    await asyncio.gather(first, wanted)
    assert device.batches == [[0], [2]]
    await running.aclose()


async def test_cancelling_an_image_on_the_device_harms_nobody() -> None:
    running = engine(device := Device())
    first, second = await behind_a_gate(running, device, 1)
    first.cancel()
    await asyncio.sleep(0.01)
    device.gate.set()
    assert bytes((await second).data) == b"\x01"
    assert bytes((await running.encode(image(5))).data) == b"\x05"
    await running.aclose()


async def test_an_image_whose_time_is_up_is_dropped_before_it_costs_anything() -> None:
    running = engine(device := Device())
    [first] = await behind_a_gate(running, device)
    late = asyncio.create_task(running.encode(image(1), timeout_s=0.01))
    await asyncio.sleep(0.05)
    device.gate.set()
    assert await outcomes([late, first]) == ["DEADLINE_EXCEEDED", 0]
    assert device.batches == [[0]]
    await running.aclose()


async def test_only_the_image_that_breaks_a_batch_fails() -> None:
    def fault(numbers: list[int]) -> None:
        if 2 in numbers:
            raise RuntimeError("kernel")

    running = engine(device := Device(fault=fault))
    tasks = await behind_a_gate(running, device, 1, 2, 3)
    device.gate.set()
    assert await outcomes(tasks) == [0, 1, "ENCODER_FAILED", 3]
    assert device.batches == [[0], [1, 2, 3], [1], [2], [3]]
    assert await outcomes([running.encode(image(4))]) == [4]
    await running.aclose()


async def test_a_failure_says_nothing_of_the_library_that_failed() -> None:
    def fault(numbers: list[int]) -> None:
        raise RuntimeError("CUDA error 700 in libfoo")

    running = engine(Device(fault=fault))
    with pytest.raises(RequestError) as caught:
        await running.encode(image(1))
    assert "CUDA" not in caught.value.message
    await running.aclose()


async def test_an_image_with_nan_in_its_output_fails_alone() -> None:
    running = engine(device := Device(not_finite=frozenset({1})))
    tasks = await behind_a_gate(running, device, 1, 2)
    device.gate.set()
    assert await outcomes(tasks) == [0, "OUTPUT_NOT_FINITE", 2]
    await running.aclose()


async def test_a_batch_too_large_for_the_memory_runs_in_halves_and_lowers_the_budget() -> None:
    def fault(numbers: list[int]) -> None:
        if len(numbers) > 2:
            raise OutOfMemoryError

    running = engine(device := Device(fault=fault))
    tasks = await behind_a_gate(running, device, 1, 2, 3, 4)
    device.gate.set()
    assert await outcomes(tasks) == [0, 1, 2, 3, 4]
    assert device.batches == [[0], [1, 2, 3, 4], [1, 2], [3, 4]]
    tasks = await behind_a_gate(running, device, 5, 6, 7)
    device.gate.set()
    await outcomes(tasks)
    assert {len(batch) for batch in device.batches[4:]} == {2}
    await running.aclose()


async def test_memory_that_a_large_image_has_is_not_held_against_what_runs_beside_it() -> None:
    offered: SimpleQueue[Callable[[], None]] = SimpleQueue()
    tried: list[list[int]] = []

    def fault(numbers: list[int]) -> None:
        tried.append(numbers)
        if numbers == [0]:
            offered.get(timeout=10)()
        elif len(tried) == 2:
            raise OutOfMemoryError

    running = engine(Device(fault=fault, gaps=SimpleNamespace(offer=offered.put)))
    large = asyncio.create_task(running.encode(image(0, 16)))
    while not tried:
        await asyncio.sleep(0.001)
    small = asyncio.create_task(running.encode(image(1)))
    assert await outcomes([large, small]) == [0, 1]
    assert tried == [[0], [1], [1]]
    assert running._scheduler.max_batch_patches == 16
    await running.aclose()


async def test_an_image_too_large_for_the_memory_fails_alone() -> None:
    def fault(numbers: list[int]) -> None:
        if 3 in numbers:
            raise OutOfMemoryError

    running = engine(device := Device(fault=fault))
    tasks = await behind_a_gate(running, device, 1, 2, 3)
    device.gate.set()
    assert await outcomes(tasks) == [0, 1, 2, "DEVICE_OUT_OF_MEMORY"]
    await running.aclose()


async def test_a_broken_device_fails_everything_that_waits_and_everything_new() -> None:
    def fault(numbers: list[int]) -> None:
        if 1 in numbers:
            raise RuntimeError("sticky")

    running = engine(device := Device(fault=fault, broken=True), max_batch_images=1)
    tasks = await behind_a_gate(running, device, 1, 2, 3)
    device.gate.set()
    assert await outcomes(tasks) == [0, "DEVICE_BROKEN", "DEVICE_BROKEN", "DEVICE_BROKEN"]
    assert running.broken.is_set()
    assert await outcomes([running.encode(image(4))]) == ["DEVICE_BROKEN"]
    assert device.batches == [[0], [1]]
    await running.aclose()


async def test_a_batch_that_hangs_breaks_the_device() -> None:
    running = engine(device := Device(), watchdog_s=0.1)
    tasks = await behind_a_gate(running, device, 1)
    assert await outcomes(tasks) == ["DEVICE_BROKEN", "DEVICE_BROKEN"]
    assert running.broken.is_set()
    await running.aclose()
    device.gate.set()


async def test_an_attention_kernel_that_fails_is_named() -> None:
    def fault(numbers: list[int]) -> None:
        raise AttentionKernelError("FLASH_ATTN", "fa4", "CUDA error: no kernel image")

    running = engine(Device(fault=fault))
    with pytest.raises(RequestError) as caught:
        await running.encode(image(1))
    assert caught.value.reason == "ENCODER_FAILED"
    assert caught.value.message == "The attention kernel FLASH_ATTN (fa4) failed."
    await running.aclose()


# What is told to the watch


@pytest.mark.parametrize(
    ("error", "outcome"), [(OutOfMemoryError(), "out_of_memory"), (RuntimeError("of the device"), "failed")]
)
async def test_a_batch_that_fails_is_told_with_its_parts(error: Exception, outcome: str) -> None:
    def fault(numbers: list[int]) -> None:
        if len(numbers) > 1:
            raise error

    metrics = Metrics()
    running = engine(device := Device(fault=fault), watch=DeviceWatch(metrics))
    tasks = await behind_a_gate(running, device, 1, 2)
    assert running.watch.batch_age_s > 0
    device.gate.set()
    assert await outcomes(tasks) == [0, 1, 2]
    await running.aclose()
    counts = {
        name: metrics.registry.get_sample_value("encoder_batches_total", {"outcome": name})
        for name in ("encoded", "failed", "out_of_memory", "hung")
    }
    assert counts == dict.fromkeys(counts, 0) | {"encoded": 3, outcome: 1}
    assert metrics.registry.get_sample_value("encoder_device_busy_seconds_total") == pytest.approx(3 * 0.2)
    assert running.watch.batch_age_s == 0


async def test_a_batch_that_hangs_is_told() -> None:
    metrics = Metrics()
    running = engine(device := Device(), watchdog_s=0.05, watch=DeviceWatch(metrics))
    tasks = await behind_a_gate(running, device)
    assert await outcomes(tasks) == ["DEVICE_BROKEN"]
    device.gate.set()
    await running.aclose()
    assert metrics.registry.get_sample_value("encoder_batches_total", {"outcome": "hung"}) == 1
