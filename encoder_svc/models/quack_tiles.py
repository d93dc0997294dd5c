"""Which tiles a matrix product of quack-kernels is cut into.

A GPU works on one tile a multiprocessor at a time, so what counts is how many waves of tiles a product takes, and how
long a wave: about as long as a tile is wide, and as long again as it takes to begin and to end it. By a sweep over
tiles, clusters and shapes on an H100 (docs/performance.md) this takes, of the three widths, the best or one at most 5 %
slower for whole tiles of rows.
"""

from __future__ import annotations

from typing import Final

TILE_ROWS: Final = 128
"""Rows of a tile."""

TILE_WIDTHS: Final = (128, 160, 192)
"""What there is to choose from: few, for each is compiled at its first use."""

# What a wave takes beside its products, as if its tiles were wider by so much.
_WAVE_OVERHEAD: Final = 64


def tile_width(rows: int, outputs: int, num_multiprocessors: int) -> int:
    """The width of tiles for ``rows`` × ``outputs`` results: of the fastest, the narrowest."""

    def cost(width: int) -> int:
        tiles = -(-rows // TILE_ROWS) * -(-outputs // width)
        return -(-tiles // num_multiprocessors) * (width + _WAVE_OVERHEAD)

    return min(TILE_WIDTHS, key=cost)
