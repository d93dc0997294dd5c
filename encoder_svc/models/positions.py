"""Where each patch lies, and where each sequence of patches ends: arithmetic on grids alone."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F

from encoder_svc.attention.base import PackedSequences

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from encoder_svc.images.types import GridThw


FRAMES_KEPT: Final = 8
"""What depends on a frame's size alone is kept for so many sizes: most callers have few. A frame of 2²⁴ pixels takes
some 4 MB."""


def rotary_embedding(
    position_ids: torch.Tensor, inverse_frequencies: torch.Tensor, padded_head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of 2-D rotary position embeddings, float32 [N, padded_head_size / 2].

    The first half of these angles follow the patch's row, the second its column. Source: RoFormer (Su et al., 2021), in
    the axial form of Qwen2-VL (Wang et al., 2024).

    Args:
        position_ids: int64 [N, 2], row and column of each patch.
        inverse_frequencies: of :func:`inverse_frequencies`.
        padded_head_size: angles beyond the frequencies' are 0.
    """
    angles_NF = (position_ids.unsqueeze(-1) * inverse_frequencies).flatten(1)
    padding = padded_head_size // 2 - angles_NF.shape[1]
    if padding:
        angles_NF = F.pad(angles_NF, (0, padding))
    return angles_NF.cos(), angles_NF.sin()


def inverse_frequencies(head_size: int, theta: float, device: torch.device) -> torch.Tensor:
    """What positions are multiplied by, float32 [head_size / 4]."""
    half = head_size // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
    return 1.0 / theta**exponents


def patch_positions(grids: Sequence[GridThw], merge_size: int) -> npt.NDArray[np.int64]:
    """Row and column of every patch, int64 [N, 2], in merge-block order, frame after frame."""
    return np.concatenate([np.tile(frame_positions(g.h, g.w, merge_size), (g.t, 1)) for g in grids])


@lru_cache(FRAMES_KEPT)
def frame_positions(height: int, width: int, merge_size: int) -> npt.NDArray[np.int64]:
    """Of one frame; not to be written."""
    rows, columns = np.divmod(np.arange(height * width, dtype=np.int64), width)
    blocks = (height // merge_size, merge_size, width // merge_size, merge_size)
    return np.stack([x.reshape(blocks).swapaxes(1, 2).ravel() for x in (rows, columns)], axis=1)


def frame_sequences(grids: Sequence[GridThw]) -> PackedSequences:
    """One sequence for each frame of each image: attention never crosses frames."""
    return PackedSequences.of([g.h * g.w for g in grids for _ in range(g.t)])
