"""Images that are resized in the device thread: on a CPU to the bit what the host makes of them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from encoder_svc.engine import pixels as pixels_module
from encoder_svc.engine.builder import build_batch
from encoder_svc.engine.engine import Engine
from encoder_svc.engine.pixels import Pixels
from encoder_svc.engine.runner import DeviceRunner
from encoder_svc.engine.scheduler import Scheduler
from encoder_svc.errors import RequestError
from encoder_svc.images.limits import Limits
from encoder_svc.images.processor import ImageProcessor
from encoder_svc.images.resize import resize_in_float32
from encoder_svc.images.types import DecodedImage, EncodedImageBytes, GridThw, ProcessedImage, RawRgb
from encoder_svc.observability.device import DeviceWatch
from encoder_svc.observability.metrics import Metrics
from tests.images.test_resize_torch import CASES, image_of, name_of, processor_of
from tests.models.towers import FAMILIES, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from encoder_svc.images.types import EncoderImage, ImageSource
    from encoder_svc.models.tower import VisionTower


@pytest.fixture(scope="module")
def tower(tiny_checkpoint: Callable[[str], Path]) -> VisionTower:
    return load(tiny_checkpoint("qwen2_vl"))


def process(tower: VisionTower, source: ImageSource, place: str) -> EncoderImage:
    settings = replace(tower.settings, image_processing=place)
    return ImageProcessor(settings, Limits()).plan(source).process()


def small(tower: VisionTower) -> VisionTower:
    """The same, which resizes on the device and to few patches."""
    return replace(tower, settings=replace(tower.settings, image_processing="device", max_pixels=28 * 28 * 48))


def noise(height: int, width: int, seed: int = 0) -> RawRgb:
    return RawRgb(height, width, np.random.default_rng(seed).bytes(height * width * 3))


def files(photos: list[Path]) -> list[EncodedImageBytes]:
    return [EncodedImageBytes(photo.read_bytes()) for photo in photos]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_on_a_cpu_patches_are_the_hosts_to_the_bit(case: dict[str, Any], photos: list[Path]) -> None:
    """And so torchvision's, by tests/images/test_resize_torch.py."""
    host = processor_of(case)
    source = image_of(case, {photo.name: photo.read_bytes() for photo in photos})
    settings = replace(host.settings, image_processing="device")
    image = ImageProcessor(settings, Limits()).plan(source).process()
    assert isinstance(image, DecodedImage)
    pixels = Pixels.of([image], patch_size=settings.patch_size, merge_size=settings.merge_size)
    wanted = host.plan(source).process().patches
    assert len(pixels) == len(wanted)
    np.testing.assert_array_equal(pixels.patches().view(wanted.shape).numpy(), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_the_same_bytes(tiny_checkpoint: Callable[[str], Path], photos: list[Path], family: str) -> None:
    tower = load(tiny_checkpoint(family))
    runner = DeviceRunner(tower)
    host, device = (
        runner.submit([process(tower, source, place) for source in files(photos)]).wait()
        for place in ("host", "device")
    )
    assert [bytes(data) for data in device.embeddings] == [bytes(data) for data in host.embeddings]


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_photographs_resized_in_float32_are_near(
    tiny_checkpoint: Callable[[str], Path], photos: list[Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """As a GPU resizes. bfloat16 alone adds as much again."""
    tower = small(load(tiny_checkpoint(family)))
    runner = DeviceRunner(tower)
    images = [process(tower, source, "device") for source in files(photos)]
    exact = runner.submit(images).wait().embeddings
    monkeypatch.setattr(pixels_module, "resize_planes", resize_in_float32)
    for got, wanted in zip(runner.submit(images).wait().embeddings, exact, strict=True):
        values, near = np.frombuffer(got, np.float32), np.frombuffer(wanted, np.float32)
        assert 0 < np.linalg.norm(values - near) <= 1e-2 * np.linalg.norm(near)


def test_images_of_every_kind_stand_in_the_order_given(tower: VisionTower, photos: list[Path]) -> None:
    sources = [*files(photos[:2]), noise(60, 90), noise(28, 28, 1), *files(photos[2:4])]
    places = ("host", "device", "device", "host", "device", "device")
    mixed = [process(tower, source, place) for source, place in zip(sources, places, strict=True)]
    values = np.random.default_rng(3).normal(size=(8, tower.settings.patch_dim)).astype(np.float32)
    mixed.insert(3, ProcessedImage(GridThw(1, 2, 4), values))
    batch = build_batch(mixed, tower.encoder)
    assert [isinstance(segment, Pixels) for segment in batch.segments] == [False, True, False, False, True]
    assert [len(segment) for segment in batch.segments] == [
        sum(mixed[index].grid.num_patches for index in group) for group in ([0], [1, 2], [3], [4], [5, 6])
    ]
    runner = DeviceRunner(tower)
    together = runner.submit(mixed).wait().embeddings
    for got, image in zip(together, mixed, strict=True):
        (alone,) = runner.submit([image]).wait().embeddings
        np.testing.assert_allclose(np.frombuffer(got, np.float32), np.frombuffer(alone, np.float32), atol=1e-4)


def test_only_a_batch_of_bytes_is_uint8(tower: VisionTower) -> None:
    values = ProcessedImage(GridThw(1, 2, 2), np.zeros((4, tower.settings.patch_dim), np.float32))
    images = [process(tower, noise(60, 90), place) for place in ("host", "device")]
    assert build_batch(images, tower.encoder).is_uint8
    assert not build_batch([*images, values], tower.encoder).is_uint8


def test_a_resized_batch_holds_patches_alone(tower: VisionTower) -> None:
    batch = build_batch([process(tower, noise(60, 90), "device")], tower.encoder).resized()
    (segment,) = batch.segments
    assert isinstance(segment, torch.Tensor)
    np.testing.assert_array_equal(segment.view(-1, 3, 14, 14).numpy(), process(tower, noise(60, 90), "host").patches)


def test_the_resize_is_timed_by_itself(tower: VisionTower) -> None:
    runner = DeviceRunner(tower)
    host, device = (process(tower, noise(1000, 1000), place) for place in ("host", "device"))
    pairs = [[runner.submit([image]).wait() for image in (host, device)] for _ in range(5)]
    at_host_s, at_device_s = (min(result.resize_s for result in results) for results in zip(*pairs, strict=True))
    assert at_device_s > 10 * at_host_s
    assert all(result.forward_s > 0 for pair in pairs for result in pair)


# When something fails


async def encode_all(tower: VisionTower, images: list[EncoderImage]) -> tuple[list[object], Engine]:
    """What came of each: bytes, or the reason why not."""
    scheduler = Scheduler(max_batch_patches=100_000, max_batch_images=64)
    engine = Engine([DeviceRunner(tower)], scheduler, watch=DeviceWatch(Metrics()))
    ended = await asyncio.gather(*map(engine.encode, images), return_exceptions=True)
    await engine.aclose()
    seen = [str(end.reason) if isinstance(end, RequestError) else bytes(end.data) for end in ended]
    return seen, engine


@pytest.mark.parametrize(
    ("error", "reason"),
    [(torch.OutOfMemoryError("x"), "DEVICE_OUT_OF_MEMORY"), (RuntimeError("x"), "ENCODER_FAILED")],
    ids=["memory", "kernel"],
)
async def test_an_image_that_cannot_be_resized_fails_alone(
    tower: VisionTower, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    images = [process(tower, noise(80, 80 + 7 * index, index), "device") for index in range(5)]
    sound, _ = await encode_all(tower, images)
    whole = pixels_module.resize_planes

    def resize_planes(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
        if image.shape[1] == 94:
            raise error
        return whole(image, height, width)

    monkeypatch.setattr(pixels_module, "resize_planes", resize_planes)
    seen, _ = await encode_all(tower, images)
    assert seen[2] == reason
    for index in (0, 1, 3, 4):
        got, wanted = (np.frombuffer(results[index], np.float32) for results in (seen, sound))
        np.testing.assert_allclose(got, wanted, atol=1e-4)


async def test_batches_are_halved_when_a_resize_finds_no_memory(
    tower: VisionTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [process(tower, noise(80, 80, index), "device") for index in range(8)]
    whole, calls = pixels_module.resize_planes, []

    def resize_planes(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
        calls.append(image)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("the fifth")
        return whole(image, height, width)

    monkeypatch.setattr(pixels_module, "resize_planes", resize_planes)
    seen, engine = await encode_all(tower, images)
    assert all(isinstance(end, bytes) for end in seen)
    assert engine._scheduler.max_batch_patches < 100_000


# On a GPU


@pytest.mark.cuda
def test_pixels_reach_cuda_as_they_are(tower: VisionTower) -> None:
    image = process(tower, noise(60, 90), "device")
    moved = build_batch([image], tower.encoder).to(torch.device("cuda"))
    (segment,) = moved.segments
    assert isinstance(segment, Pixels)
    assert segment.images[0].is_cuda
    np.testing.assert_array_equal(segment.images[0].cpu().numpy(), image.pixels)


@pytest.mark.cuda
@pytest.mark.parametrize("graphs", [0, 1024], ids=["launched", "graphs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_cuda_embeddings_are_near_those_of_the_host(
    tiny_checkpoint: Callable[[str], Path], photos: list[Path], family: str, graphs: int
) -> None:
    tower = load(tiny_checkpoint(family), device="cuda", dtype="bfloat16")
    tower = small(tower)
    runner = DeviceRunner(tower)
    runner.warm_up(graph_max_patches=graphs, memory_fraction=0.5, max_batch_patches=32_768)
    for sources in ([files(photos)[0]], files(photos), [noise(300, 200), *files(photos[:2])]):
        images = [process(tower, source, "device") for source in sources]
        assert {type(image) for image in images} == {DecodedImage}
        assert runner.prepare(build_batch(images, tower.encoder)).in_graph == bool(graphs)
        result = runner.submit(images).wait()
        assert result.resize_s > 0
        host = runner.submit([process(tower, source, "host") for source in sources]).wait()
        for got, wanted in zip(result.embeddings, host.embeddings, strict=True):
            values, exact = (torch.frombuffer(bytearray(data), dtype=torch.bfloat16).double() for data in (got, wanted))
            assert (values - exact).norm() / exact.norm() <= 3e-2


@pytest.mark.cuda
def test_the_budget_holds_pixels_and_the_largest_resize(tiny_checkpoint: Callable[[str], Path]) -> None:
    tower = load(tiny_checkpoint("qwen2_vl"), device="cuda", dtype="bfloat16")
    there = replace(tower, settings=replace(tower.settings, image_processing="device"))
    budgets = []
    for each in (tower, there):
        runner = DeviceRunner(each)
        runner.warm_up(graph_max_patches=0, memory_fraction=0.5, max_batch_patches=16_384)
        budgets.append(runner.budget)
    plain, with_pixels = budgets
    assert with_pixels.fixed_bytes >= 12 * 2**25
    assert with_pixels.bytes_per_patch > plain.bytes_per_patch + 3 * 31 * 588
    images = [process(there, noise(2800, 5600, seed), "device") for seed in range(2)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner.submit(images).wait()
    taken = torch.cuda.max_memory_allocated() - before
    num_patches = sum(image.grid.num_patches for image in images)
    assert taken <= num_patches * with_pixels.bytes_per_patch + with_pixels.fixed_bytes
