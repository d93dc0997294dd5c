"""What every call has in common: it is recorded, its errors become a status, and a drain waits for it."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

from encoder_svc.errors import CODES, Reason, RequestError, request_error, without_frames
from encoder_svc.server.answer import CallerLeftError
from encoder_svc.server.status import abort

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import grpc.aio

    from encoder_svc.observability.request import Observer, RequestRecord

    Context = grpc.aio.ServicerContext[Any, Any]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_OF_KEYS: Final = {"FetchEmbeddings", "ReleaseEmbeddings"}

# A caller's deadline began before it reached us, and its cancellation comes before ours ends.
_CALLERS_LEAD_S: Final = 0.05
# For calls that were ended to be told so. gRPC sends a status after what was written before it, whoever sends it: who
# does not read is not waited for longer, and is told UNAVAILABLE by gRPC itself when the server stops.
_ABORT_S: Final = 1.0


class Calls:
    """The calls that run. Belongs to the event loop."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._running: set[asyncio.Task[Any]] = set()
        self._cut_short_by: RequestError | None = None

    async def answered(
        self, method: str, request_id: str, context: Context, work: Callable[[RequestRecord], Awaitable[T]]
    ) -> T:
        """Runs a call, turns what it raises into a status, and has it recorded.

        Raises:
            CallerLeftError: nobody is there to be told a status.
        """
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            # Recorded before the status is sent, which waits for a caller that does not read.
            with self._observer.request(method, request_id, context.invocation_metadata() or ()) as record:
                context.set_trailing_metadata(record.metadata())
                try:
                    return await work(record)
                except RequestError as error:
                    failure = without_frames(error)
                except asyncio.CancelledError:
                    if self._cut_short_by is None:
                        reason = Reason.DEADLINE_EXCEEDED if _is_out_of_time(context) else Reason.CANCELLED
                        record.failed(CODES[reason], reason)
                        raise
                    failure = self._cut_short_by
                except CallerLeftError:
                    record.failed(CODES[Reason.CANCELLED], Reason.CANCELLED)
                    raise
                except Exception:
                    logger.exception("a call failed")
                    failure = request_error(Reason.INTERNAL, "The server failed on this request.")
                record.failed(failure.code, failure.reason)
            await abort(context, failure, asked_for="keys" if method in _OF_KEYS else "images")
        finally:
            self._running.discard(task)

    async def drain(self, seconds: float, hurry: asyncio.Event, refusal: RequestError) -> int:
        """Waits for the calls that run, and ends those that are left after ``seconds``, or once ``hurry`` is set, with
        ``refusal``; returns how many."""
        hurrying = asyncio.create_task(hurry.wait())
        ended_by_s = time.monotonic() + seconds
        while self._running and not hurrying.done() and (left_s := ended_by_s - time.monotonic()) > 0:
            await asyncio.wait([*self._running, hurrying], timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        left = list(self._running)
        self._cut_short_by = refusal
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=_ABORT_S)
        return len(left)


def _is_out_of_time(context: Context) -> bool:
    seconds = context.time_remaining()
    return seconds is not None and seconds <= _CALLERS_LEAD_S
