"""Cuts what came out of a batch into images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encoder_svc.images.types import GridThw


def split_by_image(rows: torch.Tensor, grids: Sequence[GridThw], merge_size: int) -> list[torch.Tensor]:
    """Each image's rows, as views.

    Args:
        rows: [rows of all images, ...], on any device.
    """
    return [*rows.split([grid.num_rows(merge_size) for grid in grids])]


def finite_bytes(rows: Sequence[torch.Tensor], finite: Sequence[torch.Tensor]) -> list[memoryview | None]:
    """The bytes of each image's rows, sharing their memory; None where there is NaN or infinity.

    Args:
        rows: of each image [rows, width], on the host.
        finite: bool [rows] of each image.
    """
    return [_bytes_of(part) if bool(its_finite.all()) else None for part, its_finite in zip(rows, finite, strict=True)]


def _bytes_of(rows: torch.Tensor) -> memoryview:
    return rows.contiguous().view(torch.uint8).view(-1).numpy().data.toreadonly()
