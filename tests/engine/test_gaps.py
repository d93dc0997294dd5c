"""Short batches run between the layers of a long one."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from encoder_svc.engine.engine import Engine
from encoder_svc.engine.gaps import Job, LayerGaps
from encoder_svc.engine.runner import DeviceRunner
from encoder_svc.engine.scheduler import Scheduler
from encoder_svc.images.types import GridThw, ProcessedImage
from encoder_svc.observability.device import DeviceWatch
from encoder_svc.observability.metrics import Metrics
from tests.models.towers import FAMILIES, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from encoder_svc.models.tower import VisionTower

LARGE, SMALL = (40, 40), (4, 4)


def image(tower: VisionTower, sides: tuple[int, int], seed: int) -> ProcessedImage:
    values = tower.settings.channels * tower.settings.patch_size**2
    patches = np.random.default_rng(seed).integers(0, 256, (sides[0] * sides[1], values), np.uint8)
    return ProcessedImage(GridThw(1, *sides), patches)


def test_a_job_is_done_once_whoever_comes() -> None:
    done = []
    job = Job(lambda: done.append(threading.current_thread().name))
    for _ in range(3):
        job()
    assert len(done) == 1


def test_a_job_that_nobody_waits_for_is_not_done() -> None:
    done: list[int] = []
    job = Job(lambda: done.append(1))
    assert job.future.cancel()
    job()
    assert done == []


def test_what_a_job_raises_reaches_its_future_and_not_the_forward() -> None:
    job: Job[float] = Job(lambda: 1 / 0)
    future = job.future
    job()
    with pytest.raises(ZeroDivisionError):
        future.result()


@pytest.mark.parametrize("fails", [False, True])
def test_a_job_that_is_done_keeps_nothing_for_those_who_come_later(fails: bool) -> None:
    class Batch:
        pass

    def work(batch: Batch) -> Batch:
        if fails:
            raise ValueError
        return batch

    gc.disable()
    try:
        batch = Batch()
        job, kept = Job(partial(work, batch)), weakref.ref(batch)
        del batch
        job()
        assert kept() is None
        job()
    finally:
        gc.enable()


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_forward_disturbs_the_other(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    tower = load(tiny_checkpoint(family))
    runner = DeviceRunner(tower)
    assert runner.gaps is not None
    large, small = image(tower, LARGE, 1), image(tower, SMALL, 2)
    alone = [runner.submit([one]).wait().embeddings for one in (large, small)]
    within = Job(lambda: runner.submit([small]).wait())
    encoded = within.future
    runner.gaps.offer(within)
    result = runner.submit([large]).wait()
    assert [result.embeddings, encoded.result(0).embeddings] == alone
    assert runner.gaps.taken_s >= encoded.result(0).forward_s > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_are_gaps_within_a_long_attention(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr("encoder_svc.attention.torch_sdpa._SCORES_OF_A_PART", 1600**2)
    tower = load(tiny_checkpoint("qwen2_vl"), dtype=dtype)
    runner = DeviceRunner(tower)
    assert runner.gaps is not None
    large, small = image(tower, LARGE, 1), image(tower, SMALL, 2)
    within = Job(lambda: runner.submit([small]).wait())
    encoded = within.future
    alone = [runner.submit([one]).wait().embeddings for one in (large, small)]
    attention, pause = tower.encoder.attention.backend, tower.encoder.attention.backend.pause
    assert pause is not None
    num_pauses = 0

    def offering() -> None:
        nonlocal num_pauses
        num_pauses += 1
        if num_pauses == 2:
            runner.gaps.offer(within)
        pause()
        assert encoded.done() == (num_pauses >= 2)

    monkeypatch.setattr(attention, "pause", offering)
    result = runner.submit([large]).wait()
    assert [result.embeddings, encoded.result(0).embeddings] == alone
    assert num_pauses == tower.encoder.config.depth * (tower.encoder.config.num_heads - 1)


async def test_a_small_image_does_not_wait_for_a_large_one(tiny_checkpoint: Callable[[str], Path]) -> None:
    tower = load(tiny_checkpoint("qwen2_vl"))
    runner = DeviceRunner(tower)
    assert runner.gaps is not None
    engine = Engine(
        [runner], Scheduler(max_batch_patches=4096, max_batch_images=64), watch=DeviceWatch(Metrics()), watchdog_s=30
    )
    ended: list[str] = []
    small_asked, small_queued = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        """The large image's last block waits until the small one is on its way."""
        if not small_asked.is_set():
            small_asked.set()
            assert small_queued.wait(10)

    tower.encoder.blocks[1].register_forward_pre_hook(hold)

    async def encode(name: str, sides: tuple[int, int]) -> bytes:
        item = await engine.encode(image(tower, sides, len(name)), flow=name)
        ended.append(name)
        return bytes(item.data)

    large = asyncio.create_task(encode("large", LARGE))
    while not small_asked.is_set():
        await asyncio.sleep(0.001)
    small = asyncio.create_task(encode("small", SMALL))
    while not runner.gaps._jobs:
        await asyncio.sleep(0.001)
    small_queued.set()
    await asyncio.gather(large, small)
    await engine.aclose()
    assert ended == ["small", "large"]


def test_gaps_are_those_before_every_block(tiny_checkpoint: Callable[[str], Path]) -> None:
    tower = load(tiny_checkpoint("qwen2_vl"))
    gaps, seen = LayerGaps(tower.encoder), []
    runner = DeviceRunner(tower)
    for block in tower.encoder.blocks:
        block.register_forward_pre_hook(lambda *_: gaps.offer(lambda: seen.append(1)))
    with torch.inference_mode():
        runner.submit([image(tower, SMALL, 0)])
    assert len(seen) == len(tower.encoder.blocks) - 1
