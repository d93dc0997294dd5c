"""The messages of an answer, put together again."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from zlib_ng import zlib_ng

from encoder_svc.client.received import Chunk
from encoder_svc.client.types import DTYPES, EncodedImage, RetainedImage, StageTimings
from encoder_svc.client.wire import CODE_NAMES, DTYPE_NAMES, protocol_error, same_fields, unreadable_error
from encoder_svc.errors import Reason, RequestError, request_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from encoder_svc._generated.encoder.v1 import encoder_pb2

Result = EncodedImage | RetainedImage | RequestError


@dataclass(slots=True)
class _Arriving:
    """An image whose bytes come in: how many did, and their checksum so far."""

    header: encoder_pb2.ItemHeader
    data: npt.NDArray[np.uint8]
    filled: int = 0
    crc32: int = 0


class Assembler:
    """Puts the messages of one answer together again.

    Args:
        retained: the answer has no chunks; its images become :class:`RetainedImage`.
    """

    def __init__(self, num_images: int, *, retained: bool = False) -> None:
        self._retained = retained
        self._waiting = set(range(num_images))
        self._open: dict[int, _Arriving] = {}
        self.summary: encoder_pb2.Summary | None = None

    def feed(self, response: encoder_pb2.EncodeImagesResponse | Chunk | None) -> Result | None:
        """Takes one message, None for one that could not be read; returns an image once it is complete, or its error.

        Raises:
            RequestError: PROTOCOL_ERROR or CHECKSUM_MISMATCH; the answer cannot be trusted.
        """
        if isinstance(response, Chunk):
            self._append(response)
            return None
        if response is None:
            raise unreadable_error()
        match response.WhichOneof("event"):
            case "header":
                self._begin(response.header)
            case "chunk":
                chunk = response.chunk
                self._append(Chunk(chunk.index, chunk.offset, memoryview(chunk.data)))
            case "done":
                return self._retain(response.done) if self._retained else self._complete(response.done)
            case "error":
                self._settle(response.error.index)
                return request_error(
                    response.error.reason,
                    response.error.message,
                    code=CODE_NAMES.get(response.error.code, "UNKNOWN"),
                    image_index=response.error.index,
                    retry_after_s=response.error.retry_after_s or None,
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
            raise protocol_error(f"the answer ended with {len(self._waiting)} images unsettled")

    def _begin(self, header: encoder_pb2.ItemHeader) -> None:
        dtype = DTYPES.get(DTYPE_NAMES.get(header.dtype, ""))
        if (
            dtype is None
            or header.byte_length != header.rows * header.width * dtype.itemsize
            or header.width % (1 + header.num_deepstack)
        ):
            raise protocol_error(f"image {header.index}: the header's sizes contradict each other")
        if header.index not in self._waiting or header.index in self._open:
            raise protocol_error(f"image {header.index}: an unexpected header")
        try:
            data = np.empty(0 if self._retained else header.byte_length, np.uint8)
        except (MemoryError, ValueError):  # not there, or more than an array may have
            raise protocol_error(f"image {header.index}: {header.byte_length} bytes, more than memory has") from None
        self._open[header.index] = _Arriving(header, data)

    def _append(self, chunk: Chunk) -> None:
        image, end = self._opened(chunk.index), chunk.offset + len(chunk.data)
        if chunk.offset != image.filled or end > len(image.data):
            raise protocol_error(f"image {chunk.index}: a chunk that does not follow the one before")
        image.data[image.filled : end] = np.frombuffer(chunk.data, np.uint8)
        image.crc32 = zlib_ng.crc32(chunk.data, image.crc32)  # now, while it is in the cache
        image.filled = end

    def _complete(self, done: encoder_pb2.ItemDone) -> EncodedImage:
        image = self._opened(done.index)
        header = image.header
        if image.filled != len(image.data):
            raise protocol_error(f"image {done.index}: {image.filled} of {len(image.data)} bytes arrived")
        if image.crc32 != done.crc32:
            raise request_error(
                Reason.CHECKSUM_MISMATCH, "The embeddings were damaged on the way.", image_index=done.index
            )
        self._settle(done.index)
        embeddings = image.data.view(DTYPES[DTYPE_NAMES[header.dtype]]).reshape(header.rows, header.width)
        return EncodedImage(
            index=done.index,
            embeddings=embeddings,
            grid_thw=(header.grid_thw.t, header.grid_thw.h, header.grid_thw.w),
            num_deepstack=header.num_deepstack,
            content_key=header.content_key,
            timings=same_fields(StageTimings, done.timings),
        )

    def _retain(self, done: encoder_pb2.ItemDone) -> RetainedImage:
        header = self._opened(done.index).header
        self._settle(done.index)
        return RetainedImage(
            index=done.index,
            key=header.content_key,
            grid_thw=(header.grid_thw.t, header.grid_thw.h, header.grid_thw.w),
            rows=header.rows,
            width=header.width,
            dtype=DTYPE_NAMES[header.dtype],
            num_deepstack=header.num_deepstack,
            timings=same_fields(StageTimings, done.timings),
        )

    def _opened(self, index: int) -> _Arriving:
        if index not in self._open:
            raise protocol_error(f"image {index}: bytes before their header")
        return self._open[index]

    def _settle(self, index: int) -> None:
        if index not in self._waiting:
            raise protocol_error(f"image {index} was settled twice, or never sent")
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
            # It would itself hold the frames that hold it, and all images, until the collector of cycles comes by.
            raise copy(result)
        assert isinstance(result, kind)
        images.append(result)
    return images


def good_or_error(results: Sequence[Result], kind: type[R]) -> list[R | RequestError]:
    """The results, each of ``kind`` or an error."""
    assert all(isinstance(result, (kind, RequestError)) for result in results)
    return cast("list[R | RequestError]", results)
