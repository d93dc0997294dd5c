"""What ``encoder-svc health`` does. Imports gRPC and little else: a container runs it every few seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from encoder_svc.errors import Reason, request_error

if TYPE_CHECKING:
    from encoder_svc.connection import Connection
    from encoder_svc.errors import RequestError

_LONGEST_TIMEOUT_S = 1e6  # gRPC's clock runs over some way beyond


def health_status(server: Connection, service: str, *, timeout_s: float) -> str:
    """What a server answers by the gRPC health protocol (grpc.health.v1.Health/Check): SERVING or NOT_SERVING.

    Args:
        service: its full name; empty for the server as a whole.

    Raises:
        RequestError: it knows no such service, or gives no such answer in time.
    """
    with server.channel() as channel:
        check = cast("Any", health_pb2_grpc.HealthStub(channel)).Check  # the stubs know no method of it
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            answer = check(request, timeout=min(timeout_s, _LONGEST_TIMEOUT_S))
        except grpc.RpcError as error:
            raise _call_error(error, server.target, service, timeout_s) from None
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def _call_error(error: grpc.RpcError, target: str, service: str, timeout_s: float) -> RequestError:
    call = cast("grpc.Call", error)
    details = (call.details() or "no details").rstrip(".")
    match call.code():
        case grpc.StatusCode.NOT_FOUND:
            return request_error(Reason.INTERNAL, f"{target} knows no service {service!r}.", code="NOT_FOUND")
        case grpc.StatusCode.UNAVAILABLE:
            return request_error(Reason.UNREACHABLE, f"Nothing answers at {target}: {details}.")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return request_error(Reason.DEADLINE_EXCEEDED, f"{target} did not answer within {timeout_s:g} s.")
        case grpc.StatusCode.UNIMPLEMENTED:
            return request_error(Reason.INTERNAL, f"What answers at {target} has no gRPC health service.")
        case code:
            return request_error(Reason.INTERNAL, f"The check of {target} failed with {code.name}: {details}.")
