"""The service's methods as gRPC runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from encoder_svc._generated.encoder.v1 import encoder_pb2_grpc
from encoder_svc.transport.chunks import serialized

if TYPE_CHECKING:
    from encoder_svc.server.servicer import EncoderServicer


def add_servicer(servicer: EncoderServicer, server: grpc.aio.Server) -> None:
    """Adds its methods, whose streamed responses may come serialized."""
    registry = _Registry()
    encoder_pb2_grpc.add_EncoderServicer_to_server(servicer, registry)  # type: ignore[arg-type]
    handlers = {
        name: handler._replace(response_serializer=serialized) if handler.response_streaming else handler
        for name, handler in registry.handlers.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(registry.service, handlers),))


class _Registry:
    """Takes what the generated code would give a server."""

    def __init__(self) -> None:
        self.service = ""
        self.handlers: dict[str, Any] = {}

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.service, self.handlers = service, handlers

    def add_generic_rpc_handlers(self, _: object) -> None:
        """The same handlers once more."""
