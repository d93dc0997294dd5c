"""One tree of errors, and its one mapping to gRPC codes.

::

    EncoderSvcError
    ├── StartupError                    the process cannot serve: exit code 2
    │   ├── ConfigError                 a flag, environment variable or config key is wrong
    │   ├── CheckpointError             the checkpoint is not one we can serve
    │   └── AttentionBackendError       the attention backend asked for cannot run here
    ├── AttentionKernelError            an attention kernel did not load, or failed, or was wrong
    └── RequestError                    one request or one image failed: has .reason, .code, .message
        ├── InvalidInputError           INVALID_ARGUMENT    change the input
        ├── NotFoundError               NOT_FOUND           encode it again
        ├── OverloadedError             RESOURCE_EXHAUSTED  send less, or again later
        ├── DeadlineError               DEADLINE_EXCEEDED   allow more time
        ├── CancelledError              CANCELLED           the caller went away
        ├── UnavailableError            UNAVAILABLE         again, or on another replica
        └── InternalError               INTERNAL, DATA_LOSS and all else: a defect

A reason is stable: programs may match on it. The message is for a person and may change.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, TypeVar

ERROR_DOMAIN: Final = "encoder-svc"

ErrorT = TypeVar("ErrorT", bound=BaseException)


class EncoderSvcError(Exception):
    """Every error of this package."""


class StartupError(EncoderSvcError):
    """The process cannot serve. The command prints the text and exits with code 2."""


class ConfigError(StartupError):
    """A flag, an environment variable or a key of the config file is wrong."""


class CheckpointError(StartupError):
    """The checkpoint is missing, incomplete, or of a kind that is not served."""


class BrokenDeviceError(StartupError):
    """The device hangs, or answers nothing but errors, before anything was served. The process exits with code 3: a
    thread of it may hang too."""


class AttentionBackendError(StartupError):
    """The attention backend that the operator asked for cannot run here."""


class AttentionKernelError(EncoderSvcError):
    """An attention kernel did not load, failed, or computed something wrong.

    Attributes:
        backend, implementation: which kernel, such as ``"FLASH_ATTN"`` and ``"fa4"``.
        why: what happened, for the operator; the error's own text names the kernel and is fit for a client.
    """

    def __init__(self, backend: str, implementation: str, why: str) -> None:
        super().__init__(backend, implementation, why)  # what a copy is made from, here or in another process
        self.backend = backend
        self.implementation = implementation
        self.why = why

    def __str__(self) -> str:
        return f"The attention kernel {self.backend} ({self.implementation}) failed."


class Reason(StrEnum):
    """Every reason that a request or an image can fail for."""

    # The whole request.
    REQUEST_MALFORMED = "REQUEST_MALFORMED"
    REQUEST_EMPTY = "REQUEST_EMPTY"
    REQUEST_TOO_MANY_IMAGES = "REQUEST_TOO_MANY_IMAGES"
    REQUEST_TOO_MANY_PATCHES = "REQUEST_TOO_MANY_PATCHES"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    REQUEST_ID_TOO_LONG = "REQUEST_ID_TOO_LONG"
    # One image.
    IMAGE_MISSING = "IMAGE_MISSING"
    IMAGE_TOO_LARGE = "IMAGE_TOO_LARGE"
    IMAGE_FORMAT = "IMAGE_FORMAT"
    IMAGE_CORRUPT = "IMAGE_CORRUPT"
    IMAGE_SIDE = "IMAGE_SIDE"
    IMAGE_PIXELS = "IMAGE_PIXELS"
    IMAGE_ASPECT_RATIO = "IMAGE_ASPECT_RATIO"
    RAW_SIZE = "RAW_SIZE"
    GRID_INVALID = "GRID_INVALID"
    GRID_MISMATCH = "GRID_MISMATCH"
    DTYPE_UNSUPPORTED = "DTYPE_UNSUPPORTED"
    PIXEL_VALUES_NOT_FINITE = "PIXEL_VALUES_NOT_FINITE"
    # One key of a fetch.
    KEY_UNKNOWN = "KEY_UNKNOWN"
    KEY_EXPIRED = "KEY_EXPIRED"
    # The service.
    LEASE_BYTES_EXHAUSTED = "LEASE_BYTES_EXHAUSTED"
    QUEUE_FULL = "QUEUE_FULL"
    INFLIGHT_IMAGES = "INFLIGHT_IMAGES"
    INFLIGHT_BYTES = "INFLIGHT_BYTES"
    STREAM_STALLED = "STREAM_STALLED"
    LEASE_INVALID = "LEASE_INVALID"
    OUTPUT_NOT_FINITE = "OUTPUT_NOT_FINITE"
    DEVICE_OUT_OF_MEMORY = "DEVICE_OUT_OF_MEMORY"
    DEVICE_BROKEN = "DEVICE_BROKEN"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    STARTING = "STARTING"
    DRAINING = "DRAINING"
    UNREACHABLE = "UNREACHABLE"
    ENCODER_FAILED = "ENCODER_FAILED"
    INTERNAL = "INTERNAL"
    # Found by the client.
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    PROTOCOL_ERROR = "PROTOCOL_ERROR"


_CODE_OF_SERVICE_REASON: Final = {
    Reason.KEY_UNKNOWN: "NOT_FOUND",
    Reason.KEY_EXPIRED: "NOT_FOUND",
    Reason.LEASE_BYTES_EXHAUSTED: "RESOURCE_EXHAUSTED",
    Reason.QUEUE_FULL: "RESOURCE_EXHAUSTED",
    Reason.INFLIGHT_IMAGES: "RESOURCE_EXHAUSTED",
    Reason.INFLIGHT_BYTES: "RESOURCE_EXHAUSTED",
    Reason.STREAM_STALLED: "RESOURCE_EXHAUSTED",
    Reason.OUTPUT_NOT_FINITE: "INTERNAL",
    Reason.DEVICE_OUT_OF_MEMORY: "RESOURCE_EXHAUSTED",
    Reason.DEVICE_BROKEN: "UNAVAILABLE",
    Reason.REQUEST_TOO_LARGE: "RESOURCE_EXHAUSTED",
    Reason.DEADLINE_EXCEEDED: "DEADLINE_EXCEEDED",
    Reason.CANCELLED: "CANCELLED",
    Reason.STARTING: "UNAVAILABLE",
    Reason.DRAINING: "UNAVAILABLE",
    Reason.UNREACHABLE: "UNAVAILABLE",
    Reason.ENCODER_FAILED: "INTERNAL",
    Reason.INTERNAL: "INTERNAL",
    Reason.CHECKSUM_MISMATCH: "DATA_LOSS",
    Reason.PROTOCOL_ERROR: "INTERNAL",
}

CODES: Final[dict[str, str]] = {reason: _CODE_OF_SERVICE_REASON.get(reason, "INVALID_ARGUMENT") for reason in Reason}
"""The gRPC status name of each reason."""

CODE_NUMBERS: Final[dict[str, int]] = {
    "CANCELLED": 1,
    "UNKNOWN": 2,
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "OUT_OF_RANGE": 11,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "DATA_LOSS": 15,
    "UNAUTHENTICATED": 16,
}
"""google.rpc.Code by name, so that no part of the package needs grpc to name a status."""


class RequestError(EncoderSvcError):
    """One request, or one image of it, failed.

    Attributes:
        reason: stable, upper case; a :class:`Reason`, or another server's if it is newer.
        code: name of the gRPC status, such as ``"INVALID_ARGUMENT"``.
        message: for a person.
        image_index: position in the request of the image that failed, or None if the whole request did.
        retry_after_s: how long to wait before another try, in seconds, where the server says.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        code: str | None = None,
        image_index: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason, message)  # what a copy is made from, here or in another process
        self.reason = reason
        self.code = code or CODES.get(reason, "INTERNAL")
        self.message = message
        self.image_index = image_index
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        where = "" if self.image_index is None else f"image {self.image_index}: "
        return f"{where}{self.message} [{self.reason}]"


