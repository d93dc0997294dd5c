"""Packs images into one batch: their patches or pixels on the host, and what the encoder needs beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import torch

from encoder_svc.engine.pixels import Pixels, pinned_to
from encoder_svc.images.types import DecodedImage, ProcessedImage

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from encoder_svc.images.types import EncoderImage, GridThw
    from encoder_svc.models.base import EncoderInputs, VisionEncoder


@dataclass(frozen=True, slots=True)
class Scattered:
    """Patches of several images, each where it was made, on the host: arrays of one dtype, [n, K]."""

    arrays: list[npt.NDArray[np.generic]]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self._is_bfloat16 else torch.from_numpy(np.empty(0, self.arrays[0].dtype)).dtype

    def __len__(self) -> int:
        return sum(map(len, self.arrays))

    def patches(self) -> torch.Tensor:
        """All of them, [n, K], on the host."""
        return self._joined(pinned=False)

    def to(self, device: torch.device) -> torch.Tensor:
        """The same on a GPU, through page-locked memory, without waiting."""
        return self._joined(pinned=True).to(device, non_blocking=True)

    def copy_to(self, patches_NK: torch.Tensor) -> None:
        """Into memory of the host that is there. By this thread alone, and others run meanwhile."""
        plain = [array.view(np.uint16) if self._is_bfloat16 else array for array in self.arrays]
        out = patches_NK.view(torch.uint16) if self._is_bfloat16 else patches_NK
        np.concatenate(plain, out=out.numpy())

    @property
    def _is_bfloat16(self) -> bool:
        return bool(self.arrays[0].dtype == ml_dtypes.bfloat16)

    def _joined(self, *, pinned: bool) -> torch.Tensor:
        out = torch.empty((len(self), *self.arrays[0].shape[1:]), dtype=self.dtype, pin_memory=pinned)
        self.copy_to(out)
        return out


@dataclass(frozen=True, slots=True)
class Batch:
    """A packed batch, on the host until it is moved.

    Attributes:
        segments: the images in order, neighbours of one kind together: patches, uint8 [n, channels · patch_size²] or
            floating [n, patch_dim], for a GPU still where they were made; or pixels that the device makes uint8
            patches of.
    """

    grids: list[GridThw]
    segments: list[torch.Tensor | Scattered | Pixels]
    inputs: EncoderInputs

    @property
    def is_uint8(self) -> bool:
        """Whether all its patches are, or will be, uint8."""
        return all(isinstance(segment, Pixels) or segment.dtype == torch.uint8 for segment in self.segments)

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; to a GPU through pinned memory, without waiting."""
        if device.type == "cpu":
            return self
        segments: list[torch.Tensor | Scattered | Pixels] = [
            pinned_to(segment, device) if isinstance(segment, torch.Tensor) else segment.to(device)
            for segment in self.segments
        ]
        return Batch(self.grids, segments, self.inputs.to(device))

    def patches(self) -> list[torch.Tensor]:
        """Each segment's patches, on its device; pixels are resized and cut there."""
        return [segment if isinstance(segment, torch.Tensor) else segment.patches() for segment in self.segments]

    def resized(self) -> Batch:
        """The same batch without pixels."""
        return replace(self, segments=[*self.patches()])


def build_batch(images: Sequence[EncoderImage], encoder: VisionEncoder) -> Batch:
    """Packs images, in the order given."""
    grids = [image.grid for image in images]
    segments = [_segment(list(group), encoder) for _, group in groupby(images, key=_kind)]
    return Batch(grids, segments, encoder.build_inputs(grids))


def _kind(image: EncoderImage) -> object:
    return "pixels" if isinstance(image, DecodedImage) else image.patches.dtype


def _segment(images: Sequence[EncoderImage], encoder: VisionEncoder) -> torch.Tensor | Scattered | Pixels:
    """Images of one kind."""
    decoded = [image for image in images if isinstance(image, DecodedImage)]
    if decoded:
        config = encoder.config
        return Pixels.of(decoded, patch_size=config.patch_size, merge_size=config.spatial_merge_size)
    arrays = [image.patches.reshape(len(image.patches), -1) for image in images if isinstance(image, ProcessedImage)]
    scattered = Scattered(arrays)
    # A GPU's copy is made at once in memory that it reads by itself.
    return scattered if next(encoder.parameters()).is_cuda else scattered.patches()
