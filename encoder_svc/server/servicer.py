"""``encoder.v1.Encoder``: admit → process → encode → stream, from top to bottom."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.errors import Reason, RequestError, request_error
from encoder_svc.images.types import EncodedImageBytes, GridThw, ImageSource, PixelValues, RawRgb
from encoder_svc.server.info import DTYPE_NAMES, DTYPES, model_info
from encoder_svc.server.status import abort, item_error
from encoder_svc.transport.chunks import chunks

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    from encoder_svc.cache.keys import ContentKeys
    from encoder_svc.engine.engine import EncodedItem, Engine
    from encoder_svc.images.processor import ImageProcessor, PlannedImage
    from encoder_svc.images.types import ProcessedImage
    from encoder_svc.models.tower import VisionTower

    Context = grpc.aio.ServicerContext[Any, Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """What a request passes through once the model is loaded."""

    tower: VisionTower
    processor: ImageProcessor
    keys: ContentKeys
    engine: Engine
    image_threads: ThreadPoolExecutor


@dataclass(frozen=True, slots=True)
class _Admitted:
    """One image of a request after the cheap checks: a plan, or why there is none."""

    index: int
    plan: PlannedImage | RequestError
    content_key: str = ""


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One image's end: embeddings, or why there are none."""

    index: int
    content_key: str
    processed: ProcessedImage
    item: EncodedItem


class EncoderServicer(encoder_pb2_grpc.EncoderServicer):
    """Refuses with STARTING until :meth:`open`, and with DRAINING after :meth:`drain`."""

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None
        self._refusal = request_error(Reason.STARTING, "The model is being loaded; try again shortly.")

    def open(self, pipeline: Pipeline) -> None:
        """Begins to serve."""
        self._pipeline = pipeline

    def drain(self) -> None:
        """Takes no new request. Those that run go on."""
        self._pipeline = None
        self._refusal = request_error(Reason.DRAINING, "This replica is shutting down; try another.")

    async def GetModelInfo(
        self, request: encoder_pb2.GetModelInfoRequest, context: Context
    ) -> encoder_pb2.GetModelInfoResponse:
        """See protos/encoder/v1/encoder.proto."""
        if self._pipeline is None:
            await abort(context, self._refusal)
        return model_info(self._pipeline.tower, self._pipeline.processor.limits)

    async def EncodeImages(  # type: ignore[override]  # a coroutine that writes, where the stub has a generator
        self, request: encoder_pb2.EncodeImagesRequest, context: Context
    ) -> None:
        """See protos/encoder/v1/encoder.proto."""
        if self._pipeline is None:
            await abort(context, self._refusal)
        try:
            summary = await _encode_images(self._pipeline, request, context)
        except RequestError as error:
            logger.info("request %.64r refused: %s", request.request_id, error.reason)
            await abort(context, error)
        except Exception:
            logger.exception("request %.64r failed", request.request_id)
            await abort(context, request_error(Reason.INTERNAL, "The server failed on this request."))
        logger.info(
            "request %.64r: %d images, %d failed, %d rows, %.1f ms",
            request.request_id,
            summary.num_images,
            summary.num_failed,
            summary.num_rows,
            summary.duration_s * 1e3,
        )


async def _encode_images(
    pipeline: Pipeline, request: encoder_pb2.EncodeImagesRequest, context: Context
) -> encoder_pb2.Summary:
    """The whole life of one request. Cancelling it takes its images out of every queue."""
    started_s = time.perf_counter()
    time_remaining_s = context.time_remaining()
    deadline_s = math.inf if time_remaining_s is None else started_s + time_remaining_s
    admitted = await _admit(pipeline, request)
    admission_s = time.perf_counter() - started_s

    summary = encoder_pb2.Summary(num_images=len(admitted), request_id=request.request_id)
    tasks = [asyncio.create_task(_encode_image(pipeline, image, deadline_s)) for image in admitted]
    try:
        for finished in asyncio.as_completed(tasks):
            outcome = await finished
            if isinstance(outcome, _Encoded):
                summary.num_rows += outcome.processed.grid.num_rows(pipeline.tower.settings.merge_size)
                summary.num_bytes += len(outcome.item.data)
                await _stream(context, pipeline.tower, outcome, admission_s)
            else:
                summary.num_failed += 1
                await context.write(encoder_pb2.EncodeImagesResponse(error=outcome))
    finally:
        for task in tasks:
            task.cancel()
    summary.duration_s = time.perf_counter() - started_s
    await context.write(encoder_pb2.EncodeImagesResponse(summary=summary))
    return summary


