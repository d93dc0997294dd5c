"""What the sync and the async client share of a call: names, model info, errors. No channel, no loop."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.client.types import (
    AttentionInfo,
    LimitsInfo,
    ModelInfo,
    ProcessorInfo,
)
from encoder_svc.errors import CODE_NUMBERS, ERROR_DOMAIN, Reason, RequestError, request_error

if TYPE_CHECKING:
    import grpc
    from google.rpc import status_pb2

ROUND_ROBIN = ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}')
"""A channel argument: balance calls among the addresses of the target, such as those of a headless Service."""

CODE_NAMES = {number: name for name, number in CODE_NUMBERS.items()}
DTYPE_NUMBERS = {
    "float32": encoder_pb2.DTYPE_FLOAT32,
    "float16": encoder_pb2.DTYPE_FLOAT16,
    "bfloat16": encoder_pb2.DTYPE_BFLOAT16,
}
DTYPE_NAMES = {number: name for name, number in DTYPE_NUMBERS.items()}

# What gRPC's client says of a message that it did not give us: not one of ours, or longer than it takes.
_UNREADABLE_HERE = ("Exception deserializing response", "CLIENT: Received message larger than max")
# What gRPC's client says of a call that it was told to cancel, or whose channel was closed.
_CANCELLED_HERE = ("Locally cancelled", "Channel closed", "garbage collection")

T = TypeVar("T")


def closed_error() -> RequestError:
    return request_error(Reason.UNREACHABLE, "This client is closed.")


def cancelled_error() -> RequestError:
    return request_error(Reason.CANCELLED, "The call was cancelled.")


def protocol_error(what: str) -> RequestError:
    return request_error(Reason.PROTOCOL_ERROR, f"The server broke the protocol: {what}.")


def unreadable_error() -> RequestError:
    """For a message that gRPC could not have read; its asyncio half gives None in its place."""
    return protocol_error("a message that cannot be read")


def model_info(response: encoder_pb2.GetModelInfoResponse) -> ModelInfo:
    values = {entry.name: getattr(response, entry.name) for entry in fields(ModelInfo)}
    processor = {entry.name: getattr(response.processor, entry.name) for entry in fields(ProcessorInfo)}
    values |= {
        "dtype": DTYPE_NAMES.get(response.dtype, "unknown"),
        "processor": ProcessorInfo(
            **processor | {"image_mean": tuple(processor["image_mean"]), "image_std": tuple(processor["image_std"])}
        ),
        "limits": same_fields(LimitsInfo, response.limits),
        "attention": AttentionInfo(
            backend=response.attention.backend,
            implementation=response.attention.implementation,
            source=response.attention.source,
            reason=response.attention.reason,
            implementation_version=response.attention.implementation_version,
            rejected=tuple((passed.backend, passed.reason) for passed in response.attention.rejected),
        ),
        "transports": tuple(response.transports),
    }
    return ModelInfo(**values)


def call_error(error: grpc.RpcError, target: str) -> RequestError:
    """The typed error for a call that failed as a whole."""
    call = cast("grpc.Call", error)
    code = call.code().name
    details = call.details() or ""
    info, retry_after_s = _error_details(call)
    if info is not None:
        return request_error(info.reason, details, code=code, retry_after_s=retry_after_s)
    if any(said in details for said in _UNREADABLE_HERE):
        return unreadable_error()
    return _grpcs_own_error(code, details, target)


def _grpcs_own_error(code: str, details: str, target: str) -> RequestError:
    match code:
        case "UNAVAILABLE":
            broke = f"No encoder service answers at {target}, or the connection to it broke"
            return request_error(Reason.UNREACHABLE, f"{broke}: {details.rstrip('.')}." if details else f"{broke}.")
        case "DEADLINE_EXCEEDED":
            return request_error(Reason.DEADLINE_EXCEEDED, "The call took longer than its timeout.")
        case "CANCELLED":
            return _cancelled(details, target)
        case "RESOURCE_EXHAUSTED" if "larger than max" in details:
            # gRPC refuses such a message before the server's own code sees it, so there is no ErrorInfo.
            return request_error(Reason.REQUEST_TOO_LARGE, "The request is larger than the server takes. Split it.")
        case _:
            return request_error(Reason.INTERNAL, f"The call failed: {details}", code=code)


def _cancelled(details: str, target: str) -> RequestError:
    if any(said in details for said in _CANCELLED_HERE):
        return cancelled_error()
    # By gRPC's server, as it stops, of a call that comes in the same moment.
    return request_error(Reason.UNREACHABLE, f"The encoder service at {target} ended the call unanswered.")


def _error_details(call: grpc.Call) -> tuple[error_details_pb2.ErrorInfo | None, float | None]:
    try:
        return _details_of(rpc_status.from_call(call))
    except (ValueError, DecodeError):  # no message, or of another status: one that something on the way has changed
        return None, None


def _details_of(status: status_pb2.Status | None) -> tuple[error_details_pb2.ErrorInfo | None, float | None]:
    info, retry_after_s = None, None
    for detail in status.details if status else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            found = error_details_pb2.ErrorInfo()
            detail.Unpack(found)
            info = found if found.domain == ERROR_DOMAIN else info
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1e3
    return info, retry_after_s


def same_fields(cls: type[T], message: object) -> T:
    """A dataclass from a message whose fields have the same names."""
    return cls(**{entry.name: getattr(message, entry.name) for entry in fields(cast("Any", cls))})
