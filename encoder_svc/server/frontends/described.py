"""What goes over a link (link.py), and how it is written there: where the bytes are, and what they are."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from encoder_svc.images.processor import PIXEL_VALUE_DTYPES
from encoder_svc.images.types import DecodedImage, EncoderImage, GridThw, ProcessedImage
from encoder_svc.observability.stages import Stages
from encoder_svc.server.core import Decoded, Embeddings, Encoded

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

_DTYPES: Final = {"uint8": np.dtype(np.uint8), **PIXEL_VALUE_DTYPES}


def array_of(image: EncoderImage) -> npt.NDArray[Any]:
    """An image's patches, or its pixels."""
    return image.pixels if isinstance(image, DecodedImage) else image.patches


def with_array(image: EncoderImage, array: npt.NDArray[Any]) -> EncoderImage:
    """The same image whose patches, or pixels, are elsewhere."""
    kind = DecodedImage if isinstance(image, DecodedImage) else ProcessedImage
    return kind(image.grid, array, image.decode_s, image.resize_s)


def describe_decoded(decoded: Decoded, offset: Callable[[memoryview], int]) -> dict[str, Any]:
    """An image in an arena. ``offset`` says where there a block is."""
    image, array = decoded.image, array_of(decoded.image)
    return {
        "pixels": isinstance(image, DecodedImage),
        "grid": image.grid,
        "at": offset(array.view(np.uint8).reshape(-1).data),
        "dtype": str(array.dtype),
        "shape": array.shape,
        "times_s": [image.decode_s, image.resize_s, decoded.began_s, decoded.done_s],
    }


def decoded_of(fields: dict[str, Any], view: Callable[[int, int], memoryview]) -> Decoded:
    """What :func:`describe_decoded` described. ``view`` gives bytes of the arena.

    Raises:
        ValueError: they are not there.
    """
    dtype, shape = _DTYPES[fields["dtype"]], fields["shape"]
    data = view(fields["at"], int(np.prod(shape)) * dtype.itemsize)
    decode_s, resize_s, began_s, done_s = fields["times_s"]
    kind = DecodedImage if fields["pixels"] else ProcessedImage
    image = kind(GridThw(*fields["grid"]), np.frombuffer(data, dtype).reshape(shape), decode_s, resize_s)
    return Decoded(image, began_s, done_s)


def describe_embeddings(embeddings: Embeddings, offset: Callable[[memoryview], int]) -> dict[str, Any]:
    """Embeddings in an arena. ``offset`` says where there a block is."""
    return {
        "grid": embeddings.grid,
        "at": offset(embeddings.data),
        "num_bytes": embeddings.nbytes,
    }


def embeddings_of(fields: dict[str, Any], view: Callable[[int, int], memoryview]) -> Embeddings:
    """What :func:`describe_embeddings` described. ``view`` gives bytes of the arena.

    Raises:
        ValueError: they are not there.
    """
    return Embeddings(GridThw(*fields["grid"]), view(fields["at"], fields["num_bytes"]))


def describe_encoded(encoded: Encoded, offset: Callable[[memoryview], int]) -> dict[str, Any]:
    """Embeddings in an arena, and how they were come by."""
    return {
        "embeddings": describe_embeddings(encoded.embeddings, offset),
        "outcome": encoded.outcome,
        "stages": {stage: seconds for stage, seconds in asdict(encoded.stages).items() if seconds},
        "ready_s": encoded.ready_s,
    }


def encoded_of(fields: dict[str, Any], view: Callable[[int, int], memoryview]) -> Encoded:
    """What :func:`describe_encoded` described."""
    embeddings = embeddings_of(fields["embeddings"], view)
    return Encoded(embeddings, fields["outcome"], Stages(**fields["stages"]), fields["ready_s"])
