"""``encoder.v1.Encoder``. A request reads from top to bottom in :meth:`EncoderServicer._encode_images`."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.cache.keys import KEY_DIGITS
from encoder_svc.errors import Reason, RequestError, request_error
from encoder_svc.images.types import EncodedImageBytes, GridThw, ImageSource, PixelValues, RawRgb
from encoder_svc.observability.stages import Stages
from encoder_svc.server.answer import Answer, CallerLeftError
from encoder_svc.server.calls import Calls
from encoder_svc.server.info import DTYPE_NAMES
from encoder_svc.server.window import Window

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc.aio

    from encoder_svc.observability.request import Observer, RequestRecord
    from encoder_svc.server.core import AdmittedRequest, Encoded
    from encoder_svc.server.gate import Received
    from encoder_svc.server.pipeline import CheckedImage, Pipeline, RequestShare

    Context = grpc.aio.ServicerContext[Any, Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """How requests are served. See the options of the same names in config.py."""

    request_window_patches: int
    send_timeout_s: float
    lease_s: float
    max_lease_s: float


class EncoderServicer(encoder_pb2_grpc.EncoderServicer):
    """Serves behind a :class:`~encoder_svc.server.gate.Gate`, which hands it messages as ``Received``.

    Refuses with STARTING until :meth:`open`, and with another reason after :meth:`close`.
    """

    def __init__(self, serving: Serving, observer: Observer) -> None:
        self._serving = serving
        self._calls = Calls(observer)
        self._pipeline: Pipeline | None = None
        self._refusal = request_error(Reason.STARTING, "The model is being loaded; try again shortly.")

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return self._pipeline is not None

    def open(self, pipeline: Pipeline) -> None:
        """Begins to serve."""
        self._pipeline = pipeline

    def close(self, refusal: RequestError) -> None:
        """Takes no new request. Those that run go on."""
        self._pipeline = None
        self._refusal = refusal

    def refusal_at_the_door(self, method: str) -> RequestError | None:
        """Why a call of ``method`` would be refused whatever its message says; None if that depends on it."""
        if self._pipeline is None:
            return self._refusal
        if method == "EncodeImages" and (refusal := self._pipeline.core.refusal_at_the_door()):
            return refusal
        return None

    async def drain(self, seconds: float, hurry: asyncio.Event) -> int:
        """Waits for the requests that run, and ends those that are left after ``seconds``, or once ``hurry`` is set;
        returns how many."""
        return await self._calls.drain(seconds, hurry, self._refusal)

    async def GetModelInfo(  # type: ignore[override]
        self, received: Received[encoder_pb2.GetModelInfoRequest], context: Context
    ) -> encoder_pb2.GetModelInfoResponse:
        """See protos/encoder/v1/encoder.proto."""

        async def work(_: RequestRecord) -> encoder_pb2.GetModelInfoResponse:
            return self._opened().info

        return await self._calls.answered("GetModelInfo", "", context, work)

    async def EncodeImages(  # type: ignore[override]  # a coroutine that writes, where the stub has a generator
        self, received: Received[encoder_pb2.EncodeImagesRequest], context: Context
    ) -> None:
        """See protos/encoder/v1/encoder.proto."""
        with suppress(CallerLeftError):
            await self._calls.answered(
                "EncodeImages",
                received.message.request_id,
                context,
                lambda record: self._encode_images(self._opened(), received, context, record),
            )

    async def FetchEmbeddings(  # type: ignore[override]
        self, received: Received[encoder_pb2.FetchEmbeddingsRequest], context: Context
    ) -> None:
        """See protos/encoder/v1/encoder.proto."""
        with suppress(CallerLeftError):
            await self._calls.answered(
                "FetchEmbeddings",
                received.message.request_id,
                context,
                lambda record: self._fetch(self._opened(), received.message, context, record),
            )

    async def ReleaseEmbeddings(  # type: ignore[override]
        self, received: Received[encoder_pb2.ReleaseEmbeddingsRequest], context: Context
    ) -> encoder_pb2.ReleaseEmbeddingsResponse:
        """See protos/encoder/v1/encoder.proto."""

        async def work(_: RequestRecord) -> encoder_pb2.ReleaseEmbeddingsResponse:
            pipeline = self._opened()
            pipeline.processor.limits.check_num_images(len(received.message.keys))
            keys = [key for key in received.message.keys if len(key) <= KEY_DIGITS]
            return encoder_pb2.ReleaseEmbeddingsResponse(num_released=await pipeline.core.release(keys))

        return await self._calls.answered("ReleaseEmbeddings", "", context, work)

    def _opened(self) -> Pipeline:
        """
        Raises:
            RequestError: STARTING, DRAINING or DEVICE_BROKEN.
        """
        if self._pipeline is None:
            raise self._refusal
        return self._pipeline

    async def _encode_images(
        self,
        pipeline: Pipeline,
        received: Received[encoder_pb2.EncodeImagesRequest],
        context: Context,
        record: RequestRecord,
    ) -> None:
        """The whole life of one request. Cancelling it takes its images out of every queue."""
        request = received.message
        pipeline.processor.limits.check_request_id(request.request_id)
        time_remaining_s = context.time_remaining()
        deadline_s = math.inf if time_remaining_s is None else time.monotonic() + time_remaining_s
        lease_s = self._lease_s(request)
        async with _admitted(pipeline, received) as admitted:
            images = await pipeline.check([partial(_source, image) for image in request.images])
            pipeline.processor.limits.check_request_patches(sum(image.num_patches for image in images))
            costs = await admitted.reserve(
                [(image.key, image.num_patches) for image in images], deadline_s - time.monotonic()
            )
            record.admitted(len(images), received.num_bytes)
            answer = self._answer(context, pipeline, len(images), request.request_id, record)
            one = _OneRequest(
                pipeline=pipeline,
                admitted=admitted,
                answer=answer,
                window=Window(self._serving.request_window_patches),
                share=pipeline.share(),
                deadline_s=deadline_s,
                lease_s=lease_s,
                arrived_s=record.arrived_s,
                admitted_s=time.monotonic(),
            )
            try:
                async with asyncio.TaskGroup() as images_running:
                    for image, cost in zip(images, costs, strict=True):
                        images_running.create_task(one.run(image, cost))
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            await answer.end()

    async def _fetch(
        self, pipeline: Pipeline, request: encoder_pb2.FetchEmbeddingsRequest, context: Context, record: RequestRecord
    ) -> None:
        pipeline.processor.limits.check_request_id(request.request_id)
        pipeline.processor.limits.check_num_images(len(request.keys))
        record.admitted(len(request.keys))
        answer = self._answer(context, pipeline, len(request.keys), request.request_id, record)
        for index, key in enumerate(request.keys):
            async with AsyncExitStack() as held:
                try:
                    if len(key) > KEY_DIGITS:  # nobody else is troubled with what is no key
                        raise request_error(Reason.KEY_UNKNOWN, f"A key has {KEY_DIGITS} hex digits.")
                    embeddings = await held.enter_async_context(pipeline.core.fetch(key))
                except RequestError as error:
                    await answer.failure(index, error)
                    continue
                await answer.image(index, key, embeddings, outcome="fetched", stages=Stages(), ready_s=time.monotonic())
        await answer.end()

    def _answer(
        self, context: Context, pipeline: Pipeline, num_images: int, request_id: str, record: RequestRecord
    ) -> Answer:
        return Answer(
            context,
            pipeline.info,
            record,
            num_images=num_images,
            request_id=request_id,
            send_timeout_s=self._serving.send_timeout_s,
        )

    def _lease_s(self, request: encoder_pb2.EncodeImagesRequest) -> float | None:
        """How long to retain the request's embeddings; None if they are to be streamed.

        Raises:
            RequestError: LEASE_INVALID.
        """
        if request.delivery != encoder_pb2.DELIVERY_RETAIN:
            return None
        seconds = request.lease_s or self._serving.lease_s
        if not 0 < seconds <= self._serving.max_lease_s:
            raise request_error(
                Reason.LEASE_INVALID, f"lease_s must be above 0 and at most {self._serving.max_lease_s:g}."
            )
        return seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class _OneRequest:
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

    async def run(self, image: CheckedImage, cost_patches: int) -> None:
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
            return error
        except Exception:
            logger.exception("an image failed")
            return request_error(Reason.INTERNAL, "The server failed on this image.")


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
