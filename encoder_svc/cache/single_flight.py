"""One execution for any number of concurrent callers that want the same thing."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from encoder_svc.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Flight(Generic[T]):
    """One execution. Its callers' futures stand in the order of arrival; so do its watchers'."""

    task: asyncio.Task[T] | None = None
    callers: dict[asyncio.Future[T], None] = field(default_factory=dict)
    watchers: dict[asyncio.Future[None], None] = field(default_factory=dict)


class SingleFlight(Generic[T]):
    """Shares running work by key. Remembers nothing once it has ended: that is the cache's part.

    Belongs to one event loop; not thread-safe. The work runs in a task of its own, with the first caller's context
    variables, so no single caller's end is the work's end.
    """

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}
        self._tasks: set[asyncio.Task[T]] = set()  # the loop itself holds tasks but weakly, also those being cancelled

    def __len__(self) -> int:
        """Keys in flight."""
        return len(self._flights)

    def in_flight(self, key: str) -> bool:
        """Whether a call of :meth:`run` with this key would join one that runs."""
        return key in self._flights

    async def run(self, key: str, start: Callable[[], Awaitable[T]]) -> T:
        """Joins the work under ``key``, or starts it.

        Callers wake in the order in which they came. A caller that is cancelled leaves the others as they are; when the
        last one is, the work is cancelled, not waited for, and whoever comes next starts anew.

        Args:
            start: begins the work; called only if none runs, and at most once.

        Raises:
            Exception: what ``start`` or its work raised, the same object for every caller. CancelledError if the work
                was cancelled from within.
        """
        flight = self._flights.get(key)
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if flight is None:
            flight = self._flights[key] = _Flight(callers={future: None})
            self._launch(key, flight, start)
        else:
            flight.callers[future] = None
        try:
            return await future
        finally:
            self._leave(key, flight, future)
            # An exception's traceback holds this frame; were it to hold the exception in turn, images would stay in
            # memory until the cycle collector came by.
            del flight, future

    async def wait(self, key: str) -> None:
        """Returns once the work now in flight under ``key`` has ended, in whatever way; at once if there is none.

        Wakes after all callers of :meth:`run`, so what they do with the result before they next suspend has been done.
        Waiting does not keep the work alive.
        """
        flight = self._flights.get(key)
        if flight is None:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        flight.watchers[future] = None
        try:
            await future
        finally:
            flight.watchers.pop(future, None)

    def _launch(self, key: str, flight: _Flight[T], start: Callable[[], Awaitable[T]]) -> None:
        task = flight.task = asyncio.get_running_loop().create_task(_call(start))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._land(key, flight, done))

    def _leave(self, key: str, flight: _Flight[T], future: asyncio.Future[T]) -> None:
        """Takes one caller off a flight that has not landed. The last one out ends it."""
        if future not in flight.callers:
            return
        del flight.callers[future]
        if not flight.callers:
            self._close(key, flight)
            assert flight.task is not None
            flight.task.cancel()

    def _land(self, key: str, flight: _Flight[T], task: asyncio.Task[T]) -> None:
        self._tasks.discard(task)
        # Asked for even if nobody is left to hear it, so that asyncio does not complain.
        error = None if task.cancelled() else task.exception()
        if not flight.callers:
            if error is not None and not isinstance(error, RequestError):  # which whoever left would have been told
                logger.warning("work failed after its last caller had left", exc_info=error)
            return
        callers, flight.callers = flight.callers, {}
        for future in callers:
            if not future.done():
                _settle(future, task, error)
        self._close(key, flight)

    def _close(self, key: str, flight: _Flight[T]) -> None:
        """Lets the next caller start anew, and wakes the watchers."""
        del self._flights[key]
        for future in flight.watchers:
            if not future.done():
                future.set_result(None)


async def _call(start: Callable[[], Awaitable[T]]) -> T:
    return await start()


def _settle(future: asyncio.Future[T], task: asyncio.Task[T], error: BaseException | None) -> None:
    if task.cancelled():
        future.cancel()
    elif error is not None:
        future.set_exception(error)
    else:
        future.set_result(task.result())
