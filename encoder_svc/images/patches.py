"""Pixels to patches, and patches to the pixel values that a processor makes of them.

Shapes: N patches, C channels, P patch_size, T temporal_patch_size, M spatial_merge_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from encoder_svc.images.types import GridThw

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt


def patchify(
    pixels_HWC: npt.NDArray[np.uint8], *, patch_size: int, merge_size: int
) -> tuple[GridThw, npt.NDArray[np.uint8]]:
    """Cuts [H, W, C] uint8 pixels into [N, C, P, P] patches in merge-block order.

    H and W must be multiples of ``patch_size * merge_size``. The order is that of transformers' Qwen-VL
    processors: blocks of M × M patches row by row, and within a block row by row.
    """
    height, width, channels = pixels_HWC.shape
    grid_h, grid_w = height // patch_size, width // patch_size
    blocks = pixels_HWC.reshape(
        grid_h // merge_size, merge_size, patch_size, grid_w // merge_size, merge_size, patch_size, channels
    )
    patches_NCPP = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels, patch_size, patch_size)
    return GridThw(1, grid_h, grid_w), np.ascontiguousarray(patches_NCPP)


def cut_into(patches_NK: torch.Tensor, planes_CHW: torch.Tensor, *, patch_size: int, merge_size: int) -> None:
    """Cuts [C, H, W] planes as :func:`patchify` does, into [N, C * P * P] that are there, on the planes' own device."""
    channels, height, width = planes_CHW.shape
    block = (merge_size, patch_size)
    rows, columns = (side // (merge_size * patch_size) for side in (height, width))
    blocks = planes_CHW.unflatten(2, (columns, *block)).unflatten(1, (rows, *block))
    shape = (rows, columns, merge_size, merge_size, channels, patch_size, patch_size)
    patches_NK.view(shape).copy_(blocks.permute(1, 4, 2, 5, 0, 3, 6))


def normalise(
    patches_NCPP: torch.Tensor, *, mean: Sequence[float], std: Sequence[float], temporal_patch_size: int
) -> torch.Tensor:
    """uint8 patches [N, C, P, P] to float32 pixel values [N, C * T * P * P], on the patches' own device.

    ``(x / 255 - mean) / std`` a channel, computed as ``(x - 255 mean) / (255 std)``, the form that transformers'
    torchvision-backed processor uses. A still image fills all T frames of its temporal patch.

    No encoder needs it, for the normalisation is folded into its weights (models/layers.py): tests and benchmarks hold
    that to this.
    """
    channels = patches_NCPP.shape[1]
    mean_C11 = torch.tensor(mean, dtype=torch.float32, device=patches_NCPP.device).view(channels, 1, 1) * 255.0
    std_C11 = torch.tensor(std, dtype=torch.float32, device=patches_NCPP.device).view(channels, 1, 1) * 255.0
    normalised = (patches_NCPP.to(torch.float32) - mean_C11) / std_C11
    frames = normalised.unsqueeze(2).expand(-1, -1, temporal_patch_size, -1, -1)
    return frames.reshape(patches_NCPP.shape[0], -1)
