from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from encoder_svc.images.types import GridThw
from encoder_svc.models.positions import patch_positions
from encoder_svc.models.qwen3_vl import interpolation_corners

MERGE = 2
GRID_SIDES = st.sampled_from([1, 2, 5, 8, 48])
SIDES = st.integers(1, 40).map(lambda blocks: blocks * MERGE)
GRIDS = st.lists(st.builds(GridThw, st.integers(1, 2), SIDES, SIDES), min_size=1, max_size=3)
OFTEN = settings(max_examples=30, deadline=None)


def interpolated(indices: np.ndarray, weights: np.ndarray, side: int) -> np.ndarray:
    """What corners make of a grid of learned values; corners of no weight may differ."""
    learned = np.random.default_rng(0).normal(size=side * side)
    return (learned[indices] * weights).sum(axis=1)


@OFTEN
@given(GRIDS, GRID_SIDES)
def test_interpolation_is_the_references(grids: list[GridThw], side: int) -> None:
    ours = interpolation_corners(grids, MERGE, side)
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor(grids), side, align_corners=True, spatial_merge_size=MERGE
    )
    wanted = interpolated(indices.numpy(), weights.numpy(), side)
    np.testing.assert_allclose(interpolated(*ours, side), wanted, atol=2e-5)


@OFTEN
@given(GRIDS, GRID_SIDES)
def test_corner_weights_add_up_to_one(grids: list[GridThw], side: int) -> None:
    _, weights = interpolation_corners(grids, MERGE, side)
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("side", [2, 8, 48])
def test_an_image_as_large_as_the_grid_takes_the_learned_positions_as_they_are(side: int) -> None:
    grids = [GridThw(1, side, side)]
    positions = patch_positions(grids, MERGE)
    indices, weights = interpolation_corners(grids, MERGE, side)
    nearest = indices[np.arange(len(indices)), weights.argmax(axis=1)]
    np.testing.assert_array_equal(nearest, positions[:, 0] * side + positions[:, 1])
    np.testing.assert_allclose(weights.max(axis=1), 1, atol=1e-5)
