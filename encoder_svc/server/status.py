"""RequestError to gRPC: a status with google.rpc details, or an item's error message."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.errors import CODE_NUMBERS, ERROR_DOMAIN, Reason

if TYPE_CHECKING:
    from typing import Any

    from google.protobuf.message import Message

    from encoder_svc.errors import RequestError

_FIELDS: Final[dict[str, str]] = {
    Reason.REQUEST_MALFORMED: "",  # the message itself
    Reason.REQUEST_ID_TOO_LONG: "request_id",
    Reason.LEASE_INVALID: "lease_s",
}
"""Which of a request's fields a reason is about, where that is not what it asks for."""


# gRPC sends a status after what was written before it. A call that waits for that keeps its request in memory.
_TOLD_S: Final = 1.0


async def abort(
    context: grpc.aio.ServicerContext[Any, Any], error: RequestError, *, asked_for: str = "images"
) -> NoReturn:
    """Ends the call with the error's status, ErrorInfo and, where they apply, BadRequest and RetryInfo.

    Args:
        asked_for: the request's field that says what is asked for.
    """
    status = _status(error, asked_for)
    try:
        # What was set before, such as the trace's context, would be dropped.
        metadata = (*(context.trailing_metadata() or ()), *(status.trailing_metadata or ()))
        async with asyncio.timeout(_TOLD_S):
            await context.abort(status.code, status.details or "", metadata)
    except grpc.aio.AbortError:
        raise
    except Exception:  # the caller left before the status could be sent, or reads nothing; gRPC tells it once it does
        raise asyncio.CancelledError from None
    raise AssertionError("abort() does not return")


def end_with(
    context: grpc.aio.ServicerContext[Any, Any], error: RequestError, metadata: tuple[tuple[str, str], ...]
) -> None:
    """Has the call end as :func:`abort` does once its handler returns, for less: nothing is raised.

    Args:
        metadata: what the caller is told beside.
    """
    status = _status(error, "images")
    context.set_code(status.code)
    context.set_details(status.details or "")
    context.set_trailing_metadata((*metadata, *(status.trailing_metadata or ())))


def item_error(index: int, error: RequestError) -> encoder_pb2.ItemError:
    """One image's failure, for the stream."""
    return encoder_pb2.ItemError(
        index=index,
        code=CODE_NUMBERS[error.code],
        reason=error.reason,
        message=error.message,
        retry_after_s=error.retry_after_s or 0.0,
    )


def _status(error: RequestError, asked_for: str) -> grpc.Status:
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)]
    if error.code == "INVALID_ARGUMENT":
        field = _FIELDS.get(error.reason, asked_for)
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1e3))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return rpc_status.to_status(
        status_pb2.Status(
            code=CODE_NUMBERS[error.code], message=error.message, details=[_pack(detail) for detail in details]
        )
    )


def _pack(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
