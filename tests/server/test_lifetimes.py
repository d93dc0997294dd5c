"""What a call had in hand is free when it has ended, however it ended: not when the collector of cycles comes by."""

from __future__ import annotations

import asyncio
import gc
import io
from collections import Counter
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from PIL import Image

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.client import AsyncEncoderClient, RequestError
from tests.server.in_process import pending, serving

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.server.in_process import Inside

# Each of them has an image, or embeddings, in some shape.
WATCHED = {
    "CheckedImage",
    "Decoded",
    "Embeddings",
    "Encoded",
    "EncodedImageBytes",
    "EncodedItem",
    "Job",
    "LocalRequest",
    "PlannedImage",
    "ProcessedImage",
    "RawRgb",
    "Received",
    "Work",
}


def held() -> Counter[str]:
    return Counter(name for thing in gc.get_objects() if (name := type(thing).__name__) in WATCHED)


def noise(side: int) -> np.ndarray:
    return np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)


def cut_short() -> bytes:
    """A JPEG whose header is whole."""
    file = io.BytesIO()
    Image.fromarray(noise(200)).save(file, "JPEG")
    return file.getvalue()[:3000]


def raised(*_: object) -> None:
    raise RuntimeError("of the device")


async def refused(target: str, image: np.ndarray | bytes, reason: str) -> None:
    async with AsyncEncoderClient(target) as client:
        with pytest.raises(RequestError) as caught:
            await client.encode([image])
    assert caught.value.reason == reason


async def header_is_broken(inside: Inside, target: str) -> None:
    await refused(target, b"no image", "IMAGE_FORMAT")


async def decoding_fails(inside: Inside, target: str) -> None:
    await refused(target, cut_short(), "IMAGE_CORRUPT")


async def request_is_refused(inside: Inside, target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        image = encoder_pb2.Image(encoded=cut_short())
        request = encoder_pb2.EncodeImagesRequest(images=[image], request_id="long" * 1000)
        with pytest.raises(grpc.aio.AioRpcError):
            await encoder_pb2_grpc.EncoderStub(channel).EncodeImages(request).read()


async def device_fails(inside: Inside, target: str) -> None:
    inside.core.engine._lanes[0]._runner._forward = raised
    await refused(target, noise(112), "ENCODER_FAILED")


async def is_not_finite(inside: Inside, target: str) -> None:
    runner = inside.core.engine._lanes[0]._runner
    forward = runner._forward

    def spoilt(*batch: object) -> object:
        rows, finite = forward(*batch)
        return rows, ~finite

    runner._forward = spoilt
    await refused(target, noise(112), "OUTPUT_NOT_FINITE")


async def callers_leave(inside: Inside, target: str) -> None:
    async with AsyncEncoderClient(target) as client:
        for wait_s in (0.01, 0.03, 0.05, 0.1):
            call = asyncio.create_task(client.encode([noise(400), noise(300)]))
            await asyncio.sleep(wait_s)
            call.cancel()
            await asyncio.wait([call])


async def time_is_up(inside: Inside, target: str) -> None:
    async with AsyncEncoderClient(target) as client:
        for timeout_s in (0.01, 0.03, 0.05, 0.1):
            await asyncio.wait([asyncio.create_task(client.encode([noise(400), noise(300)], timeout_s=timeout_s))])


async def is_not_read(inside: Inside, target: str) -> None:
    image = encoder_pb2.Image(raw=encoder_pb2.RawImage(height=800, width=800, data=noise(800).tobytes()))
    async with grpc.aio.insecure_channel(target, [("grpc.http2.bdp_probe", 0)]) as channel:
        call = encoder_pb2_grpc.EncoderStub(channel).EncodeImages(encoder_pb2.EncodeImagesRequest(images=[image] * 32))
        while not inside.core.admission.num_requests:
            await asyncio.sleep(0.01)
        while any(pending(inside.core).values()):
            await asyncio.sleep(0.01)
        for _ in range(200):  # it was told, and does not hear it
            if not held():
                break
            await asyncio.sleep(0.02)
        assert not held()
        with pytest.raises(grpc.aio.AioRpcError, match="No message of the answer was read"):
            _ = [message async for message in call]


@pytest.mark.parametrize(
    "end",
    [
        header_is_broken,
        decoding_fails,
        request_is_refused,
        device_fails,
        is_not_finite,
        callers_leave,
        time_is_up,
        is_not_read,
    ],
)
async def test_nothing_is_held_by_a_call_that_ended(
    tiny_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture, end: Callable
) -> None:
    caplog.set_level("CRITICAL")  # a record that is kept keeps a traceback
    async with serving(tiny_checkpoint("qwen3_vl"), send_timeout_s="0.5", max_pixels="4000000") as (inside, target):
        async with AsyncEncoderClient(target) as client:
            await client.encode([noise(112)])
        gc.collect()
        gc.disable()
        try:
            await end(inside, target)
            for _ in range(200):
                if not any(pending(inside.core).values()) and not (left := held()):
                    break
                await asyncio.sleep(0.02)
            assert not left
        finally:
            gc.enable()
