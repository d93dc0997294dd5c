"""The messages of a streamed answer, written with a time limit each."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from zlib_ng import zlib_ng

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.errors import Reason, request_error
from encoder_svc.server.status import item_error
from encoder_svc.transport.chunks import CHUNK_BYTES, chunk_messages

if TYPE_CHECKING:
    import grpc.aio

    from encoder_svc.errors import RequestError
    from encoder_svc.observability.request import RequestRecord
    from encoder_svc.observability.stages import Stages
    from encoder_svc.server.core import Embeddings


class CallerLeftError(Exception):
    """The caller is gone; there is nobody to tell."""


class Answer:
    """Writes one call's answer. Whatever it says of images is also counted in ``summary``, and told to ``record``.

    Args:
        info: of the model that is served.
        send_timeout_s: how long the caller may leave one message unread.
    """

    def __init__(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        info: encoder_pb2.GetModelInfoResponse,
        record: RequestRecord,
        *,
        num_images: int,
        request_id: str,
        send_timeout_s: float,
    ) -> None:
        self.summary = encoder_pb2.Summary(num_images=num_images, request_id=request_id)
        self._context = context
        self._info = info
        self._record = record
        self._send_timeout_s = send_timeout_s
        # gRPC takes one message at a time; and images one after the other, so that the first is whole sooner.
        self._one_image = asyncio.Lock()

    async def image(
        self,
        index: int,
        key: str,
        embeddings: Embeddings,
        *,
        outcome: str,
        stages: Stages,
        ready_s: float,
        with_data: bool = True,
    ) -> None:
        """Header, chunks (unless ``with_data`` is false), done.

        Args:
            outcome, stages: how the embeddings were come by, and the stages that they passed.
            ready_s: when the last of those ended, on ``time.monotonic``.

        Raises:
            RequestError: STREAM_STALLED.
        """
        async with self._one_image:
            started_s = time.monotonic()
            stages = replace(stages, send_wait_s=started_s - ready_s)
            await self._write(header=self._header(index, key, embeddings))
            if with_data:
                crc32 = await self._chunks(index, embeddings.data)
            else:
                crc32 = await asyncio.to_thread(zlib_ng.crc32, embeddings.data)
            timings = encoder_pb2.StageTimings(**asdict(replace(stages, send_s=time.monotonic() - started_s)))
            await self._write(done=encoder_pb2.ItemDone(index=index, crc32=crc32, timings=timings))
            stages = replace(stages, send_s=time.monotonic() - started_s)
        num_rows, num_bytes = self._num_rows(embeddings), embeddings.nbytes if with_data else 0
        self.summary.num_rows += num_rows
        self.summary.num_bytes += num_bytes
        self._record.image_sent(index, outcome, stages, num_rows=num_rows, num_bytes=num_bytes)

    async def _chunks(self, index: int, data: memoryview) -> int:
        """Sends them, and returns their checksum: each is summed while it is in the cache."""
        crc32 = 0
        for at, message in zip(range(0, len(data), CHUNK_BYTES), chunk_messages(index, data), strict=True):
            crc32 = zlib_ng.crc32(data[at : at + CHUNK_BYTES], crc32)
            await self._send(message)
        return crc32

    async def failure(self, index: int, error: RequestError) -> None:
        """One image's error."""
        self.summary.num_failed += 1
        async with self._one_image:
            await self._write(error=item_error(index, error))
        self._record.image_failed(index, error.reason)

    async def end(self) -> None:
        """The summary."""
        self.summary.duration_s = self._record.elapsed_s()
        await self._write(summary=self.summary)

    async def _write(self, **event: Any) -> None:
        await self._send(encoder_pb2.EncodeImagesResponse(**event).SerializeToString())

    async def _send(self, message: bytes) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await self._context.write(message)
        except TimeoutError:
            raise request_error(
                Reason.STREAM_STALLED, f"No message of the answer was read for {self._send_timeout_s:g} s."
            ) from None
        except Exception as error:  # gRPC's own, of several kinds: the call can no longer be written to
            raise CallerLeftError from error

    def _header(self, index: int, key: str, embeddings: Embeddings) -> encoder_pb2.ItemHeader:
        info, grid = self._info, embeddings.grid
        return encoder_pb2.ItemHeader(
            index=index,
            grid_thw=encoder_pb2.GridThw(t=grid.t, h=grid.h, w=grid.w),
            rows=self._num_rows(embeddings),
            width=info.width,
            dtype=info.dtype,
            byte_length=embeddings.nbytes,
            content_key=key,
            num_deepstack=info.num_deepstack,
        )

    def _num_rows(self, embeddings: Embeddings) -> int:
        return embeddings.grid.num_rows(self._info.spatial_merge_size)
