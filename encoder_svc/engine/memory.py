"""How many patches fit the device's memory: measured once, at start, on the tower that will run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from encoder_svc.engine.pixels import Pixels
from encoder_svc.images.limits import MAX_DEVICE_PIXELS, MAX_DEVICE_SHRINK
from encoder_svc.images.types import GridThw

if TYPE_CHECKING:
    from encoder_svc.models.tower import VisionTower

# Where the measurement is made: large enough that what grows with the batch outweighs all else.
_SMALL_PATCHES: Final = 4_096
_LARGE_PATCHES: Final = 16_384


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBudget:
    """What a forward takes, and how much there is.

    Attributes:
        bytes_per_patch: peak of a forward beyond the weights, inputs and outputs included, for each patch.
        fixed_bytes: peak that does not grow with the batch.
        free_bytes: of the device, weights and graphs loaded.
        fraction: of the free bytes that batches may take.
    """

    bytes_per_patch: float
    fixed_bytes: int
    free_bytes: int
    fraction: float

    @property
    def max_patches(self) -> int:
        """The largest batch that fits; at least 1, for an image that does not fit fails by itself."""
        room = self.free_bytes * self.fraction - self.fixed_bytes
        return max(int(room / self.bytes_per_patch), 1)


def budget_from(
    small: tuple[int, int],
    large: tuple[int, int],
    *,
    free_bytes: int,
    fraction: float,
    in_flight: int,
    io_bytes: float,
    pixel_bytes: int = 0,
    resize_bytes: int = 0,
) -> MemoryBudget:
    """From two measured forwards, as (patches, peak bytes).

    Args:
        in_flight: batches whose inputs and outputs are on the device at a time.
        io_bytes: of one patch's inputs and outputs.
        pixel_bytes: that a patch may come as, where the device resizes; the forwards had none.
        resize_bytes: that resizing one image takes at the most, beside its pixels.
    """
    slope = max((large[1] - small[1]) / (large[0] - small[0]), 1.0)
    fixed = max(int(small[1] - slope * small[0]), 0)
    return MemoryBudget(
        bytes_per_patch=slope + (in_flight - 1) * io_bytes + in_flight * pixel_bytes,
        fixed_bytes=fixed + resize_bytes,
        free_bytes=free_bytes,
        fraction=fraction,
    )


@torch.inference_mode()
def measure(tower: VisionTower, *, fraction: float, in_flight: int) -> MemoryBudget:
    """Runs two forwards, and a resize if it does any, on the current stream of a CUDA device and sees what they take at
    their peak."""
    device, config = tower.device, tower.encoder.config
    resizes = tower.settings.image_processing == "device"
    resize_bytes = _resize_peak(tower) if resizes else 0
    patch_bytes = config.in_channels * config.patch_size**2
    peaks = [_peak(tower, patches) for patches in (_SMALL_PATCHES, _LARGE_PATCHES)]
    # What the allocator keeps for graphs stays theirs, also where nothing lies in it; all else it gives back here.
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    outputs = config.width / config.spatial_merge_size**2 * next(tower.encoder.parameters()).element_size()
    return budget_from(
        *peaks,
        free_bytes=free,
        fraction=fraction,
        in_flight=in_flight,
        io_bytes=patch_bytes + outputs,
        pixel_bytes=MAX_DEVICE_SHRINK * patch_bytes if resizes else 0,
        resize_bytes=resize_bytes,
    )


@torch.inference_mode()
def rehearse(tower: VisionTower, max_patches: int) -> None:
    """Runs the largest batch once, and the largest resize: the allocator keeps what they take, and later batches
    allocate nothing new."""
    _peak(tower, max_patches)
    if tower.settings.image_processing == "device":
        _resize_peak(tower)


def _peak(tower: VisionTower, patches: int) -> tuple[int, int]:
    """Patches, rounded to whole images, and the bytes that a forward takes beyond what is there already."""
    device, config = tower.device, tower.encoder.config
    side = 16 * config.spatial_merge_size
    grids = [GridThw(1, side, side)] * max(patches // side**2, 1)
    num_patches = sum(grid.num_patches for grid in grids)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    pixels = torch.zeros((num_patches, config.in_channels * config.patch_size**2), dtype=torch.uint8, device=device)
    tower.encoder([pixels], tower.encoder.build_inputs(grids).to(device))
    torch.cuda.synchronize(device)
    return num_patches, torch.cuda.max_memory_allocated(device) - before


def _resize_peak(tower: VisionTower) -> int:
    """The bytes that resizing the largest image takes beyond its pixels."""
    device, config = tower.device, tower.encoder.config
    side = 16 * config.spatial_merge_size
    width = math.isqrt(MAX_DEVICE_PIXELS)
    image_HWC = torch.zeros((MAX_DEVICE_PIXELS // width, width, config.in_channels), dtype=torch.uint8, device=device)
    pixels = Pixels([image_HWC], [GridThw(1, side, side)], config.patch_size, config.spatial_merge_size)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    pixels.patches()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
