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
class Batch:
    """A packed batch, on the host until it is moved.

    Attributes:
        segments: the images in order, neighbours of one kind joined: patches, uint8 [n, channels · patch_size²] or
            floating [n, patch_dim]; or pixels that the device makes uint8 patches of.
    """

    grids: list[GridThw]
    segments: list[torch.Tensor | Pixels]
    inputs: EncoderInputs

    @property
    def is_uint8(self) -> bool:
        """Whether all its patches are, or will be, uint8."""
        return all(isinstance(segment, Pixels) or segment.dtype == torch.uint8 for segment in self.segments)

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; to a GPU through pinned memory, without waiting."""
        if device.type == "cpu":
            return self
        segments = [
            segment.to(device) if isinstance(segment, Pixels) else pinned_to(segment, device)
            for segment in self.segments
        ]
        return Batch(self.grids, segments, self.inputs.to(device))

    def patches(self) -> list[torch.Tensor]:
        """Each segment's patches; pixels are resized and cut where they are."""
        return [segment.patches() if isinstance(segment, Pixels) else segment for segment in self.segments]

    def resized(self) -> Batch:
        """The same batch without pixels."""
        return replace(self, segments=[*self.patches()])


def build_batch(images: Sequence[EncoderImage], encoder: VisionEncoder) -> Batch:
    """Packs images, in the order given."""
    grids = [image.grid for image in images]
    segments = [_segment(list(group), encoder) for _, group in groupby(images, key=_kind)]
    return Batch(grids, segments, encoder.build_inputs(grids))


def _kind(image: EncoderImage) -> str:
    return "pixels" if isinstance(image, DecodedImage) else str(image.patches.dtype)


def _segment(images: Sequence[EncoderImage], encoder: VisionEncoder) -> torch.Tensor | Pixels:
    """Images of one kind."""
    decoded = [image for image in images if isinstance(image, DecodedImage)]
    if decoded:
        config = encoder.config
        return Pixels.of(decoded, patch_size=config.patch_size, merge_size=config.spatial_merge_size)
    patches = [image.patches for image in images if isinstance(image, ProcessedImage)]
    return _joined(patches, pinned=next(encoder.parameters()).is_cuda).flatten(1)


def _joined(arrays: Sequence[npt.NDArray[np.generic]], *, pinned: bool) -> torch.Tensor:
    """The arrays one after the other, copied once; in page-locked memory, which a GPU reads by itself, if asked."""
    is_bfloat16 = arrays[0].dtype == ml_dtypes.bfloat16
    plain = [array.view(np.uint16) if is_bfloat16 else array for array in arrays]
    dtype = torch.from_numpy(np.empty(0, plain[0].dtype)).dtype
    out = torch.empty((sum(map(len, plain)), *plain[0].shape[1:]), dtype=dtype, pin_memory=pinned)
    np.concatenate(plain, out=out.numpy())
    return out.view(torch.bfloat16) if is_bfloat16 else out
