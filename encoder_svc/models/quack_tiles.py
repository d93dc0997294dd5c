"""Which tiles a matrix product of quack-kernels is cut into.

A GPU works on one tile a multiprocessor at a time, so what counts is how many waves of tiles a product takes, and how
long a wave: about as long as a tile is large, and as long again as it takes to begin and to end it, longer for the
largest tiles where an epilogue computes much. By sweeps over tiles, clusters and shapes on an H100
(docs/performance-gpu.md).
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Tile(NamedTuple):
    """Rows and columns of a tile, and how many below, or beside, each other share what they load."""

    rows: int
    columns: int
    cluster_rows: int
    cluster_columns: int

    def number(self, rows: int, outputs: int) -> int:
        """How many there are; clusters are whole, and count with what lies beyond the last row or column."""
        down = _whole(-(-rows // self.rows), self.cluster_rows)
        across = _whole(-(-outputs // self.columns), self.cluster_columns)
        return down * across

    def waves(self, rows: int, outputs: int, num_multiprocessors: int) -> int:
        """How often all multiprocessors take a tile."""
        return -(-self.number(rows, outputs) // num_multiprocessors)


TILES: Final = (
    Tile(128, 128, 2, 1),
    Tile(128, 128, 1, 2),
    Tile(128, 160, 2, 1),
    Tile(128, 192, 2, 1),
    Tile(192, 128, 1, 2),
)
"""What there is to choose from: few, for each is compiled at its first use."""

# What a wave takes beside its products, as if its tiles had so many values more.
_WAVE_OVERHEAD: Final = 64 * 128
# The largest tile that leaves registers for what an epilogue computes.
_EASY_TILE: Final = 128 * 160


def best_tile(rows: int, outputs: int, num_multiprocessors: int, strain: float = 0.0) -> Tile:
    """The fastest for ``rows`` × ``outputs`` results; of equal ones that of which there are fewest, then the first.

    Args:
        strain: by what fraction an epilogue slows the largest tiles down.
    """

    def cost(tile: Tile) -> tuple[float, int]:
        size = tile.rows * tile.columns
        values = size * (1 + strain) if size > _EASY_TILE else size
        waves = tile.waves(rows, outputs, num_multiprocessors)
        return waves * (values + _WAVE_OVERHEAD), tile.number(rows, outputs)

    return min(TILES, key=cost)


def _whole(value: int, multiple: int) -> int:
    return value + -value % multiple
