"""The resize of `--image-processing device`: what leaves the host, and what a device that is no CPU makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from encoder_svc.images.limits import MAX_DEVICE_PIXELS, MAX_DEVICE_SHRINK, Limits, fits_device_resize
from encoder_svc.images.patches import patchify
from encoder_svc.images.processor import ImageProcessor, ProcessorSettings
from encoder_svc.images.resize import resize_in_float32, resize_planes
from encoder_svc.images.types import DecodedImage, EncodedImageBytes, GridThw, PixelValues, ProcessedImage, RawRgb
from tests.images.test_resize_torch import CASES, image_of, name_of

if TYPE_CHECKING:
    from pathlib import Path

PHOTO_CASES = [case for case in CASES if "photo" in case["source"]]


def pixels_of(case: dict[str, Any], photo_files: dict[str, bytes], open_image) -> torch.Tensor:
    """[H, W, 3]."""
    source = image_of(case, photo_files)
    if isinstance(source, RawRgb):
        return torch.frombuffer(bytearray(source.data), dtype=torch.uint8).view(source.height, source.width, 3)
    return torch.from_numpy(open_image(source.data).decode())


def size_of(case: dict[str, Any]) -> tuple[int, int]:
    height, width = (side * case["settings"]["patch_size"] for side in case["grid"][1:])
    return height, width


def weights(size: int, resized: int) -> np.ndarray:
    """[resized, size], float64: the cubic of Keys (1981) with a = -0.5, widened by the factor that the size shrinks."""
    scale = size / resized
    widened = max(scale, 1.0)
    centres = (np.arange(resized) + 0.5) * scale
    distance = np.abs((np.arange(size)[None, :] + 0.5 - centres[:, None]) / widened)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    taps = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return taps / taps.sum(axis=1, keepdims=True)


def in_float64(pixels_HWC: torch.Tensor, height: int, width: int) -> np.ndarray:
    """[3, height, width], neither clamped nor rounded."""
    planes_CHW = pixels_HWC.numpy().astype(np.float64).transpose(2, 0, 1)
    rows, columns = weights(planes_CHW.shape[1], height), weights(planes_CHW.shape[2], width)
    return rows @ planes_CHW @ columns.T


# What a device computes


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_in_float32_it_is_what_torchvision_makes_of_it_in_float32(
    case: dict[str, Any], photo_files: dict[str, bytes], open_image
) -> None:
    pixels_HWC = pixels_of(case, photo_files, open_image)
    height, width = size_of(case)
    if pixels_HWC.shape[:2] == (height, width):
        pytest.skip("needs no resize")
    planes_CHW = resize_in_float32(pixels_HWC, height, width)
    settings = case["settings"]
    patches = patchify(
        planes_CHW.permute(1, 2, 0).numpy(), patch_size=settings["patch_size"], merge_size=settings["merge_size"]
    )[1].reshape(-1)
    wanted = np.array(case["float32_patches"])
    got = patches[np.linspace(0, len(patches) - 1, len(wanted)).astype(int)].astype(int)
    # Another processor may add up in another order, and then round a half to the other side.
    assert np.abs(got - wanted).max() <= 1
    assert (got != wanted).mean() <= 0.01


@pytest.mark.parametrize(
    ("size", "resized"), [((97, 61), (84, 56)), ((64, 48), (196, 140)), ((300, 200), (28, 56)), ((5, 90), (28, 28))]
)
def test_in_float32_it_is_the_formula_clamped_and_rounded(size: tuple[int, int], resized: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).choice(np.array([0, 30, 200, 255], np.uint8), (*size, 3))
    got = resize_in_float32(torch.from_numpy(noise), *resized).numpy()
    exact = in_float64(torch.from_numpy(noise), *resized)
    assert np.abs(got - np.clip(exact, 0, 255)).max() <= 0.5 + 1e-3


def test_what_overshoots_is_clamped() -> None:
    edges = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (64, 48, 3))
    exact = in_float64(torch.from_numpy(edges), 196, 140)
    got = resize_in_float32(torch.from_numpy(edges), 196, 140).numpy()
    assert set(got[exact < -5]) == {0}
    assert set(got[exact > 260]) == {255}


@pytest.mark.parametrize(("row", "half", "rounded"), [((2, 2, 4, 0), 2.5, 2), ((2, 3, 5, 4), 3.5, 4)])
def test_a_half_is_rounded_to_the_even_level(row: tuple[int, ...], half: float, rounded: int) -> None:
    pixels_HWC = torch.tensor(row, dtype=torch.uint8).view(1, 4, 1).expand(2, 4, 3).contiguous()
    assert in_float64(pixels_HWC, 2, 8)[0, 0, 3] == half
    assert resize_in_float32(pixels_HWC, 2, 8)[0, 0, 3] == rounded


@pytest.mark.parametrize("case", PHOTO_CASES, ids=name_of)
def test_of_a_photograph_few_values_are_more_than_a_level_from_the_hosts(
    case: dict[str, Any], photo_files: dict[str, bytes], open_image
) -> None:
    """The host's kernel clamps and rounds between its two passes, so at sharp edges the two part by several levels."""
    pixels_HWC = pixels_of(case, photo_files, open_image)
    host, device = (resize(pixels_HWC, *size_of(case)).int() for resize in (resize_planes, resize_in_float32))
    off_by = (host - device).abs()
    assert off_by.max() <= 12
    assert (off_by > 1).float().mean() <= 1e-3


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_on_cuda_it_is_what_float32_gives_on_a_cpu(
    case: dict[str, Any], photo_files: dict[str, bytes], open_image
) -> None:
    pixels_HWC = pixels_of(case, photo_files, open_image)
    there = resize_planes(pixels_HWC.cuda(), *size_of(case))
    assert there.is_cuda
    if pixels_HWC.shape[:2] == size_of(case):
        here = pixels_HWC.permute(2, 0, 1)
    else:
        here = resize_in_float32(pixels_HWC, *size_of(case))
    off_by = (there.cpu().int() - here.int()).abs()
    # They add up in another order, and then round a half to the other side.
    assert off_by.max() <= 1
    assert (off_by > 0).float().mean() <= 3e-3


