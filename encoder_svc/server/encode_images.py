"""What EncodeImages does. A request reads from top to bottom in :func:`encode_images`."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.errors import Reason, RequestError, request_error, without_frames
from encoder_svc.images.types import EncodedImageBytes, GridThw, ImageSource, PixelValues, RawRgb
from encoder_svc.server.answer import Answer
from encoder_svc.server.info import DTYPE_NAMES
from encoder_svc.server.window import Window

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import grpc.aio

    from encoder_svc.observability.request import RequestRecord
    from encoder_svc.server.core import AdmittedRequest, Encoded
    from encoder_svc.server.gate import Received
    from encoder_svc.server.pipeline import CheckedImage, Pipeline, RequestShare
    from encoder_svc.server.serving import Serving

logger = logging.getLogger(__name__)


async def encode_images(
    serving: Serving,
    pipeline: Pipeline,
    received: Received[encoder_pb2.EncodeImagesRequest],
    context: grpc.aio.ServicerContext[Any, Any],
    record: RequestRecord,
) -> None:
    """The whole life of one request. Cancelling it takes its images out of every queue.

    Raises:
        RequestError: what ends the whole request.
        CallerLeftError: nobody is there to be answered.
    """
    request = received.message
    pipeline.processor.limits.check_request_id(request.request_id)
    time_remaining_s = context.time_remaining()
    deadline_s = math.inf if time_remaining_s is None else time.monotonic() + time_remaining_s
    lease_s = _lease_s(serving, request)
    async with _admitted(pipeline, received) as admitted:
        images = await pipeline.check([partial(_source, image) for image in request.images])
        pipeline.processor.limits.check_request_patches(sum(image.num_patches for image in images))
        costs = await admitted.reserve(
            [(image.key, image.num_patches) for image in images], deadline_s - time.monotonic()
        )
        record.admitted(len(images), received.num_bytes)
        answer = Answer(
            context,
            pipeline.info,
            record,
            num_images=len(images),
            request_id=request.request_id,
            send_timeout_s=serving.send_timeout_s,
        )
        together = _Together(
            pipeline=pipeline,
            admitted=admitted,
            answer=answer,
            window=Window(serving.request_window_patches),
            share=pipeline.share(),
            deadline_s=deadline_s,
            lease_s=lease_s,
            arrived_s=record.arrived_s,
            admitted_s=time.monotonic(),
        )
        await together.run(images, costs)
        await answer.end()


def _lease_s(serving: Serving, request: encoder_pb2.EncodeImagesRequest) -> float | None:
    """How long to retain the request's embeddings; None if they are to be streamed.

    Raises:
        RequestError: LEASE_INVALID.
    """
    if request.delivery != encoder_pb2.DELIVERY_RETAIN:
        return None
    seconds = request.lease_s or serving.lease_s
    if not 0 < seconds <= serving.max_lease_s:
        raise request_error(
            Reason.LEASE_INVALID,
            f"lease_s is {seconds:g}; send above 0 and at most {serving.max_lease_s:g} seconds, or 0 for the server's "
            f"{serving.lease_s:g}.",
        )
    return seconds


@asynccontextmanager
async def _admitted(
    pipeline: Pipeline, received: Received[encoder_pb2.EncodeImagesRequest]
) -> AsyncIterator[AdmittedRequest]:
    """Room for a request while it runs.

    Raises:
        RequestError: it is empty, too large, or more than there is room for.
    """
    limits, num_images = pipeline.processor.limits, len(received.message.images)
    limits.check_num_images(num_images)
    limits.check_request_bytes(received.num_bytes)
    admitted = await pipeline.core.admit(num_images=num_images, num_bytes=received.num_bytes)
    try:
        yield admitted
    finally:
        admitted.close()


def _source(image: encoder_pb2.Image) -> ImageSource | RequestError:
    """The wire's image as ours, or IMAGE_MISSING."""
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
            return request_error(Reason.IMAGE_MISSING, "The image has no source: set encoded, raw or pixel_values.")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Together:
    """What the images of a request share."""

    pipeline: Pipeline
    admitted: AdmittedRequest
    answer: Answer
    window: Window
    share: RequestShare
    deadline_s: float
    lease_s: float | None
    arrived_s: float
    admitted_s: float

    async def run(self, images: Sequence[CheckedImage], costs_patches: Sequence[int]) -> None:
        """All of them, each in a task of its own.

        Raises:
            RequestError, CallerLeftError: what ends the whole request.
        """
        # A group's frame keeps the errors that it raises or was interrupted by, whose tracebacks keep the frame: images
        # and embeddings would stay until the collector of cycles comes by.
        failure = None
        try:
            async with asyncio.TaskGroup() as running:
                for image, cost_patches in zip(images, costs_patches, strict=True):
                    running.create_task(self._run_one(image, cost_patches))
        except ExceptionGroup as group:
            clear_frames(group.__traceback__)
            failure = group.exceptions[0]
        except asyncio.CancelledError as left:
            clear_frames(left.__traceback__)
            raise
        if failure is not None:
            try:
                raise failure
            finally:
                del failure

    async def _run_one(self, image: CheckedImage, cost_patches: int) -> None:
        """One image, from admission to the last byte. Raises only what ends the whole request."""
        completed = False
        try:
            async with self.window.room(cost_patches):
                entered_s = time.monotonic()
                encoded = await self._encode(image, entered_s)
                if isinstance(encoded, RequestError):
                    await self.answer.failure(image.index, encoded)
                    return
                await self.answer.image(
                    image.index,
                    image.key,
                    encoded.embeddings,
                    outcome=encoded.outcome,
                    stages=replace(
                        encoded.stages,
                        admission_s=self.admitted_s - self.arrived_s,
                        window_s=entered_s - self.admitted_s,
                    ),
                    ready_s=encoded.ready_s,
                    with_data=not self.lease_s,
                )
                completed = True
        finally:
            self.admitted.image_done(image.index, completed=completed)

    async def _encode(self, image: CheckedImage, since_s: float) -> Encoded | RequestError:
        """The image's embeddings, leased if they are to be retained; or what went wrong with it."""
        if isinstance(image.plan, RequestError):
            return image.plan
        try:
            return await self.admitted.encode(
                image.index,
                partial(self.pipeline.decode, image.plan, self.share, self.deadline_s),
                deadline_s=self.deadline_s,
                since_s=since_s,
                lease_s=self.lease_s,
            )
        except RequestError as error:
            return without_frames(error)
        except Exception:
            logger.exception("an image failed")
            return request_error(Reason.INTERNAL, "The server failed on this image.")
