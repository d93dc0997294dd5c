"""An image that one process prepared and another reads, in memory that both see: where it is, and what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from encoder_svc.images.processor import PIXEL_VALUE_DTYPES
from encoder_svc.images.types import DecodedImage, EncoderImage, GridThw, ProcessedImage

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from encoder_svc.transport.arena import Arena

_DTYPES: Final = {"uint8": np.dtype(np.uint8), **PIXEL_VALUE_DTYPES}


def copied(image: EncoderImage, arena: Arena, wait_s: float = 0.0) -> EncoderImage:
    """The same image, whose patches or pixels are in an arena: there until nothing refers to them.

    Args:
        wait_s: for how long to wait for room.

    Raises:
        MemoryError: there is none.
    """
    array = np.ascontiguousarray(_array_of(image))
    copy = np.frombuffer(arena.take(array.nbytes, wait_s), array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    kind = DecodedImage if isinstance(image, DecodedImage) else ProcessedImage
    return kind(image.grid, copy, image.decode_s, image.resize_s)


def _array_of(image: EncoderImage) -> npt.NDArray[Any]:
    return image.pixels if isinstance(image, DecodedImage) else image.patches


def describe_image(image: EncoderImage, offset: Callable[[memoryview], int]) -> dict[str, Any]:
    """An image in an arena. ``offset`` says where there a block is."""
    array = _array_of(image)
    return {
        "pixels": isinstance(image, DecodedImage),
        "grid": image.grid,
        "at": offset(array.view(np.uint8).reshape(-1).data),
        "dtype": str(array.dtype),
        "shape": array.shape,
        "times_s": [image.decode_s, image.resize_s],
    }


def image_of(fields: dict[str, Any], view: Callable[[int, int], memoryview]) -> EncoderImage:
    """What :func:`describe_image` described. ``view`` gives bytes of the arena.

    Raises:
        ValueError: they are not there.
    """
    dtype, shape = _DTYPES[fields["dtype"]], fields["shape"]
    data = view(fields["at"], int(np.prod(shape)) * dtype.itemsize)
    kind = DecodedImage if fields["pixels"] else ProcessedImage
    return kind(GridThw(*fields["grid"]), np.frombuffer(data, dtype).reshape(shape), *fields["times_s"])
