"""What the sync and the async client share of a call: names, timeouts, model info, errors. No channel, no loop."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

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
    from collections.abc import Sequence

    import grpc

ROUND_ROBIN = ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}')
"""A channel argument: balance calls among the addresses of the target, such as those of a headless Service."""

_OWN_CONNECTIONS = ("grpc.use_local_subchannel_pool", 1)

CODE_NAMES = {number: name for name, number in CODE_NUMBERS.items()}
DTYPE_NUMBERS = {
    "float32": encoder_pb2.DTYPE_FLOAT32,
    "float16": encoder_pb2.DTYPE_FLOAT16,
    "bfloat16": encoder_pb2.DTYPE_BFLOAT16,
}
DTYPE_NAMES = {number: name for name, number in DTYPE_NUMBERS.items()}

_LONGEST_TIMEOUT_S = 1e9  # some way beyond gRPC's clock runs over, and calls end at once
_NO_TIME_S = -1.0  # gRPC rounds a deadline up, so that with 0 a fast answer would still come

T = TypeVar("T")


def checked_timeout(timeout_s: float | None) -> float | None:
    """
    Raises:
        ValueError: it is negative or not a number.
    """
    if timeout_s is not None and not timeout_s >= 0:
        raise ValueError(f"timeout_s must be 0 or more seconds, or None, not {timeout_s}.")
    return timeout_s


def call_timeout(own_s: float | None, clients_s: float | None) -> float | None:
    """What gRPC is told: the call's own timeout, else the client's. None and infinity wait without end.

    Raises:
        ValueError: the call's own is negative or not a number.
    """
    timeout_s = clients_s if own_s is None else checked_timeout(own_s)
    if timeout_s is None or timeout_s > _LONGEST_TIMEOUT_S:
        return None
    return timeout_s or _NO_TIME_S


def checked_keys(keys: Sequence[str]) -> Sequence[str]:
    """
    Raises:
        TypeError: it is one key (which would be taken for a list of characters).
    """
    if isinstance(keys, (str, bytes)):
        raise TypeError("keys must be a list of keys; put a single one in a list.")
    return keys


def checked_request_id(request_id: str) -> str:
    """
    Raises:
        TypeError: it is not a text.
        ValueError: it holds a lone surrogate.
    """
    if not isinstance(request_id, str):
        raise TypeError(f"request_id must be a text, not {type(request_id).__name__}.")
    try:
        request_id.encode()
    except UnicodeEncodeError:
        raise ValueError(f"request_id {request_id!r} holds a lone surrogate, which UTF-8 cannot carry.") from None
    return request_id


def closed_error() -> RequestError:
    return request_error(Reason.UNREACHABLE, "This client is closed.")


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
    match code:
        case "UNAVAILABLE":
            broke = f"No encoder service answers at {target}, or the connection to it broke"
            return request_error(Reason.UNREACHABLE, f"{broke}: {details.rstrip('.')}." if details else f"{broke}.")
        case "DEADLINE_EXCEEDED":
            return request_error(Reason.DEADLINE_EXCEEDED, "The call took longer than its timeout.")
        case "CANCELLED":
            return request_error(Reason.CANCELLED, "The call was cancelled.")
        case "RESOURCE_EXHAUSTED" if "larger than max" in details:
            # gRPC refuses such a message before the server's own code sees it, so there is no ErrorInfo.
            return request_error(Reason.REQUEST_TOO_LARGE, "The request is larger than the server takes. Split it.")
        case _:
            return request_error(Reason.INTERNAL, f"The call failed: {details}", code=code)


def _error_details(call: grpc.Call) -> tuple[error_details_pb2.ErrorInfo | None, float | None]:
    status = rpc_status.from_call(call)
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


def connection_options(options: Sequence[tuple[str, Any]], connections: int) -> Sequence[tuple[str, Any]]:
    """The arguments of one of so many channels. gRPC gives channels to one address one connection between them, unless
    each has its own.

    Raises:
        ValueError: not a number of connections.
    """
    if connections < 1:
        raise ValueError(f"a client needs 1 connection or more, not {connections}")
    return options if connections == 1 else [*options, _OWN_CONNECTIONS]
