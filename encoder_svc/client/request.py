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
    """Upright RGB as raw pixels; other modes as PNG, so that the server treats them as it treats files."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    try:
        if upright.mode in _PNG_MODES or "transparency" in upright.info:
            buffer = io.BytesIO()
            upright.save(buffer, format="PNG", compress_level=1)
            return encoder_pb2.Image(encoded=buffer.getvalue())
        return _raw(np.asarray(upright.convert("RGB")))
    except (OSError, ValueError) as error:
        raise ValueError(f"a PIL image of mode {image.mode} cannot be sent ({error}); convert it to RGB.") from error


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
