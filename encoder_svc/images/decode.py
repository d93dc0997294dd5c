"""Encoded bytes to RGB pixels, in two steps: read the header, then decode.

The header's size is checked against the limits before a pixel buffer exists. Pixels come out upright
(EXIF orientation applied), 8 bits a channel, transparency composited on white, first frame of an animation.
Colour profiles are not applied, as transformers does not apply them.
"""

from __future__ import annotations

import io
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from encoder_svc.errors import Reason, request_error
from encoder_svc.images.structure import JPEG_SIGNATURE, PNG_SIGNATURE, corrupt, walk_jpeg, walk_png

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from encoder_svc.images.limits import Limits

FORMATS = ("JPEG", "PNG", "WEBP")
"""Pillow's names of what is decoded. A JPEG with an MPO index (many phones write one) counts as JPEG."""

_PIXELS_AT_A_TIME = 2**20

_BYTES_PER_PIXEL = {"WEBP": 18}
_BYTES_PER_PIXEL_ELSE = 8
"""Of memory while one is decoded, at most, as measured (docs/memory.md): the result's 3 among them."""

_SIGNATURES = (JPEG_SIGNATURE, PNG_SIGNATURE)
_EXIF_ORIENTATION = 0x0112
_UPRIGHT: dict[int, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {
    2: lambda stored_HWC: stored_HWC[:, ::-1],
    3: lambda stored_HWC: stored_HWC[::-1, ::-1],
    4: lambda stored_HWC: stored_HWC[::-1],
    5: lambda stored_HWC: stored_HWC.swapaxes(0, 1),
    6: lambda stored_HWC: stored_HWC.swapaxes(0, 1)[:, ::-1],
    7: lambda stored_HWC: stored_HWC.swapaxes(0, 1)[::-1, ::-1],
    8: lambda stored_HWC: stored_HWC.swapaxes(0, 1)[::-1],
}
"""What makes each EXIF orientation upright (EXIF 2.32, tag 0x0112). Those from 5 on swap the sides."""


class OpenedImage:
    """An image whose header was read and whose pixels were not.

    Attributes:
        height, width: pixels, after EXIF orientation.
        decode_bytes: of memory that :meth:`decode` takes, its result among it.
    """

    def __init__(self, data: bytes, limits: Limits) -> None:
        """Reads the header of ``data``.

        Raises:
            RequestError: IMAGE_TOO_LARGE, IMAGE_FORMAT, IMAGE_CORRUPT, IMAGE_SIDE, IMAGE_PIXELS or
                IMAGE_ASPECT_RATIO.
        """
        limits.check_image_bytes(len(data))
        png_exif = walk_png(data) if data.startswith(PNG_SIGNATURE) else b""
        if data.startswith(JPEG_SIGNATURE):
            walk_jpeg(data)
        self._data = data
        self._max_pixels = limits.max_image_pixels
        self._image = _open(data, self._max_pixels)
        width, height = self._image.size
        limits.check_image_size(height, width)
        _scale_transparency(self._image, data)
        self._orientation = _orientation(self._image, png_exif)
        if self._orientation >= 5:
            height, width = width, height
        self.height, self.width = height, width
        self.decode_bytes = height * width * _BYTES_PER_PIXEL.get(self._image.format or "", _BYTES_PER_PIXEL_ELSE)

    def decode(self) -> npt.NDArray[np.uint8]:
        """The pixels, [height, width, 3] uint8 RGB.

        Raises:
            RequestError: IMAGE_CORRUPT, where the header promised more than the bytes hold.
        """
        pixels_HWC = self._decode_jpeg()
        if pixels_HWC is None:
            try:
                pixels_HWC = self._decode_by_pillow()
            except Exception as error:  # its decoders raise OSError, SyntaxError, ValueError, struct.error, …
                raise corrupt() from error
        if self._orientation in _UPRIGHT:
            pixels_HWC = np.ascontiguousarray(_UPRIGHT[self._orientation](pixels_HWC))
        if pixels_HWC.shape != (self.height, self.width, 3):
            raise corrupt()
        return pixels_HWC

    def _decode_by_pillow(self) -> npt.NDArray[np.uint8]:
        """What Pillow makes of it is gone when this returns: an image that it has decoded keeps its pixels."""
        image = _open(self._data, self._max_pixels)
        _scale_transparency(image, self._data)
        return rgb_pixels(image)

    def _decode_jpeg(self) -> npt.NDArray[np.uint8] | None:
        """A colour JPEG's pixels, straight from libjpeg-turbo: Pillow's bits in half its time.

        None for everything else, and for what libjpeg-turbo so much as warns of: there Pillow is the judge.
        """
        if self._image.format not in ("JPEG", "MPO") or self._image.mode != "RGB":
            return None
        try:
            # Of the checked size, so that it can take no more memory, however it reads the header.
            buffer = np.empty((self._image.height, self._image.width, 3), np.uint8)
            pixels_HWC: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(
                self._data, colorspace="RGB", buffer=buffer, strict=True
            )
        except ValueError:
            return None
        return pixels_HWC


def rgb_pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Any of Pillow's modes as [height, width, 3] uint8 RGB: alpha composited on white, 16 bits scaled to 8, the rest
    by Pillow. Some rows at a time, so that nothing is ever whole but the image and the result."""
    width, height = image.size
    num_rows = max(_PIXELS_AT_A_TIME // width, 1)
    pixels_HWC = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, num_rows):
        rows = slice(top, min(top + num_rows, height))
        pixels_HWC[rows] = np.asarray(_to_rgb(image.crop((0, rows.start, width, rows.stop))))
    return pixels_HWC


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in {"I;16", "I"}:
        # Pillow's own conversion clips at 255; a 16-bit grey wants its high byte.
        grey = np.clip(np.asarray(image), 0, 65_535)
        on_white = np.where(grey == image.info.get("transparency", -1), 255, grey >> 8)
        return Image.fromarray(on_white.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def decoders() -> str:
    """The packages whose bits the pixels are, with versions."""
    return " ".join(f"{package} {version(package)}" for package in ("pillow", "simplejpeg"))


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if data.startswith(_SIGNATURES) or (data.startswith(b"RIFF") and data[8:12] == b"WEBP"):
            raise corrupt() from None
        raise request_error(Reason.IMAGE_FORMAT, "Not an image that is decoded here: send JPEG, PNG or WebP.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Beyond Pillow's own bound, which max_image_pixels never exceeds; the sides are not told.
        raise request_error(
            Reason.IMAGE_PIXELS, f"The image declares far more pixels than are taken: at most {max_pixels}."
        ) from None
    except Exception as error:
        raise corrupt() from error


def _scale_transparency(image: Image.Image, data: bytes) -> None:
    """Brings a PNG's transparent colour to 8 bits. Pillow does so with the pixels and forgets the colour (tRNS)."""
    transparency = image.info.get("transparency")
    if image.format != "PNG" or transparency is None:
        return
    bit_depth = data[24]
    if image.mode == "L" and bit_depth in (2, 4):
        image.info["transparency"] = transparency * 255 // (2**bit_depth - 1)
    elif image.mode == "RGB" and bit_depth == 16:
        image.info["transparency"] = tuple(sample >> 8 for sample in transparency)


def _orientation(image: Image.Image, png_exif: bytes) -> int:
    if png_exif and "exif" not in image.info:
        # Behind the pixels: legal, and what ImageMagick writes. Pillow finds it only by decoding them first.
        image.info["exif"] = png_exif
    try:
        orientation = Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block; the pixels are still good
        return 1
    return orientation if orientation in _UPRIGHT else 1
