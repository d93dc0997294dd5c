"""Turns calls away before their message is read: while the service starts or drains, and while it is full. A message
that is none of ours is answered here too."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.errors import Reason, RequestError, request_error, without_frames
from encoder_svc.server.status import abort, end_with

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from encoder_svc.observability.request import Observer
    from encoder_svc.server.servicer import EncoderServicer

_ENCODER: Final = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"]
_MALFORMED: Final = request_error(
    Reason.REQUEST_MALFORMED, "The message cannot be read: it is no message of this method, or was cut short."
)
_METHODS: Final = {f"/{_ENCODER.full_name}/{method.name}": method.name for method in _ENCODER.methods}

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Received(Generic[M]):
    """A message, and how long it was on the wire: a message of protobuf's knows only once it is written anew."""

    message: M
    num_bytes: int


class Gate(grpc.aio.ServerInterceptor):
    """Asks the servicer at each of its calls whether it would be refused whatever it says.

    A message holds images, and reading one only to refuse it costs the cores that those in work need.

    Attributes:
        last_call_s: when the last one came, by ``time.monotonic``.
    """

    def __init__(self, servicer: EncoderServicer, observer: Observer) -> None:
        self._servicer = servicer
        self._observer = observer
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any] | None] = {}
        self.last_call_s = -math.inf

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See grpc.aio.ServerInterceptor."""
        method = _METHODS.get(handler_call_details.method)
        if method is None:
            return await continuation(handler_call_details)
        self.last_call_s = time.monotonic()
        refusal = self._servicer.refusal_at_the_door(method)
        if refusal is not None:
            return self._refuse(method, refusal)
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            self._handlers[method] = handler and self._receiving(method, handler)
        return self._handlers[method]

    def _receiving(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """The handler, given :class:`Received` messages, and never one that cannot be read: gRPC would end such a call
        with UNKNOWN and a traceback."""
        read, streams = handler.request_deserializer, handler.response_streaming
        work: Any = handler.unary_stream if streams else handler.unary_unary

        def receive(data: bytes) -> Received[Any] | None:
            try:
                return Received(read(data) if read else data, len(data))
            except DecodeError:
                return None

        async def answer(received: Received[Any] | None, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            if received is not None:
                try:
                    return await work(received, context)
                except grpc.aio.AbortError as error:
                    del received  # the context keeps the error, and that this frame, which keeps the context
                    without_frames(error)
                    raise
            told = self._observer.refused(
                method, context.invocation_metadata() or (), _MALFORMED.code, _MALFORMED.reason
            )
            context.set_trailing_metadata(told)
            await abort(context, _MALFORMED)

        make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        return make(answer, receive, handler.response_serializer)

    def _refuse(self, method: str, error: RequestError) -> grpc.RpcMethodHandler[Any, Any]:
        """A handler that never asks for the message: only those of a stream read none before they run."""

        async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            told = self._observer.refused(method, context.invocation_metadata() or (), error.code, error.reason)
            end_with(context, error, told)

        return grpc.stream_stream_rpc_method_handler(refuse)
