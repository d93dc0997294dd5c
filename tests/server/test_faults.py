"""Faults put into a real server: only the images concerned fail, each with its reason; a dead device ends it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import grpc.aio
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from encoder_svc.client import AsyncEncoderClient, RequestError
from encoder_svc.images import processor as images_processor
from encoder_svc.images.types import RawRgb
from encoder_svc.server.app import EXIT_DEVICE_BROKEN
from tests.server.in_process import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from encoder_svc.engine.device import Submitted
    from encoder_svc.images.processor import PlannedImage
    from encoder_svc.images.types import GridThw, ImageSource, ProcessedImage
    from tests.server.in_process import Inside

GOOD_SIDES = (56, 84, 112)
BAD_SIDE = 140


def image(side: int) -> np.ndarray:
    return np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)


def is_bad(processed: ProcessedImage) -> bool:
    return processed.grid.h == BAD_SIDE // 14


def checking_crashes(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = inside.pipeline.processor
    whole = processor.plan

    def plan(source: ImageSource) -> PlannedImage:
        if isinstance(source, RawRgb) and source.height == BAD_SIDE:
            raise ZeroDivisionError("a bug of ours")
        return whole(source)

    monkeypatch.setattr(processor, "plan", plan)


def decoding_crashes(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = images_processor.patchify

    def patchify(pixels: np.ndarray, **options: int) -> object:
        if pixels.shape[0] == BAD_SIDE:
            raise ZeroDivisionError("a bug of ours")
        return whole(pixels, **options)

    monkeypatch.setattr(images_processor, "patchify", patchify)


def on_the_device(error: Exception) -> Callable[[Inside, pytest.MonkeyPatch], None]:
    def install(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = inside.core.engine._lanes[0]._runner
        submit = runner.submit

        def failing(images: Sequence[ProcessedImage]) -> Submitted:
            if any(map(is_bad, images)):
                raise error
            return submit(images)

        monkeypatch.setattr(runner, "submit", failing)

    return install


def output_is_nan(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = inside.core.engine._lanes[0]._runner._tower.encoder
    forward, build = encoder.forward, encoder.build_inputs
    batches = []  # a small batch is built and run between the layers of a large one

    def build_inputs(grids: Sequence[GridThw]) -> object:
        inputs = build(grids)
        batches.append((inputs, list(grids)))
        return inputs

    def with_nan(segments: object, inputs: object) -> torch.Tensor:
        rows = forward(segments, inputs).clone()
        (grids,) = (grids for built, grids in batches if built is inputs)
        start = 0
        for grid in grids:
            end = start + grid.num_rows(2)
            if grid.h == BAD_SIDE // 14:
                rows[end - 1, 3] = torch.nan
            start = end
        return rows

    monkeypatch.setattr(encoder, "build_inputs", build_inputs)
    monkeypatch.setattr(encoder, "forward", with_nan)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        pytest.param(checking_crashes, "INTERNAL", id="check"),
        pytest.param(decoding_crashes, "INTERNAL", id="decode"),
        pytest.param(on_the_device(RuntimeError("a kernel's own words")), "ENCODER_FAILED", id="kernel"),
        pytest.param(on_the_device(torch.OutOfMemoryError("x")), "DEVICE_OUT_OF_MEMORY", id="memory"),
        pytest.param(output_is_nan, "OUTPUT_NOT_FINITE", id="nan"),
    ],
)
async def test_only_the_images_concerned_fail(
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Inside, pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    sent = [image(side) for side in (*GOOD_SIDES, BAD_SIDE, *GOOD_SIDES)]
    async with serving(tiny_checkpoint("qwen2_vl")) as (inside, target), AsyncEncoderClient(target) as client:
        sound = await client.encode(sent[:3])
        fault(inside, monkeypatch)
        seen = [result async for result in client.stream(sent)]
        failed = [result for result in seen if isinstance(result, RequestError)]
        assert [str(error.reason) for error in failed] == [reason]
        assert "a kernel's own words" not in str(failed[0])
        assert "a bug of ours" not in str(failed[0])
        encoded = {result.index: result for result in seen if not isinstance(result, RequestError)}
        assert encoded.keys() == {0, 1, 2, 4, 5, 6}
        for index, result in encoded.items():
            np.testing.assert_allclose(result.embeddings, sound[index % 4].embeddings, rtol=0, atol=1e-4)
        monkeypatch.undo()
        assert len(await client.encode(sent)) == len(sent)


async def test_a_device_that_hangs_ends_the_process(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    async with (
        serving(tiny_checkpoint("qwen2_vl"), watchdog_s=2, exit_code=EXIT_DEVICE_BROKEN) as (inside, target),
        AsyncEncoderClient(target) as client,
        grpc.aio.insecure_channel(target) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        monkeypatch.setattr(inside.core.engine._lanes[0]._runner, "submit", lambda images: hangs.wait(20))
        calls = [asyncio.create_task(client.encode([image(side)])) for side in GOOD_SIDES]
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert {getattr(error, "reason", error) for error in ended} == {"DEVICE_BROKEN"}
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(RequestError) as caught:
            await client.encode([image(56)], timeout_s=5)
        assert caught.value.code == "UNAVAILABLE"
        hangs.set()


_HANGS = """
import sys, time
from encoder_svc.cli import main
from encoder_svc.engine.runner import DeviceRunner
DeviceRunner.submit = lambda runner, images: time.sleep(3600)
sys.exit(main(sys.argv[1:]))
"""


def test_a_device_that_hangs_on_the_first_photograph_ends_the_process_too(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    arguments = ["serve", "--model", tiny_checkpoint("qwen2_vl"), "--device", "cpu", "--port", "0", "--watchdog-s", "1"]
    ended = subprocess.run([sys.executable, "-c", _HANGS, *arguments], capture_output=True, text=True, timeout=50)
    assert ended.returncode == EXIT_DEVICE_BROKEN
    assert "a photograph cannot be encoded at start" in ended.stderr.splitlines()[-1]
