from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from encoder_svc.images.types import GridThw
from encoder_svc.models.positions import frame_sequences, patch_positions

MERGES = [1, 2, 3]


def grids_of(merge: int) -> st.SearchStrategy[list[GridThw]]:
    side = st.integers(1, 9).map(lambda blocks: blocks * merge)
    return st.lists(st.builds(GridThw, st.integers(1, 3), side, side), min_size=1, max_size=4)


@pytest.mark.parametrize("merge", MERGES)
def test_patch_positions_are_the_references(merge: int) -> None:
    @settings(max_examples=30, deadline=None)
    @given(grids_of(merge))
    def check(grids: list[GridThw]) -> None:
        wanted = get_vision_position_ids(torch.tensor(grids), merge)
        np.testing.assert_array_equal(patch_positions(grids, merge), wanted.numpy())

    check()


@settings(max_examples=30, deadline=None)
@given(grids_of(2))
def test_frame_boundaries_are_the_references(grids: list[GridThw]) -> None:
    assert torch.equal(frame_sequences(grids).cu_seqlens, get_vision_cu_seqlens(torch.tensor(grids)))


@settings(max_examples=30, deadline=None)
@given(grids_of(2))
def test_host_lengths_say_what_the_boundaries_say(grids: list[GridThw]) -> None:
    sequences = frame_sequences(grids)
    lengths = sequences.cu_seqlens.diff().tolist()
    assert (list(sequences.lengths), sequences.max_seqlen) == (lengths, max(lengths))
