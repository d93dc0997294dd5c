"""Cuts what came out of a batch into images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encoder_svc.images.types import GridThw


def split_by_image(
    rows: torch.Tensor, finite: torch.Tensor, grids: Sequence[GridThw], merge_size: int
) -> list[memoryview | None]:
    """The bytes of each image's embeddings, None where they hold NaN or infinity: views of the batch's memory.

    Whoever keeps one for longer than a moment copies it, for each keeps the whole batch's memory. Not copied here,
    where the next batch may be waiting for this one's place.

    Args:
        rows: [rows of all images, width], on the host.
        finite: bool [rows of all images].
    """
    counts = [grid.num_rows(merge_size) for grid in grids]
    parts = zip(rows.split(counts), finite.split(counts), strict=True)
    return [_bytes_of(part) if bool(part_finite.all()) else None for part, part_finite in parts]


def _bytes_of(rows: torch.Tensor) -> memoryview:
    return rows.contiguous().view(torch.uint8).view(-1).numpy().data.toreadonly()
