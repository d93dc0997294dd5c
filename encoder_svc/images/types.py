"""What goes into image processing and what comes out, free of the wire's own types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class GridThw(NamedTuple):
    """(t, h, w) of one item, in patches."""

    t: int
    h: int
    w: int

    @property
    def num_patches(self) -> int:
        return self.t * self.h * self.w

    def num_rows(self, spatial_merge_size: int) -> int:
        """Embedding rows: one for each merged block of patches."""
        return self.num_patches // spatial_merge_size**2


@dataclass(frozen=True, slots=True)
class EncodedImageBytes:
    """A whole JPEG, PNG or WebP file."""

    data: bytes

    def key_fields(self) -> tuple[bytes, ...]:
        """What tells this image from every other, for a content key."""
        return (b"encoded", self.data)


@dataclass(frozen=True, slots=True)
class RawRgb:
    """Decoded pixels: ``height * width * 3`` bytes, R G B interleaved, row by row."""

    height: int
    width: int
    data: bytes

    def key_fields(self) -> tuple[bytes, ...]:
        """What tells this image from every other, for a content key."""
        return (b"raw-rgb", str(self.height).encode(), str(self.width).encode(), self.data)


@dataclass(frozen=True, slots=True)
class PixelValues:
    """Normalised patches as a Hugging Face processor makes them: [grid.num_patches, patch_dim] of ``dtype``."""

    grid: GridThw
    dtype: str
    data: bytes

    def key_fields(self) -> tuple[bytes, ...]:
        """What tells this image from every other, for a content key."""
        return (b"pixel-values", repr(tuple(self.grid)).encode(), self.dtype.encode(), self.data)


ImageSource = EncodedImageBytes | RawRgb | PixelValues


@dataclass(frozen=True, slots=True)
class ProcessedImage:
    """One image, ready for the encoder.

    Attributes:
        grid: (t, h, w) in patches.
        patches: uint8 [num_patches, channels, patch_size, patch_size], still to be normalised, every frame of the
            temporal patch the same; or normalised pixel values [num_patches, patch_dim] of a floating dtype.
            Patches are in merge-block order: the ``spatial_merge_size²`` patches of a row follow each other.
        decode_s, resize_s: seconds spent.
    """

    grid: GridThw
    patches: npt.NDArray[np.uint8] | npt.NDArray[Any]
    decode_s: float = 0.0
    resize_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """One image that the device resizes and cuts into patches.

    Attributes:
        grid: (t, h, w) in patches, once it is resized.
        pixels: uint8 [height, width, 3], as decoded; contiguous and writeable, for torch shares nothing else.
        decode_s, resize_s: seconds spent on the host.
    """

    grid: GridThw
    pixels: npt.NDArray[np.uint8]
    decode_s: float = 0.0
    resize_s: float = 0.0


EncoderImage = ProcessedImage | DecodedImage
"""What the engine takes."""
