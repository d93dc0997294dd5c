"""Between the client's types and the wire's messages. No channel, no loop: the sync and the async client share it."""

from __future__ import annotations

import io
import os
import zlib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.client.types import (
    DTYPES,
    AttentionInfo,
    EncodedImage,
    ImageInput,
    LimitsInfo,
    ModelInfo,
    PixelValues,
    ProcessorInfo,
    RetainedImage,
    StageTimings,
)
from encoder_svc.errors import CODE_NUMBERS, ERROR_DOMAIN, Reason, RequestError, request_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc
    import numpy.typing as npt
    from PIL.Image import Image as PilImage

_CODE_NAMES = {number: name for name, number in CODE_NUMBERS.items()}
_DTYPE_NUMBERS = {
    "float32": encoder_pb2.DTYPE_FLOAT32,
    "float16": encoder_pb2.DTYPE_FLOAT16,
    "bfloat16": encoder_pb2.DTYPE_BFLOAT16,
}
_DTYPE_NAMES = {number: name for name, number in _DTYPE_NUMBERS.items()}
_PNG_MODES = {"1", "L", "LA", "P", "RGBA", "I;16"}

_LONGEST_TIMEOUT_S = 1e9  # some way beyond gRPC's clock runs over, and calls end at once
_NO_TIME_S = -1.0  # gRPC rounds a deadline up, so that with 0 a fast answer would still come

T = TypeVar("T")


def checked_timeout(timeout_s: float | None) -> float | None:
    """
    Raises:
        ValueError: it is negative or not a number.
    """
    if timeout_s is not None and not timeout_s >= 0:
        raise ValueError(f"timeout_s must be 0 or more seconds, or None, not {timeout_s}.")
    return timeout_s


def call_timeout(own_s: float | None, clients_s: float | None) -> float | None:
    """What gRPC is told: the call's own timeout, else the client's. None and infinity wait without end.

    Raises:
        ValueError: the call's own is negative or not a number.
    """
    timeout_s = clients_s if own_s is None else checked_timeout(own_s)
    if timeout_s is None or timeout_s > _LONGEST_TIMEOUT_S:
        return None
    return timeout_s or _NO_TIME_S


def checked_request_id(request_id: str) -> str:
    """
    Raises:
        ValueError: it holds a lone surrogate.
    """
    try:
        request_id.encode()
    except UnicodeEncodeError:
        raise ValueError(f"request_id {request_id!r} holds a lone surrogate, which UTF-8 cannot carry.") from None
    return request_id


def closed_error() -> RequestError:
    return request_error(Reason.UNREACHABLE, "This client is closed.")


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
    if isinstance(images, (str, bytes, os.PathLike)):
        raise TypeError("images must be a list of images; put a single one in a list.")
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
    dtype = _DTYPE_NUMBERS.get(values.dtype.name)
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


Result = EncodedImage | RetainedImage | RequestError


class Assembler:
    """Puts the messages of one answer together again.

    Args:
        retained: the answer has no chunks; its images become :class:`RetainedImage`.
    """

    def __init__(self, num_images: int, *, retained: bool = False) -> None:
        self._retained = retained
        self._waiting = set(range(num_images))
        self._open: dict[int, tuple[encoder_pb2.ItemHeader, bytearray, int]] = {}
        self.summary: encoder_pb2.Summary | None = None

    def feed(self, response: encoder_pb2.EncodeImagesResponse) -> Result | None:
        """Takes one message; returns an image once it is complete, or its error.

        Raises:
            RequestError: PROTOCOL_ERROR or CHECKSUM_MISMATCH; the answer cannot be trusted.
        """
        match response.WhichOneof("event"):
            case "header":
                self._begin(response.header)
            case "chunk":
                self._append(response.chunk)
            case "done":
                return self._retain(response.done) if self._retained else self._complete(response.done)
            case "error":
                self._settle(response.error.index)
                return request_error(
                    response.error.reason,
                    response.error.message,
                    code=_CODE_NAMES.get(response.error.code, "UNKNOWN"),
                    image_index=response.error.index,
                )
            case "summary":
                self.summary = response.summary
        return None

    def finish(self) -> None:
        """
        Raises:
            RequestError: PROTOCOL_ERROR, if the answer ended before every image was settled.
        """
        if self._waiting or self.summary is None:
            raise _protocol_error(f"the answer ended with {len(self._waiting)} images unsettled")

    def _begin(self, header: encoder_pb2.ItemHeader) -> None:
        dtype = DTYPES.get(_DTYPE_NAMES.get(header.dtype, ""))
        if dtype is None or header.byte_length != header.rows * header.width * dtype.itemsize:
            raise _protocol_error(f"image {header.index}: the header's sizes contradict each other")
        if header.index not in self._waiting or header.index in self._open:
            raise _protocol_error(f"image {header.index}: an unexpected header")
        self._open[header.index] = (header, bytearray(0 if self._retained else header.byte_length), 0)

    def _append(self, chunk: encoder_pb2.ItemChunk) -> None:
        header, buffer, filled = self._opened(chunk.index)
        data = chunk.data
        if chunk.offset != filled or filled + len(data) > len(buffer):
            raise _protocol_error(f"image {chunk.index}: a chunk that does not follow the one before")
        buffer[filled : filled + len(data)] = data
        self._open[chunk.index] = (header, buffer, filled + len(data))

    def _complete(self, done: encoder_pb2.ItemDone) -> EncodedImage:
        header, buffer, filled = self._opened(done.index)
        if filled != len(buffer):
            raise _protocol_error(f"image {done.index}: {filled} of {len(buffer)} bytes arrived")
        if zlib.crc32(buffer) != done.crc32:
            raise request_error(
                Reason.CHECKSUM_MISMATCH, "The embeddings were damaged on the way.", image_index=done.index
            )
        self._settle(done.index)
        embeddings = np.frombuffer(buffer, DTYPES[_DTYPE_NAMES[header.dtype]]).reshape(header.rows, header.width)
        return EncodedImage(
            index=done.index,
            embeddings=embeddings,
            grid_thw=(header.grid_thw.t, header.grid_thw.h, header.grid_thw.w),
            num_deepstack=header.num_deepstack,
            content_key=header.content_key,
            timings=_same_fields(StageTimings, done.timings),
        )

    def _retain(self, done: encoder_pb2.ItemDone) -> RetainedImage:
        header, _, _ = self._opened(done.index)
        self._settle(done.index)
        return RetainedImage(
            index=done.index,
            key=header.content_key,
            grid_thw=(header.grid_thw.t, header.grid_thw.h, header.grid_thw.w),
            rows=header.rows,
            width=header.width,
            dtype=_DTYPE_NAMES[header.dtype],
            num_deepstack=header.num_deepstack,
            timings=_same_fields(StageTimings, done.timings),
        )

    def _opened(self, index: int) -> tuple[encoder_pb2.ItemHeader, bytearray, int]:
        if index not in self._open:
            raise _protocol_error(f"image {index}: bytes before their header")
        return self._open[index]

    def _settle(self, index: int) -> None:
        if index not in self._waiting:
            raise _protocol_error(f"image {index} was settled twice, or never sent")
        self._waiting.remove(index)
        self._open.pop(index, None)


