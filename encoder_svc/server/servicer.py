"""``encoder.v1.Encoder`` as gRPC calls it: from when on, until when, and what each call is given to."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.errors import Reason, RequestError, request_error
from encoder_svc.server.answer import CallerLeftError
from encoder_svc.server.calls import Calls
from encoder_svc.server.encode_images import encode_images
from encoder_svc.server.retained import fetch_embeddings, release_embeddings

if TYPE_CHECKING:
    import asyncio

    import grpc.aio

    from encoder_svc.observability.request import Observer, RequestRecord
    from encoder_svc.server.gate import Received
    from encoder_svc.server.pipeline import Pipeline
    from encoder_svc.server.serving import Serving

    Context = grpc.aio.ServicerContext[Any, Any]


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
                lambda record: encode_images(self._serving, self._opened(), received, context, record),
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
                lambda record: fetch_embeddings(self._serving, self._opened(), received.message, context, record),
            )

    async def ReleaseEmbeddings(  # type: ignore[override]
        self, received: Received[encoder_pb2.ReleaseEmbeddingsRequest], context: Context
    ) -> encoder_pb2.ReleaseEmbeddingsResponse:
        """See protos/encoder/v1/encoder.proto."""

        async def work(_: RequestRecord) -> encoder_pb2.ReleaseEmbeddingsResponse:
            return await release_embeddings(self._opened(), received.message)

        return await self._calls.answered("ReleaseEmbeddings", "", context, work)

    def _opened(self) -> Pipeline:
        """
        Raises:
            RequestError: STARTING, DRAINING or DEVICE_BROKEN.
        """
        if self._pipeline is None:
            raise self._refusal
        return self._pipeline
