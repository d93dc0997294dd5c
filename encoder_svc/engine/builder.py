"""Packs images into one batch: their patches on the host, and what the encoder needs beside them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from encoder_svc.images.types import GridThw, ProcessedImage
    from encoder_svc.models.base import EncoderInputs, VisionEncoder


@dataclass(frozen=True, slots=True)
class Batch:
    """A packed batch, on the host until it is moved.

    Attributes:
        segments: the images' patches in order, neighbours of one dtype joined: uint8 [n, channels · patch_size²] or
            floating [n, patch_dim].
    """

    grids: list[GridThw]
    segments: list[torch.Tensor]
    inputs: EncoderInputs

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; to a GPU through pinned memory, without waiting."""
        if device.type == "cpu":
            return self
        segments = [segment.pin_memory().to(device, non_blocking=True) for segment in self.segments]
        return Batch(self.grids, segments, self.inputs.to(device))


def build_batch(images: Sequence[ProcessedImage], encoder: VisionEncoder) -> Batch:
    """Packs images, in the order given."""
    grids = [image.grid for image in images]
    segments = [
        _tensor(np.concatenate([image.patches for image in group])).flatten(1)
        for _, group in groupby(images, key=lambda image: image.patches.dtype)
    ]
    return Batch(grids, segments, encoder.build_inputs(grids))


def _tensor(array: npt.NDArray[np.generic]) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