class InvalidInputError(RequestError):
    """INVALID_ARGUMENT: the input itself is at fault; sending it again cannot help."""


class NotFoundError(RequestError):
    """NOT_FOUND: no embeddings are kept under this key; encode the image again."""


class OverloadedError(RequestError):
    """RESOURCE_EXHAUSTED: over a limit or a budget."""


class DeadlineError(RequestError):
    """DEADLINE_EXCEEDED: the caller's time ran out."""


class CancelledError(RequestError):
    """CANCELLED: the caller went away."""


class UnavailableError(RequestError):
    """UNAVAILABLE: starting, draining or unreachable; another try may succeed."""


class InternalError(RequestError):
    """INTERNAL, DATA_LOSS or an unforeseen status: a defect, here or on the way."""


_CLASSES: Final[dict[str, type[RequestError]]] = {
    "INVALID_ARGUMENT": InvalidInputError,
    "NOT_FOUND": NotFoundError,
    "RESOURCE_EXHAUSTED": OverloadedError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "CANCELLED": CancelledError,
    "UNAVAILABLE": UnavailableError,
}


def request_error(
    reason: str,
    message: str,
    *,
    code: str | None = None,
    image_index: int | None = None,
    retry_after_s: float | None = None,
) -> RequestError:
    """The :class:`RequestError` subclass that fits ``code`` (by default the reason's own code)."""
    code = code or CODES.get(reason, "INTERNAL")
    cls = _CLASSES.get(code, InternalError)
    return cls(reason, message, code=code, image_index=image_index, retry_after_s=retry_after_s)


def without_frames(error: ErrorT) -> ErrorT:
    """The same error, without its traceback and those of what led to it.

    A traceback keeps all that was in hand where the error passed: images, embeddings, a device's memory. That is for as
    long as the error is kept, and, where the error itself was in hand too, until the collector of cycles comes by.
    """
    error.__context__ = None
    if error.__cause__ is not None:
        without_frames(error.__cause__)
    return error.with_traceback(None)
