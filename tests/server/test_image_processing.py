"""The whole service with `--image-processing device`, on a CPU: to the byte what it answers with `host`."""

from __future__ import annotations

import asyncio
import io
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from encoder_svc.client import AsyncEncoderClient, EncoderClient, PixelValues, RequestError
from encoder_svc.images.types import DecodedImage
from tests.server.in_process import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from encoder_svc.engine.device import Submitted
    from encoder_svc.images.types import EncoderImage
    from tests.server.in_process import Inside
    from tests.serving import ServerProcess

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
DEVICE = ("--image-processing", "device", "--cache-bytes", "0")
HOST = ("--cache-bytes", "0")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: np.ndarray, mode: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_image_gives_the_hosts_bytes(
    server: Callable[..., ServerProcess], photos: list[Path], family: str
) -> None:
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photos[0]).save(turned, "JPEG", exif=exif)
    files = [photo.read_bytes() for photo in photos]
    raw = [noise(333, 444), noise(9, 400), noise(1, 1)]
    images = [*files, turned.getvalue(), png(noise(60, 90), "RGBA"), png(noise(50, 50), "P"), *raw]
    answers = []
    for options in (HOST, DEVICE):
        with EncoderClient(server(family, *options).target) as client:
            # One at a time: of a batch the last bits depend on who else is in it.
            answers.append([client.encode([image])[0] for image in images])
    for host, device in zip(*answers, strict=True):
        assert host.grid_thw == device.grid_thw
        assert host.embeddings.tobytes() == device.embeddings.tobytes()


def test_model_info_says_where(server: Callable[..., ServerProcess]) -> None:
    places = []
    for options in (HOST, DEVICE):
        with EncoderClient(server("qwen2_vl", *options).target) as client:
            places.append(client.info().processor.image_processing)
    assert places == ["host", "device"]


def test_the_place_is_part_of_the_content_key(server: Callable[..., ServerProcess]) -> None:
    """On most devices its bits are others."""
    keys = []
    for options in (HOST, DEVICE):
        with EncoderClient(server("qwen2_vl", *options).target) as client:
            keys.append(client.retain([noise(80, 90)])[0].key)
    assert keys[0] != keys[1]


def test_pixel_values_are_encoded_as_ever(server: Callable[..., ServerProcess]) -> None:
    values = PixelValues(np.random.default_rng(0).normal(size=(16, 1176)).astype(np.float32), (1, 4, 4))
    answers = []
    for options in (HOST, DEVICE):
        with EncoderClient(server("qwen2_vl", *options).target) as client:
            answers.append(client.encode([values])[0].embeddings.tobytes())
    assert answers[0] == answers[1]


def test_images_of_one_request_fail_and_succeed_each_by_itself(
    server: Callable[..., ServerProcess], photos: list[Path]
) -> None:
    data = photos[0].read_bytes()
    with EncoderClient(server("qwen2_vl", *DEVICE).target) as client:
        seen = list(client.stream([noise(80, 90), data[: len(data) // 2], data, b"nothing"]))
    reasons = {result.image_index: result.reason for result in seen if isinstance(result, RequestError)}
    assert reasons == {1: "IMAGE_CORRUPT", 3: "IMAGE_FORMAT"}
    assert {result.index for result in seen if not isinstance(result, RequestError)} == {0, 2}


def test_the_time_of_the_resize_is_told(server: Callable[..., ServerProcess]) -> None:
    with EncoderClient(server("qwen2_vl", *DEVICE).target) as client:
        timings = client.encode([noise(1500, 1500)])[0].timings
    assert timings.resize_s > 0
    assert timings.decode_s > 0


def test_the_same_image_comes_from_the_cache(server: Callable[..., ServerProcess]) -> None:
    with EncoderClient(server("qwen2_vl", "--image-processing", "device").target) as client:
        first, second = (client.encode([noise(200, 210)])[0] for _ in range(2))
    assert first.embeddings.tobytes() == second.embeddings.tobytes()
    assert first.timings.forward_s > 0
    assert second.timings.forward_s == 0


async def test_a_hundred_requests_for_one_image_resize_it_once(tiny_checkpoint: Callable[[str], Path]) -> None:
    async with (
        serving(tiny_checkpoint("qwen2_vl"), image_processing="device", cache_bytes="1GiB") as (inside, target),
        AsyncEncoderClient(target) as client,
    ):
        seen = watch_batches(inside)
        answers = await asyncio.gather(*[client.encode([noise(600, 600)]) for _ in range(100)])
    assert len({answer[0].embeddings.tobytes() for answer in answers}) == 1
    assert [image.pixels.shape for image in seen] == [(600, 600, 3)]


# How many pixels wait


def watch_batches(inside: Inside, gate: threading.Event | None = None) -> list[EncoderImage]:
    """Every image that the device gets from now on, once ``gate`` is open."""
    seen: list[EncoderImage] = []
    runner = inside.core.engine._lanes[0]._runner
    submit = runner.submit

    def watched(images: Sequence[EncoderImage]) -> Submitted:
        seen.extend(images)
        if gate is not None:
            gate.wait(20)
        return submit(images)

    runner.submit = watched
    return seen


async def test_no_more_pixels_are_decoded_than_may_wait(tiny_checkpoint: Callable[[str], Path]) -> None:
    images = [noise(100, 100, seed) for seed in range(20)]
    async with (
        serving(
            tiny_checkpoint("qwen2_vl"), image_processing="device", max_decoded_bytes="70000", max_batch_images=1
        ) as (inside, target),
        AsyncEncoderClient(target) as client,
    ):
        gate = threading.Event()
        seen = watch_batches(inside, gate)
        calls = [asyncio.create_task(client.encode([image], timeout_s=60)) for image in images]
        while len(seen) < 1 or inside.core.engine.queued_images < 1:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert inside.pipeline.decoded.held == 2 * 30_000  # one at the device, one in the queue
        assert inside.core.engine.queued_images == 1
        calls[5].cancel()
        gate.set()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(not isinstance(end, BaseException) for end in ended) == 19
        assert {type(image) for image in seen} == {DecodedImage}
        while inside.core.admission.num_requests:
            await asyncio.sleep(0.01)
        assert inside.pipeline.decoded.held == 0


async def test_what_the_host_resizes_does_not_wait_for_room(tiny_checkpoint: Callable[[str], Path]) -> None:
    values = PixelValues(np.zeros((16, 1176), np.float32), (1, 4, 4))
    async with (
        serving(tiny_checkpoint("qwen2_vl"), image_processing="device", max_decoded_bytes="1", max_batch_images=1) as (
            inside,
            target,
        ),
        AsyncEncoderClient(target) as client,
    ):
        gate = threading.Event()
        seen = watch_batches(inside, gate)
        calls = [asyncio.create_task(client.encode([noise(80, 80)], timeout_s=60))]
        while not seen:
            await asyncio.sleep(0.01)
        calls += [asyncio.create_task(client.encode([image], timeout_s=60)) for image in (noise(90, 90), values)]
        while not inside.core.engine.queued_images:
            await asyncio.sleep(0.01)
        assert inside.pipeline.decoded.held == 80 * 80 * 3
        gate.set()
        assert len(await asyncio.gather(*calls)) == 3
