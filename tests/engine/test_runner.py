from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
import torch

from encoder_svc.engine.runner import DeviceRunner
from encoder_svc.images.limits import Limits
from encoder_svc.images.patches import normalise
from encoder_svc.images.processor import ImageProcessor
from encoder_svc.images.types import EncodedImageBytes, GridThw, ProcessedImage
from tests.models.towers import FAMILIES, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from encoder_svc.models.tower import VisionTower

NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Towers this small lose more to waiting for a second thread than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def towers(tiny_checkpoint: Callable[[str], Path]) -> Callable[..., VisionTower]:
    return cache(lambda family, **options: load(tiny_checkpoint(family), **options))


def photo(tower: VisionTower, path: Path) -> ProcessedImage:
    processor = ImageProcessor(tower.settings, Limits())
    return processor.plan(EncodedImageBytes(path.read_bytes())).process()


def as_pixel_values(tower: VisionTower, image: ProcessedImage, dtype: str = "float32") -> ProcessedImage:
    """The same image as a Hugging Face processor would send it."""
    settings = tower.settings
    values = normalise(
        torch.from_numpy(image.patches),
        mean=settings.image_mean,
        std=settings.image_std,
        temporal_patch_size=settings.temporal_patch_size,
    )
    return ProcessedImage(image.grid, values.numpy().astype(NUMPY_DTYPES[dtype]))


def random_image(tower: VisionTower, grid: GridThw, seed: int = 0) -> ProcessedImage:
    side = tower.settings.patch_size
    patches = np.random.default_rng(seed).integers(0, 256, (grid.num_patches, 3, side, side), dtype=np.uint8)
    return ProcessedImage(grid, patches)


def encode(tower: VisionTower, images: list[ProcessedImage]) -> list[np.ndarray]:
    """Each image's rows, float32 [rows, width]."""
    embeddings = DeviceRunner(tower).submit(images).wait().embeddings
    dtype, width = NUMPY_DTYPES[tower.dtype], tower.encoder.config.width
    return [np.frombuffer(data, dtype).reshape(-1, width).astype(np.float32) for data in embeddings]


@EVERY_FAMILY
def test_mixed_kinds_of_images_get_in_a_batch_what_each_gets_alone(
    towers: Callable[..., VisionTower], photos: list[Path], family: str
) -> None:
    tower = towers(family)
    images = [photo(tower, path) for path in photos[:3]]
    mixed = [
        images[0],
        as_pixel_values(tower, images[1]),
        as_pixel_values(tower, images[2], "bfloat16"),
        random_image(tower, GridThw(1, 2, 2)),
        as_pixel_values(tower, images[1], "float16"),
    ]
    for got, image in zip(encode(tower, mixed), mixed, strict=True):
        np.testing.assert_allclose(got, encode(tower, [image])[0], atol=1e-4)


@EVERY_FAMILY
def test_pixel_values_give_what_the_image_gives(
    towers: Callable[..., VisionTower], photos: list[Path], family: str
) -> None:
    tower = towers(family)
    image = photo(tower, photos[0])
    np.testing.assert_allclose(encode(tower, [as_pixel_values(tower, image)])[0], encode(tower, [image])[0], atol=1e-5)


@EVERY_FAMILY
def test_bfloat16_pixel_values_are_near_float32_ones(
    towers: Callable[..., VisionTower], photos: list[Path], family: str
) -> None:
    tower = towers(family)
    image = photo(tower, photos[1])
    exact = encode(tower, [image])[0]
    rounded = encode(tower, [as_pixel_values(tower, image, "bfloat16")])[0]
    assert 0 < np.abs(rounded - exact).max() <= 3e-2 * np.abs(exact).max()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@EVERY_FAMILY
def test_each_image_gets_bytes_of_its_own_length(towers: Callable[..., VisionTower], family: str, dtype: str) -> None:
    tower = towers(family, dtype=dtype)
    grids = [GridThw(1, 4, 6), GridThw(1, 2, 2), GridThw(3, 2, 8)]
    images = [random_image(tower, grid) for grid in grids]
    levels = 4 if family == "qwen3_vl" else 1
    itemsize = 4 if dtype == "float32" else 2
    embeddings = DeviceRunner(tower).submit(images).wait().embeddings
    assert [data.nbytes for data in embeddings] == [rows * 64 * levels * itemsize for rows in (6, 1, 12)]
    assert {(data.format, data.contiguous) for data in embeddings} == {("B", True)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@EVERY_FAMILY
def test_a_tower_of_half_precision_is_near_the_float32_one(
    towers: Callable[..., VisionTower], photos: list[Path], family: str, dtype: str
) -> None:
    image = photo(towers(family), photos[2])
    exact = encode(towers(family), [image])[0]
    half = encode(towers(family, dtype=dtype), [image])[0]
    assert 0 < np.abs(half - exact).max() <= 3e-2 * np.abs(exact).max()


def test_two_runs_do_not_share_memory(towers: Callable[..., VisionTower]) -> None:
    tower = towers("qwen2_vl")
    runner = DeviceRunner(tower)
    first = runner.submit([random_image(tower, GridThw(1, 4, 4), seed=1)]).wait().embeddings[0]
    before = first.tobytes()
    runner.submit([random_image(tower, GridThw(1, 4, 4), seed=2)]).wait()
    assert first.tobytes() == before


@EVERY_FAMILY
def test_the_forward_pass_takes_time_and_no_stage_less_than_none(
    towers: Callable[..., VisionTower], family: str
) -> None:
    tower = towers(family)
    result = DeviceRunner(tower).submit([random_image(tower, GridThw(1, 8, 8))]).wait()
    assert result.forward_s > 0
    assert result.h2d_s >= 0
    assert result.d2h_s >= 0


@pytest.mark.cuda
@EVERY_FAMILY
def test_bytes_from_cuda_are_those_from_the_cpu(
    towers: Callable[..., VisionTower], photos: list[Path], family: str
) -> None:
    here, there = towers(family), towers(family, device="cuda")
    images = [photo(here, path) for path in photos]
    images.append(as_pixel_values(here, images[0], "bfloat16"))
    for got, wanted in zip(encode(there, images), encode(here, images), strict=True):
        assert np.abs(got - wanted).max() <= 1e-3 * np.abs(wanted).max()


@pytest.mark.cuda
def test_stages_on_cuda_are_timed_by_its_clock(towers: Callable[..., VisionTower], photos: list[Path]) -> None:
    tower = towers("qwen2_5_vl", device="cuda", dtype="bfloat16")
    result = DeviceRunner(tower).submit([photo(tower, path) for path in photos]).wait()
    assert min(result.h2d_s, result.forward_s, result.d2h_s) > 0