def position(result: Result) -> int:
    """Where in the request a result belongs."""
    index = result.image_index if isinstance(result, RequestError) else result.index
    return -1 if index is None else index


R = TypeVar("R", EncodedImage, RetainedImage)


def all_good(results: Sequence[Result], kind: type[R]) -> list[R]:
    """The results if all are of ``kind``.

    Raises:
        RequestError: the first that is not.
    """
    images: list[R] = []
    for result in results:
        if isinstance(result, RequestError):
            raise result
        assert isinstance(result, kind)
        images.append(result)
    return images


def good_or_error(results: Sequence[Result], kind: type[R]) -> list[R | RequestError]:
    """The results, each of ``kind`` or an error."""
    assert all(isinstance(result, (kind, RequestError)) for result in results)
    return cast("list[R | RequestError]", results)


def model_info(response: encoder_pb2.GetModelInfoResponse) -> ModelInfo:
    values = {entry.name: getattr(response, entry.name) for entry in fields(ModelInfo)}
    processor = {entry.name: getattr(response.processor, entry.name) for entry in fields(ProcessorInfo)}
    values |= {
        "dtype": _DTYPE_NAMES.get(response.dtype, "unknown"),
        "processor": ProcessorInfo(
            **processor | {"image_mean": tuple(processor["image_mean"]), "image_std": tuple(processor["image_std"])}
        ),
        "limits": _same_fields(LimitsInfo, response.limits),
        "attention": AttentionInfo(
            backend=response.attention.backend,
            implementation=response.attention.implementation,
            source=response.attention.source,
            reason=response.attention.reason,
            implementation_version=response.attention.implementation_version,
            rejected=tuple((passed.backend, passed.reason) for passed in response.attention.rejected),
        ),
        "transports": tuple(response.transports),
    }
    return ModelInfo(**values)


def call_error(error: grpc.RpcError, target: str) -> RequestError:
    """The typed error for a call that failed as a whole."""
    call = cast("grpc.Call", error)
    code = call.code().name
    details = call.details() or ""
    info, retry_after_s = _error_details(call)
    if info is not None:
        return request_error(info.reason, details, code=code, retry_after_s=retry_after_s)
    match code:
        case "UNAVAILABLE":
            broke = f"No encoder service answers at {target}, or the connection to it broke"
            return request_error(Reason.UNREACHABLE, f"{broke}: {details.rstrip('.')}." if details else f"{broke}.")
        case "DEADLINE_EXCEEDED":
            return request_error(Reason.DEADLINE_EXCEEDED, "The call took longer than its timeout.")
        case "CANCELLED":
            return request_error(Reason.CANCELLED, "The call was cancelled.")
        case "RESOURCE_EXHAUSTED" if "larger than max" in details:
            # gRPC refuses such a message before the server's own code sees it, so there is no ErrorInfo.
            return request_error(Reason.REQUEST_TOO_LARGE, "The request is larger than the server takes. Split it.")
        case _:
            return request_error(Reason.INTERNAL, f"The call failed: {details}", code=code)


def _error_details(call: grpc.Call) -> tuple[error_details_pb2.ErrorInfo | None, float | None]:
    status = rpc_status.from_call(call)
    info, retry_after_s = None, None
    for detail in status.details if status else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            found = error_details_pb2.ErrorInfo()
            detail.Unpack(found)
            info = found if found.domain == ERROR_DOMAIN else info
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1e3
    return info, retry_after_s


def _same_fields(cls: type[T], message: object) -> T:
    """A dataclass from a message whose fields have the same names."""
    return cls(**{entry.name: getattr(message, entry.name) for entry in fields(cast("Any", cls))})


def _protocol_error(what: str) -> RequestError:
    return request_error(Reason.PROTOCOL_ERROR, f"The server broke the protocol: {what}.")
