"""Qwen-VL's resize: which size (``smart_resize``), and two exact flavours of bicubic.

``torch`` has the numerics of transformers' default, torchvision-backed processor; ``pillow`` those of its
Pillow-backed one. They differ from each other by up to two grey levels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

if TYPE_CHECKING:
    import numpy.typing as npt

ResizeFlavour = Literal["torch", "pillow"]
ImageProcessing = Literal["host", "device"]
"""Where images are resized and cut into patches."""


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size, (height, width) in pixels, that an image is resized to.

    Both sides become multiples of ``factor`` (patch_size * spatial_merge_size), the area lies within
    ``min_pixels`` … ``max_pixels`` where the sides allow it, and the aspect ratio is kept as nearly as
    these allow. Source: ``smart_resize`` of transformers' Qwen2-VL image processor. Unlike it, this function
    trusts that the aspect ratio was checked (images/limits.py).
    """
    resized_height = round(height / factor) * factor
    resized_width = round(width / factor) * factor
    area = resized_height * resized_width
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        resized_height = max(factor, math.floor(height / shrink / factor) * factor)
        resized_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        resized_height = math.ceil(height * grow / factor) * factor
        resized_width = math.ceil(width * grow / factor) * factor
    return resized_height, resized_width


def resize(pixels_HWC: npt.NDArray[np.uint8], height: int, width: int, flavour: ResizeFlavour) -> npt.NDArray[np.uint8]:
    """Bicubic, antialiased: [H, W, 3] uint8 to [height, width, 3] uint8, which may be a view of colour planes."""
    if pixels_HWC.shape[:2] == (height, width):
        return pixels_HWC
    return _RESIZERS[flavour](pixels_HWC, height, width)


def resize_planes(pixels_HWC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """``torch``'s flavour on the tensor's own device: [H, W, 3] uint8 to [3, height, width] uint8, maybe a view.

    It is what torchvision's ``resize``, and so transformers' default processor, does there: a CPU has a kernel for
    uint8, all else takes :func:`resize_in_float32`. They differ: the CPU's rounds and clamps between its two passes.
    """
    if pixels_HWC.shape[:2] == (height, width):
        return pixels_HWC.permute(2, 0, 1)
    if not pixels_HWC.is_cpu:
        return resize_in_float32(pixels_HWC, height, width)
    # A channels-last view of the same bytes: the kernel reads interleaved pixels as they are.
    return _interpolate(pixels_HWC.permute(2, 0, 1), height, width)


def resize_in_float32(pixels_HWC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[H, W, 3] uint8 to [3, height, width] uint8: interpolated in float32, clamped to 0 … 255, rounded half to even.

    Takes 12 bytes for each pixel of the image and 15 for each of the result.
    """
    # In planes at once: the kernel would make a second copy of channels-last ones.
    planes_CHW = pixels_HWC.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    return _interpolate(planes_CHW, height, width).clamp_(0, 255).round_().to(torch.uint8)


def _interpolate(planes_CHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    size = (height, width)
    resized = F.interpolate(planes_CHW.unsqueeze(0), size, mode="bicubic", antialias=True, align_corners=False)
    return resized[0]


def _resize_torch(pixels_HWC: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    source = pixels_HWC if pixels_HWC.flags.writeable else pixels_HWC.copy()
    planes_CHW: npt.NDArray[np.uint8] = resize_planes(torch.from_numpy(source), height, width).numpy()
    return planes_CHW.transpose(1, 2, 0)


def _resize_pillow(pixels_HWC: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels_HWC).resize((width, height), resample=Image.Resampling.BICUBIC))


_RESIZERS = {"torch": _resize_torch, "pillow": _resize_pillow}
