"""Images that reach the device as they were decoded: resized and cut into patches there, one after the other, so that
only one is there in float32 at a time.

Shapes: N patches, K channels · patch_size².
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from encoder_svc.images.patches import cut_into
from encoder_svc.images.resize import resize_planes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encoder_svc.images.types import DecodedImage, GridThw


@dataclass(frozen=True, slots=True)
class Pixels:
    """A stretch of a batch whose patches do not exist yet.

    Attributes:
        images: of each image uint8 [height, width, channels], all on one device.
        grids: of each image once it is resized.
    """

    images: list[torch.Tensor]
    grids: list[GridThw]
    patch_size: int
    merge_size: int

    @classmethod
    def of(cls, images: Sequence[DecodedImage], *, patch_size: int, merge_size: int) -> Pixels:
        """On the host, sharing the images' memory."""
        shared = [torch.from_numpy(image.pixels) for image in images]
        return cls(shared, [image.grid for image in images], patch_size, merge_size)

    def __len__(self) -> int:
        """Patches that they will make."""
        return sum(grid.num_patches for grid in self.grids)

    def to(self, device: torch.device) -> Pixels:
        """The same on a GPU, through pinned memory, without waiting."""
        return replace(self, images=[pinned_to(image, device) for image in self.images])

    def patches(self) -> torch.Tensor:
        """uint8 [N, K], on their device."""
        first = self.images[0]
        patches_NK = first.new_empty((len(self), first.shape[-1] * self.patch_size**2))
        self.cut_into(patches_NK)
        return patches_NK

    def cut_into(self, patches_NK: torch.Tensor) -> None:
        """Their patches into memory that is there, on their device."""
        parts = patches_NK.split([grid.num_patches for grid in self.grids])
        for image, grid, part_NK in zip(self.images, self.grids, parts, strict=True):
            planes_CHW = resize_planes(image, grid.h * self.patch_size, grid.w * self.patch_size)
            cut_into(part_NK, planes_CHW, patch_size=self.patch_size, merge_size=self.merge_size)


def pinned_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a GPU, through pinned memory, without waiting."""
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)