async def _admit(pipeline: Pipeline, request: encoder_pb2.EncodeImagesRequest) -> list[_Admitted]:
    """Checks the request against every limit. Reads headers, decodes nothing.

    Raises:
        RequestError: the request as a whole is refused. An image's own fault is kept with the image.
    """
    limits = pipeline.processor.limits
    limits.check_num_images(len(request.images))
    limits.check_request_bytes(request.ByteSize())
    loop = asyncio.get_running_loop()
    admitted = await loop.run_in_executor(
        pipeline.image_threads,
        lambda: [_admit_image(pipeline, index, image) for index, image in enumerate(request.images)],
    )
    plans = [image.plan for image in admitted if not isinstance(image.plan, RequestError)]
    limits.check_request_patches(sum(plan.grid.num_patches for plan in plans))
    return admitted


def _admit_image(pipeline: Pipeline, index: int, image: encoder_pb2.Image) -> _Admitted:
    try:
        source = _source(image)
        return _Admitted(index, pipeline.processor.plan(source), pipeline.keys.key(source.key_fields()))
    except RequestError as error:
        return _Admitted(index, error)


async def _encode_image(pipeline: Pipeline, image: _Admitted, deadline_s: float) -> _Encoded | encoder_pb2.ItemError:
    """Decodes, resizes and encodes one image. Never raises for a fault of that image."""
    try:
        if isinstance(image.plan, RequestError):
            raise image.plan
        processed = await asyncio.get_running_loop().run_in_executor(pipeline.image_threads, image.plan.process)
        item = await pipeline.engine.encode(processed, timeout_s=deadline_s - time.perf_counter())
        return _Encoded(image.index, image.content_key, processed, item)
    except RequestError as error:
        return item_error(image.index, error)
    except Exception:
        logger.exception("an image failed")
        return item_error(image.index, request_error(Reason.INTERNAL, "The server failed on this image."))


async def _stream(context: Context, tower: VisionTower, encoded: _Encoded, admission_s: float) -> None:
    """Header, chunks, done."""
    started_s = time.perf_counter()
    index, item, processed = encoded.index, encoded.item, encoded.processed
    header = encoder_pb2.ItemHeader(
        index=index,
        grid_thw=encoder_pb2.GridThw(t=processed.grid.t, h=processed.grid.h, w=processed.grid.w),
        rows=processed.grid.num_rows(tower.settings.merge_size),
        width=tower.encoder.config.width,
        dtype=DTYPES[tower.dtype],
        byte_length=len(item.data),
        content_key=encoded.content_key,
        num_deepstack=tower.encoder.config.num_deepstack,
    )
    await context.write(encoder_pb2.EncodeImagesResponse(header=header))
    crc32 = 0
    for offset, data in chunks(item.data):
        crc32 = zlib.crc32(data, crc32)
        chunk = encoder_pb2.ItemChunk(index=index, offset=offset, data=data)
        await context.write(encoder_pb2.EncodeImagesResponse(chunk=chunk))
    timings = encoder_pb2.StageTimings(
        admission_s=admission_s,
        decode_s=processed.decode_s,
        resize_s=processed.resize_s,
        queue_s=item.queue_s,
        h2d_s=item.h2d_s,
        forward_s=item.forward_s,
        d2h_s=item.d2h_s,
        send_s=time.perf_counter() - started_s,
    )
    done = encoder_pb2.ItemDone(index=index, crc32=crc32, timings=timings)
    await context.write(encoder_pb2.EncodeImagesResponse(done=done))


def _source(image: encoder_pb2.Image) -> ImageSource:
    """The wire's image as ours.

    Raises:
        RequestError: IMAGE_MISSING.
    """
    match image.WhichOneof("source"):
        case "encoded":
            return EncodedImageBytes(image.encoded)
        case "raw":
            return RawRgb(image.raw.height, image.raw.width, image.raw.data)
        case "pixel_values":
            values = image.pixel_values
            grid = GridThw(values.grid_thw.t, values.grid_thw.h, values.grid_thw.w)
            return PixelValues(grid, DTYPE_NAMES.get(values.dtype, ""), values.data)
        case _:
            raise request_error(Reason.IMAGE_MISSING, "The image has no source: set encoded, raw or pixel_values.")
