from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_window_index

from encoder_svc.images.types import GridThw
from encoder_svc.models.qwen2_5_vl import window_order

MERGE, PATCH = 2, 14
SIDES = st.integers(1, 20).map(lambda blocks: blocks * MERGE)
GRIDS = st.lists(st.builds(GridThw, st.integers(1, 3), SIDES, SIDES), min_size=1, max_size=4)
WINDOW_SIDES = st.integers(1, 5)
OFTEN = settings(max_examples=40, deadline=None)


def windows(order: list[int], lengths: list[int]) -> list[tuple[int, ...]]:
    """The merged blocks of each window; ``lengths`` count patches."""
    blocks = [length // MERGE**2 for length in lengths]
    ends = [sum(blocks[: index + 1]) for index in range(len(blocks))]
    return [tuple(order[end - size : end]) for end, size in zip(ends, blocks, strict=True)]


def our_windows(grids: list[GridThw], side: int, *, largest_first: bool) -> list[tuple[int, ...]]:
    order, lengths = window_order(grids, MERGE, side, largest_first=largest_first)
    return windows(order.tolist(), lengths)


def reference_windows(grids: list[GridThw], side: int) -> list[tuple[int, ...]]:
    order, boundaries = get_vision_window_index(torch.tensor(grids), MERGE, side * MERGE * PATCH, PATCH)
    return windows(order.tolist(), boundaries.diff().tolist())


@OFTEN
@given(GRIDS, WINDOW_SIDES)
def test_window_order_holds_every_merged_block_once(grids: list[GridThw], side: int) -> None:
    order, lengths = window_order(grids, MERGE, side, largest_first=True)
    num_blocks = sum(grid.num_rows(MERGE) for grid in grids)
    assert sorted(order.tolist()) == list(range(num_blocks))
    assert sum(lengths) == num_blocks * MERGE**2


@OFTEN
@given(GRIDS, WINDOW_SIDES)
def test_windows_ordered_by_size_are_the_references_windows(grids: list[GridThw], side: int) -> None:
    assert sorted(our_windows(grids, side, largest_first=True)) == sorted(reference_windows(grids, side))


@OFTEN
@given(GRIDS, WINDOW_SIDES)
def test_windows_row_by_row_are_in_the_references_order(grids: list[GridThw], side: int) -> None:
    assert our_windows(grids, side, largest_first=False) == reference_windows(grids, side)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (18, 16), (16, 22), (30, 34)])
def test_windows_of_one_frame_come_largest_first(height: int, width: int) -> None:
    sizes = [len(window) for window in our_windows([GridThw(1, height, width)], 4, largest_first=True)]
    assert sizes == sorted(sizes, reverse=True)


def test_frames_and_images_keep_their_places() -> None:
    grids = [GridThw(2, 10, 10), GridThw(1, 6, 12)]
    order, _ = window_order(grids, MERGE, 4, largest_first=True)
    assert sorted(order[:25].tolist()) == list(range(25))
    assert sorted(order[25:50].tolist()) == list(range(25, 50))
    assert sorted(order[50:].tolist()) == list(range(50, 68))
