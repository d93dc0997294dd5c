"""Turns calls away before their message is read: while the service starts or drains, and while it is full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.server.status import abort

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from encoder_svc.errors import RequestError
    from encoder_svc.observability.request import Observer
    from encoder_svc.server.servicer import EncoderServicer

_ENCODER: Final = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"]
_METHODS: Final = {f"/{_ENCODER.full_name}/{method.name}": method.name for method in _ENCODER.methods}


class Gate(grpc.aio.ServerInterceptor):
    """Asks the servicer at each of its calls whether it would be refused whatever it says.

    A message holds images, and reading one only to refuse it costs the cores that those in work need.
    """

    def __init__(self, servicer: EncoderServicer, observer: Observer) -> None:
        self._servicer = servicer
        self._observer = observer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See grpc.aio.ServerInterceptor."""
        method = _METHODS.get(handler_call_details.method)
        if method is not None:
            refusal = self._servicer.refusal_at_the_door(method)
            if refusal is not None:
                return self._refuse(method, refusal)
        return await continuation(handler_call_details)

    def _refuse(self, method: str, error: RequestError) -> grpc.RpcMethodHandler[Any, Any]:
        """A handler that never asks for the message: only those of a stream read none before they run."""

        async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            with self._observer.request(method, "", context.invocation_metadata() or ()) as record:
                context.set_trailing_metadata(record.metadata())
                record.failed(error.code, error.reason)
            await abort(context, error)

        return grpc.stream_stream_rpc_method_handler(refuse)
