"""A caller's images as a request."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.client.arguments import checked_request_id
from encoder_svc.client.types import DTYPES, ImageInput, PixelValues
from encoder_svc.client.wire import DTYPE_NUMBERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from PIL.Image import Image as PilImage

_PNG_MODES = {"1", "L", "LA", "P", "RGBA", "I;16"}
_OTHER_ALPHA_MODES = {"PA": "RGBA", "RGBa": "RGBA", "La": "LA"}
_WHITE_OF_8_BITS, _WHITE_OF_16_BITS = 255, 65_535


def encode_request(
    images: Sequence[ImageInput], request_id: str, *, retain_s: float | None = None
) -> encoder_pb2.EncodeImagesRequest:
    """
    Args:
        retain_s: have the embeddings retained for so long, 0 for the server's default; None has them streamed.

    Raises:
        TypeError, ValueError: something in ``images`` is not an image, or ``request_id`` holds a lone surrogate.
        OSError: a path cannot be read.
    """
    if isinstance(images, (str, bytes, os.PathLike)) or not isinstance(images, Iterable):
        raise TypeError(f"images must be a list of images, not {type(images).__name__}; put a single one in a list.")
    return encoder_pb2.EncodeImagesRequest(
        images=[_image(image) for image in images],
        request_id=checked_request_id(request_id),
        delivery=encoder_pb2.DELIVERY_STREAM if retain_s is None else encoder_pb2.DELIVERY_RETAIN,
        lease_s=retain_s or 0.0,
    )


def _image(image: ImageInput) -> encoder_pb2.Image:
    if isinstance(image, (str, os.PathLike)):
        return encoder_pb2.Image(encoded=Path(image).read_bytes())
    if isinstance(image, (bytes, bytearray, memoryview)):
        return encoder_pb2.Image(encoded=bytes(image))
    if isinstance(image, PixelValues):
        return _pixel_values(image)
    if isinstance(image, np.ndarray):
        return _raw(image)
    if any(cls.__module__.startswith("PIL.") for cls in type(image).__mro__):
        return _pil(image)
    raise TypeError(f"{type(image).__name__} is not an image: give a path, bytes, a numpy array or a PIL image.")


def _raw(pixels_HWC: npt.NDArray[Any]) -> encoder_pb2.Image:
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3:
        raise ValueError(
            f"an array must be [height, width, 3] uint8 RGB, not {list(pixels_HWC.shape)} {pixels_HWC.dtype}."
        )
    height, width, _ = pixels_HWC.shape
    return encoder_pb2.Image(raw=encoder_pb2.RawImage(height=height, width=width, data=pixels_HWC.tobytes()))


def _pil(image: PilImage) -> encoder_pb2.Image:
    """What the server treats as it treats a file of the same content: upright, RGB as raw pixels, all else as PNG."""
    from PIL import ImageOps

    width, height = image.size
    if not width or not height:  # alone in its request that is refused, as such a file is
        return _raw(np.empty((height, width, 3), np.uint8))
    try:
        upright = _as_png_can_hold(ImageOps.exif_transpose(image))
        if upright.mode == "RGB" and "transparency" not in upright.info:
            return _raw(np.asarray(upright))
        buffer = io.BytesIO()
        upright.save(buffer, format="PNG", compress_level=1)
    except (OSError, ValueError) as error:
        raise ValueError(f"a PIL image of mode {image.mode} cannot be sent: {str(error).rstrip('.')}.") from error
    return encoder_pb2.Image(encoded=buffer.getvalue())


def _as_png_can_hold(image: PilImage) -> PilImage:
    """
    Raises:
        ValueError: what its values mean is not known.
    """
    if image.mode in _PNG_MODES or image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("no value of it is known to be white; scale it to 0 to 255 and convert it to L")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey_16(image)
    return image.convert(_OTHER_ALPHA_MODES.get(image.mode, "RGB"))


def _grey_16(image: PilImage) -> PilImage:
    """A grey of 16 bits in another of Pillow's modes: of another byte order, or I, which has 32.

    Raises:
        ValueError: it has more than 16 bits, or so few that it may have 8.
    """
    from PIL import Image

    grey_HW = np.asarray(image)
    darkest, lightest = grey_HW.min(), grey_HW.max()
    if darkest < 0 or lightest > _WHITE_OF_16_BITS:
        raise ValueError(
            f"its values go from {darkest} to {lightest}, and those of a file from 0 to {_WHITE_OF_16_BITS}; "
            "scale it to 0 to 255 and convert it to L"
        )
    if image.mode == "I" and 0 < lightest <= _WHITE_OF_8_BITS:
        raise ValueError(f"its values go to {lightest}, and may have 8 bits or 16; convert it to L or to I;16")
    converted = Image.fromarray(grey_HW.astype(np.uint16))
    converted.info = image.info  # has the value that is transparent
    return converted


def _pixel_values(image: PixelValues) -> encoder_pb2.Image:
    values = image.values
    if not isinstance(values, np.ndarray):
        raise TypeError(f"pixel values must be a numpy array, not {type(values).__name__}.")
    dtype = DTYPE_NUMBERS.get(values.dtype.name)
    if dtype is None:
        raise ValueError(f"pixel values must be float32, float16 or bfloat16, not {values.dtype}.")
    if len(image.grid_thw) != 3:
        raise ValueError(f"grid_thw must be (t, h, w), not {image.grid_thw}.")
    t, h, w = image.grid_thw
    if values.ndim != 2 or values.shape[0] != t * h * w:
        raise ValueError(
            f"pixel values must be [t * h * w, patch_dim], with {t * h * w} rows here, not {list(values.shape)}."
        )
    return encoder_pb2.Image(
        pixel_values=encoder_pb2.PixelValues(
            grid_thw=encoder_pb2.GridThw(t=t, h=h, w=w),
            dtype=dtype,
            data=values.astype(DTYPES[values.dtype.name], copy=False).tobytes(),
        )
    )