@pytest.mark.cuda
def test_on_cuda_the_largest_shrink_that_is_let_through_works() -> None:
    pixels_HWC = torch.full((4, 800, 3), 77, dtype=torch.uint8, device="cuda")
    assert (resize_planes(pixels_HWC, 28, 28) == 77).all()
    large = torch.full((4096, 8192, 3), 77, dtype=torch.uint8, device="cuda")
    assert (resize_planes(large, 728, 1456) == 77).all()


# What leaves the host


@pytest.fixture(scope="module")
def on_device(settings: ProcessorSettings) -> ImageProcessor:
    return ImageProcessor(replace(settings, image_processing="device"), Limits())


def test_an_image_leaves_the_host_decoded_and_its_grid_known(
    on_device: ImageProcessor, processor: ImageProcessor, photos: list[Path], open_image
) -> None:
    for photo in photos:
        data = photo.read_bytes()
        plan = on_device.plan(EncodedImageBytes(data))
        image = plan.process()
        assert isinstance(image, DecodedImage)
        np.testing.assert_array_equal(image.pixels, open_image(data).decode())
        assert plan.grid == image.grid == processor.plan(EncodedImageBytes(data)).grid
        assert plan.pixel_bytes == image.pixels.nbytes
        assert image.decode_s > 0


def test_raw_pixels_leave_in_memory_that_torch_can_share(on_device: ImageProcessor) -> None:
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image = on_device.plan(RawRgb(60, 90, pixels_HWC.tobytes())).process()
    assert isinstance(image, DecodedImage)
    assert image.pixels.flags.writeable
    assert image.pixels.flags.c_contiguous
    np.testing.assert_array_equal(image.pixels, pixels_HWC)


def test_pixel_values_are_taken_as_they_are(on_device: ImageProcessor, settings: ProcessorSettings) -> None:
    values = np.ones((8, settings.patch_dim), np.float32)
    plan = on_device.plan(PixelValues(GridThw(1, 2, 4), "float32", values.tobytes()))
    assert plan.pixel_bytes == 0
    np.testing.assert_array_equal(plan.process().patches, values)


def test_what_shrinks_too_much_is_resized_on_the_host(on_device: ImageProcessor, processor: ImageProcessor) -> None:
    height, width = 28 * 8 * 8, 28 * 8 * 8  # the settings leave 28² · 64 pixels of it: a 64th
    raw = RawRgb(height, width, np.random.default_rng(0).bytes(height * width * 3))
    plan = on_device.plan(raw)
    image = plan.process()
    assert isinstance(image, ProcessedImage)
    assert plan.pixel_bytes == 0
    np.testing.assert_array_equal(image.patches, processor.plan(raw).process().patches)


def test_bounds_on_what_the_device_resizes_are_inclusive() -> None:
    assert fits_device_resize(4096, MAX_DEVICE_PIXELS // 4096, MAX_DEVICE_PIXELS)
    assert not fits_device_resize(4096, MAX_DEVICE_PIXELS // 4096 + 1, MAX_DEVICE_PIXELS)
    assert fits_device_resize(100, 10 * MAX_DEVICE_SHRINK, 1000)
    assert not fits_device_resize(100, 10 * MAX_DEVICE_SHRINK + 1, 1000)


def test_the_place_is_part_of_the_hash(settings: ProcessorSettings) -> None:
    """For its bits are others on most devices."""
    assert replace(settings, image_processing="device").hash() != settings.hash()
