from __future__ import annotations

import pytest

from encoder_svc.models.quack_tiles import TILES, Tile, best_tile

H100 = 132

# rows × outputs: microseconds on an H100 with each of TILES, by the sweep of 2026-11-22.
SWEEP = {
    (256, 3840): (11.5, 13.4, 15.3, 15.5),
    (512, 3840): (11.4, 13.4, 15.3, 17.3),
    (784, 3840): (19.9, 20.4, 23.5, 24.3),
    (1024, 3840): (18.0, 20.5, 23.9, 26.6),
    (1536, 3840): (27.0, 29.0, 25.1, 25.2),
    (2048, 3840): (34.2, 31.1, 34.1, 34.5),
    (3072, 3840): (49.2, 46.3, 44.7, 44.7),
    (4096, 3840): (65.5, 58.1, 56.0, 60.2),
    (5184, 3840): (84.8, 75.1, 75.3, 74.6),
    (6144, 3840): (93.4, 82.5, 84.9, 86.1),
    (41472, 3840): (float("nan"), 541.7, 527.7, 531.0),
    (512, 5120): (16.6, 13.2, 15.1, 16.5),
    (1024, 5120): (24.6, 22.1, 23.8, 26.5),
    (2048, 5120): (44.3, 39.8, 43.3, 43.8),
    (3072, 5120): (64.3, 57.2, 55.5, 55.7),
    (5184, 5120): (112.9, 102.7, 99.1, 94.8),
    (6144, 5120): (123.9, 110.4, 108.6, 109.1),
    (41472, 5120): (float("nan"), 714.0, 707.2, 692.3),
    (1024, 6912): (30.7, 28.1, 32.7, 37.4),
    (2048, 6912): (55.9, 54.1, 52.1, 53.0),
    (5184, 6912): (149.0, 131.2, 124.1, 123.2),
    (41472, 6912): (float("nan"), 1047.3, 926.5, 947.0),
    (784, 4304): (25.1, 21.5, 23.0, 23.9),
    (1536, 4304): (30.2, 27.4, 30.4, 30.5),
    (3844, 4304): (69.5, 61.2, 59.8, 57.4),
    (5120, 4304): (82.3, 74.3, 69.4, 69.7),
    (30752, 4304): (float("nan"), 426.0, 409.5, 408.7),
}


@pytest.mark.parametrize("shape", SWEEP, ids=str)
def test_the_tile_taken_is_at_most_five_per_cent_slower_than_the_best(shape: tuple[int, int]) -> None:
    times = dict(zip(TILES, SWEEP[shape], strict=True))
    assert times[best_tile(*shape, H100)] <= 1.05 * min(time for time in times.values() if time == time)


@pytest.mark.parametrize(
    ("tile", "rows", "outputs", "waves"),
    [
        (Tile(128, 128, 1, 1), 1, 1, 1),
        (Tile(128, 128, 1, 1), 128 * 10, 128 * 10, 10),
        (Tile(128, 128, 1, 1), 128 * 10 + 1, 128 * 10, 11),
        (Tile(128, 128, 2, 1), 128 * 9, 128 * 10, 10),
        (Tile(128, 128, 1, 2), 128 * 10, 128 * 9 + 1, 10),
    ],
    ids=str,
)
def test_waves_are_of_whole_clusters(tile: Tile, rows: int, outputs: int, waves: int) -> None:
    assert tile.waves(rows, outputs, 10) == waves


def test_a_gpu_with_room_for_all_tiles_takes_the_smallest() -> None:
    assert best_tile(4096, 5120, 100_000) == TILES[0]
