from __future__ import annotations

import pytest

from encoder_svc.models.quack_tiles import TILE_WIDTHS, tile_width

H100 = 132

# rows × outputs: microseconds on an H100 with tiles of 128, 160 and 192, by the sweep of 2026-11-22.
SWEEP = {
    (512, 3840): (11.4, 13.4, 15.3),
    (1024, 3840): (18.0, 20.5, 23.9),
    (1536, 3840): (27.0, 29.0, 25.1),
    (2048, 3840): (34.2, 31.1, 34.1),
    (3072, 3840): (49.2, 46.3, 44.7),
    (4096, 3840): (65.5, 58.1, 56.0),
    (6144, 3840): (93.4, 82.5, 84.9),
    (512, 5120): (16.6, 13.2, 15.1),
    (1024, 5120): (24.6, 22.1, 23.8),
    (2048, 5120): (44.3, 39.8, 43.3),
    (3072, 5120): (64.3, 57.2, 55.5),
    (4096, 5120): (81.7, 74.6, 74.9),
    (6144, 5120): (123.9, 110.4, 108.6),
    (1024, 6912): (30.7, 28.1, 32.7),
    (2048, 6912): (55.9, 54.1, 52.1),
    (3072, 6912): (83.9, 74.6, 73.2),
    (1024, 4304): (22.6, 19.8, 22.6),
    (1536, 4304): (30.2, 27.4, 30.4),
    (2048, 4304): (35.9, 34.6, 31.4),
    (5120, 4304): (82.3, 74.3, 69.4),
}


@pytest.mark.parametrize("shape", SWEEP, ids=str)
def test_the_tiles_taken_are_at_most_five_per_cent_slower_than_the_best(shape: tuple[int, int]) -> None:
    times = dict(zip(TILE_WIDTHS, SWEEP[shape], strict=True))
    assert times[tile_width(*shape, H100)] <= 1.05 * min(times.values())


def test_a_gpu_with_room_for_all_tiles_takes_the_narrowest() -> None:
    assert tile_width(128, 128, 1) == min(TILE_WIDTHS)
    assert tile_width(4096, 5120, 10_000) == min(TILE_WIDTHS)
