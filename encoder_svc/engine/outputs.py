"""Cuts what came out of a batch into images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
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


def bytes_of(rows: torch.Tensor) -> memoryview:
    """The bytes of an image's rows on the host, sharing their memory."""
    return rows.contiguous().view(torch.uint8).view(-1).numpy().data.toreadonly()


def finite_only(
    embeddings: Sequence[memoryview], finite: torch.Tensor, num_rows: Sequence[int]
) -> list[memoryview | None]:
    """Each image's bytes, or None where its rows hold NaN or infinity.

    Args:
        embeddings: of each image, as :func:`bytes_of` has them.
        finite: bool [rows of all images], on the host.
        num_rows: of each image.
    """
    starts = np.cumsum([0, *num_rows[:-1]])
    are_finite = np.logical_and.reduceat(finite.numpy(), starts)
    return [data if is_finite else None for data, is_finite in zip(embeddings, are_finite, strict=True)]
