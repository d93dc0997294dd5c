from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
import torch

from encoder_svc.engine.builder import Scattered, build_batch
from encoder_svc.images.types import GridThw, ProcessedImage
from tests.models.towers import FAMILIES, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from encoder_svc.models.tower import VisionTower


@pytest.fixture(scope="module")
def tower(tiny_checkpoint: Callable[[str], Path]) -> VisionTower:
    return load(tiny_checkpoint("qwen2_vl"))


def uint8_image(grid: GridThw, seed: int = 0) -> ProcessedImage:
    patches = np.random.default_rng(seed).integers(0, 256, (grid.num_patches, 3, 14, 14), dtype=np.uint8)
    return ProcessedImage(grid, patches)


def pixel_value_image(grid: GridThw, dtype: np.typing.DTypeLike = np.float32, seed: int = 0) -> ProcessedImage:
    """As it comes off the wire: a read-only view of the request's bytes."""
    values = np.random.default_rng(seed).normal(size=(grid.num_patches, 3 * 2 * 14 * 14)).astype(dtype)
    return ProcessedImage(grid, np.frombuffer(values.tobytes(), dtype).reshape(values.shape))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_pixel_values_are_taken_as_they_are(tower: VisionTower, dtype: np.typing.DTypeLike) -> None:
    image = pixel_value_image(GridThw(2, 2, 4), dtype)
    (segment,) = build_batch([image], tower.encoder).segments
    np.testing.assert_array_equal(segment.float().numpy(), image.patches.astype(np.float32))


def test_images_of_every_dtype_stand_in_the_order_given(tower: VisionTower) -> None:
    images = [
        pixel_value_image(GridThw(1, 2, 4), ml_dtypes.bfloat16, seed=1),
        uint8_image(GridThw(1, 4, 4), seed=2),
        uint8_image(GridThw(1, 2, 2), seed=3),
        pixel_value_image(GridThw(1, 2, 6), np.float32, seed=4),
        uint8_image(GridThw(1, 6, 2), seed=5),
        pixel_value_image(GridThw(3, 2, 2), np.float16, seed=6),
    ]
    rows = [row for segment in build_batch(images, tower.encoder).segments for row in segment.float()]
    wanted = [row for image in images for row in image.patches.astype(np.float32).reshape(len(image.patches), -1)]
    assert len(rows) == len(wanted)
    for row, same in zip(rows, wanted, strict=True):
        np.testing.assert_array_equal(row.numpy(), same)


def test_neighbours_of_one_dtype_are_one_segment(tower: VisionTower) -> None:
    images = [uint8_image(GridThw(1, 2, 2))] * 3 + [pixel_value_image(GridThw(1, 2, 2))] * 2
    segments = build_batch(images, tower.encoder).segments
    assert [tuple(segment.shape) for segment in segments] == [(12, 588), (8, 1176)]


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, ml_dtypes.bfloat16])
def test_scattered_patches_are_put_together_in_order(dtype: np.typing.DTypeLike) -> None:
    arrays = [np.full((n, 5), n).astype(dtype) for n in (3, 1, 4)]
    scattered = Scattered(arrays)
    out = torch.zeros((10, 5), dtype=scattered.dtype)
    scattered.copy_to(out[1:9])
    assert len(scattered) == 8
    assert torch.equal(out[1:9], scattered.patches())
    assert out[:, 0].tolist() == [0, 3, 3, 3, 1, 4, 4, 4, 4, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_grids_and_boundaries_follow_the_images(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    encoder = load(tiny_checkpoint(family)).encoder
    grids = [GridThw(1, 4, 6), GridThw(2, 2, 2)]
    batch = build_batch([uint8_image(grid) for grid in grids], encoder)
    assert batch.grids == grids
    assert batch.inputs.sequences.lengths == (24, 4, 4)
    assert batch.inputs.position_ids.shape == (32, 2)


@pytest.mark.cuda
def test_a_batch_moved_to_cuda_is_the_same_batch(tiny_checkpoint: Callable[[str], Path]) -> None:
    tower = load(tiny_checkpoint("qwen2_5_vl"))
    images = [uint8_image(GridThw(1, 10, 12)), pixel_value_image(GridThw(1, 2, 2), ml_dtypes.bfloat16)]
    batch = build_batch(images, tower.encoder)
    moved = batch.to(torch.device("cuda"))
    for here, there in zip(batch.segments, moved.segments, strict=True):
        assert there.is_cuda
        assert torch.equal(here, there.cpu())
    assert torch.equal(batch.inputs.position_ids, moved.inputs.position_ids.cpu())
    assert torch.equal(batch.inputs.sequences.cu_seqlens, moved.inputs.sequences.cu_seqlens.cpu())
