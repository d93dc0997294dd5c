"""Single flight over random schedules of arrivals, cancellations, waits and ends of every kind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from encoder_svc.cache.single_flight import SingleFlight

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "arrive", "arrive", "cancel", "wait", "leave", "succeed", "fail", "cancel within"]),
        st.integers(0, 7),
        st.integers(0, 3),
    ),
    max_size=40,
)


class Execution:
    """One execution that the schedule ends, and that may take its time to be cancelled."""

    def __init__(self, key: str, ticks_to_cancel: int) -> None:
        self.key = key
        self.ticks_to_cancel = ticks_to_cancel
        self.end: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.outcome = ""
        self.error = OSError(key)

    async def work(self) -> Execution:
        try:
            await self.end
        except asyncio.CancelledError:
            self.outcome = "cancelled"
            for _ in range(self.ticks_to_cancel):
                await asyncio.sleep(0)
            raise
        except OSError:
            self.outcome = "failed"
            raise
        self.outcome = "succeeded"
        return self


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def play(steps: list[tuple[str, int, int]]) -> None:
    """Plays one schedule, then ends all that runs. Each step is followed by 0 to 3 turns of the loop."""
    flights: SingleFlight[Execution] = SingleFlight()
    executions: list[Execution] = []
    callers: list[tuple[str, asyncio.Task[Execution]]] = []
    watchers: list[asyncio.Task[None]] = []
    cancelled: set[asyncio.Task[Execution]] = set()

    def start_of(key: str, ticks: int) -> Callable[[], Awaitable[Execution]]:
        def start() -> Awaitable[Execution]:
            running = [other for other in executions if other.key == key and not other.outcome and not other.end.done()]
            assert not running, "two executions of one key, neither of them at its end"
            executions.append(Execution(key, ticks))
            return executions[-1].work()

        return start

    def end(execution: Execution, how: str) -> None:
        if execution.end.done():
            return
        if how == "succeed":
            execution.end.set_result(None)
        elif how == "fail":
            execution.end.set_exception(execution.error)
        else:
            execution.end.cancel()

    for what, number, ticks in steps:
        if what == "arrive":
            key = "ab"[number % 2]
            callers.append((key, asyncio.create_task(flights.run(key, start_of(key, ticks)))))
        elif what == "wait":
            watchers.append(asyncio.create_task(flights.wait("ab"[number % 2])))
        elif what == "cancel" and callers:
            task = callers[number % len(callers)][1]
            if task.cancel():
                cancelled.add(task)
        elif what == "leave" and watchers:
            watchers[number % len(watchers)].cancel()
        elif what in {"succeed", "fail", "cancel within"} and executions:
            end(executions[number % len(executions)], what)
        for _ in range(ticks):
            await asyncio.sleep(0)
        assert len(flights) <= 2

    while any(not task.done() for _, task in callers) or any(not watcher.done() for watcher in watchers):
        await settle()
        for execution in executions:
            end(execution, "succeed")

    for key, task in callers:
        if task.cancelled():
            within = any(x.key == key and x.outcome == "cancelled" for x in executions)
            assert task in cancelled or within, "a caller was cancelled that nobody cancelled"
        elif (error := task.exception()) is not None:
            assert any(error is x.error and x.key == key and x.outcome == "failed" for x in executions)
        else:
            assert (task.result().key, task.result().outcome) == (key, "succeeded")
    await settle()
    assert all(execution.outcome or execution.end.done() for execution in executions), "an execution was never ended"
    assert len(flights) == 0
    assert flights._tasks == set()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@settings(max_examples=500, deadline=None)
@given(STEPS)
def test_random_schedules(steps: list[tuple[str, int, int]]) -> None:
    complaints: list[dict[str, object]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(30):
            await play(steps)

    asyncio.run(main())
    assert complaints == []
