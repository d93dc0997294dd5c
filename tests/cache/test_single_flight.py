"""Callers that share one execution, by example; test_single_flight_schedules.py plays random schedules."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from encoder_svc.cache.single_flight import SingleFlight

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Work:
    """Executions that the test ends by hand."""

    def __init__(self) -> None:
        self.ends: list[asyncio.Future[str]] = []
        self.cancelled: list[int] = []

    @property
    def starts(self) -> int:
        return len(self.ends)

    async def __call__(self) -> str:
        number = len(self.ends)
        self.ends.append(asyncio.get_running_loop().create_future())
        try:
            return await self.ends[number]
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture(scope="module", autouse=True)
def what_was_there_before():
    """Is not searched for garbage, which torch alone would make take half a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
async def nothing_is_left(what_was_there_before):
    """No task outlives its test, and asyncio has nothing to complain about."""
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    yield
    await settle()
    gc.collect()
    assert complaints == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


def callers(flights: SingleFlight[str], work: Callable[[], Awaitable[str]], count: int) -> list[asyncio.Task[str]]:
    return [asyncio.create_task(flights.run("key", work)) for _ in range(count)]


async def test_a_hundred_callers_share_one_execution() -> None:
    flights, work = SingleFlight[str](), Work()
    tasks = callers(flights, work, 100)
    await settle()
    assert (work.starts, len(flights), flights.in_flight("key"), flights.in_flight("other")) == (1, 1, True, False)
    work.ends[0].set_result("embeddings")
    results = await asyncio.gather(*tasks)
    assert all(result is results[0] for result in results)
    assert results[0] == "embeddings"
    assert (len(flights), flights.in_flight("key")) == (0, False)


async def test_other_keys_run_by_themselves() -> None:
    flights, work = SingleFlight[str](), Work()
    tasks = [asyncio.create_task(flights.run(key, work)) for key in "ab"]
    await settle()
    assert (work.starts, len(flights)) == (2, 2)
    for end, result in zip(work.ends, "AB", strict=True):
        end.set_result(result)
    assert await asyncio.gather(*tasks) == ["A", "B"]


async def test_a_failure_goes_to_all_and_is_not_remembered() -> None:
    flights, work = SingleFlight[str](), Work()
    tasks = callers(flights, work, 3)
    await settle()
    error = OSError("broken")
    work.ends[0].set_exception(error)
    assert await asyncio.gather(*tasks, return_exceptions=True) == [error] * 3
    assert len(flights) == 0
    again = callers(flights, work, 1)
    await settle()
    work.ends[1].set_result("mended")
    assert await again[0] == "mended"


async def test_a_start_that_raises_at_once_is_a_failure_like_any_other() -> None:
    def start() -> Awaitable[str]:
        raise OSError("at once")

    flights = SingleFlight[str]()
    results = await asyncio.gather(*callers(flights, start, 2), return_exceptions=True)
    assert [str(result) for result in results] == ["at once"] * 2
    assert len(flights) == 0


async def test_a_result_without_any_wait_is_a_result() -> None:
    async def start() -> str:
        return "at once"

    assert await SingleFlight[str]().run("key", start) == "at once"


@pytest.mark.parametrize("leaver", [0, 1, 2])
async def test_a_caller_that_leaves_leaves_the_others_running(leaver: int) -> None:
    flights, work = SingleFlight[str](), Work()
    tasks = callers(flights, work, 3)
    await settle()
    tasks[leaver].cancel()
    await settle()
    assert tasks[leaver].cancelled()
    assert work.cancelled == []
    work.ends[0].set_result("embeddings")
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [result for result in results if isinstance(result, str)] == ["embeddings"] * 2


async def test_the_last_to_leave_cancels_the_work() -> None:
    flights, work = SingleFlight[str](), Work()
    tasks = callers(flights, work, 3)
    await settle()
    for task in tasks:
        task.cancel()
    await settle()
    assert (work.cancelled, len(flights)) == ([0], 0)
    assert all(task.cancelled() for task in tasks)


async def test_callers_that_leave_before_the_work_has_begun() -> None:
    flights, work = SingleFlight[str](), Work()
    tasks = callers(flights, work, 2)
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await settle()
    assert (work.starts - len(work.cancelled), len(flights)) == (0, 0)


async def test_whoever_comes_while_work_is_being_cancelled_starts_anew() -> None:
    may_end = asyncio.Event()
    started: list[str] = []

    async def slow_to_cancel() -> str:
        started.append("first")
        try:
            await asyncio.Event().wait()
        finally:
            await may_end.wait()
        return "never"

    flights, work = SingleFlight[str](), Work()
    (first,) = callers(flights, slow_to_cancel, 1)
    await settle()
    first.cancel()
    await settle()
    assert first.cancelled()  # it does not wait for the work to end
    (second,) = callers(flights, work, 1)
    await settle()
    assert (started, work.starts, len(flights)) == (["first"], 1, 1)
    may_end.set()
    await settle()
    assert flights.in_flight("key")  # the end of the old flight does not take the new one with it
    work.ends[0].set_result("second")
    assert await second == "second"


async def test_whoever_comes_in_the_very_tick_of_the_last_cancellation_is_answered() -> None:
    flights, work = SingleFlight[str](), Work()
    (first,) = callers(flights, work, 1)
    await settle()
    first.cancel()
    (second,) = callers(flights, work, 1)
    await settle()
    work.ends[-1].set_result("embeddings")
    assert await second == "embeddings"


async def test_work_that_ignores_its_cancellation_answers_nobody() -> None:
    async def stubborn() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return "too late"

    flights = SingleFlight[str]()
    (task,) = callers(flights, stubborn, 1)
    await settle()
    task.cancel()
    await settle()
    assert (task.cancelled(), len(flights)) == (True, 0)


async def test_work_that_fails_while_it_is_cancelled_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fails_late() -> str:
        try:
            return await asyncio.Event().wait()
        finally:
            raise OSError("in the clean-up")

    (task,) = callers(SingleFlight[str](), fails_late, 1)
    await settle()
    with caplog.at_level(logging.WARNING):
        task.cancel()
        await settle()
    assert "in the clean-up" in caplog.text


async def test_work_that_is_cancelled_from_within_cancels_its_callers() -> None:
    flights, work = SingleFlight[str](), Work()
    tasks = callers(flights, work, 2)
    watcher = asyncio.create_task(flights.wait("key"))
    await settle()
    work.ends[0].cancel()
    await settle()
    assert [task.cancelled() for task in tasks] == [True, True]
    assert (watcher.done(), len(flights)) == (True, 0)


@pytest.mark.parametrize("outcome", ["result", "failure"])
async def test_a_cancellation_in_the_tick_of_the_end_leaves_no_complaint(outcome: str) -> None:
    for ticks in range(5):
        flights, work = SingleFlight[str](), Work()
        (task,) = callers(flights, work, 1)
        await settle()
        if outcome == "result":
            work.ends[0].set_result("embeddings")
        else:
            work.ends[0].set_exception(OSError("broken"))
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError, OSError):
            await task
        assert len(flights) == 0
        del task, work


@pytest.mark.parametrize("end", ["result", "failure", "cancellation"])
async def test_waiting_ends_however_the_work_ends(end: str) -> None:
    flights, work = SingleFlight[str](), Work()
    (caller,) = callers(flights, work, 1)
    await settle()
    watchers = [asyncio.create_task(flights.wait("key")) for _ in range(2)]
    await settle()
    assert not any(watcher.done() for watcher in watchers)
    if end == "result":
        work.ends[0].set_result("embeddings")
    elif end == "failure":
        work.ends[0].set_exception(OSError("broken"))
    else:
        caller.cancel()  # those that wait do not keep the work alive
    assert await asyncio.gather(*watchers) == [None, None]
    await asyncio.gather(caller, return_exceptions=True)
    assert len(flights) == 0


async def test_waiting_for_nothing_returns_at_once() -> None:
    await asyncio.wait_for(SingleFlight[str]().wait("key"), 1)


async def test_a_watcher_may_leave() -> None:
    flights, work = SingleFlight[str](), Work()
    (caller,) = callers(flights, work, 1)
    await settle()
    watcher = asyncio.create_task(flights.wait("key"))
    await settle()
    watcher.cancel()
    await settle()
    assert (watcher.cancelled(), caller.done()) == (True, False)
    assert not flights._flights["key"].watchers
    work.ends[0].set_result("embeddings")
    assert await caller == "embeddings"


async def test_a_watcher_may_leave_in_the_tick_of_the_end() -> None:
    flights, work = SingleFlight[str](), Work()
    (caller,) = callers(flights, work, 1)
    await settle()
    watcher = asyncio.create_task(flights.wait("key"))
    await settle()
    caller.cancel()
    watcher.cancel()
    await asyncio.gather(caller, watcher, return_exceptions=True)
    assert (caller.cancelled(), watcher.cancelled(), len(flights)) == (True, True, 0)


async def test_callers_wake_in_order_and_watchers_after_them_all() -> None:
    flights, work = SingleFlight[str](), Work()
    woken: list[str] = []

    async def run(name: str) -> None:
        await flights.run("key", work)
        woken.append(name)

    async def wait(name: str) -> None:
        await flights.wait("key")
        woken.append(name)

    tasks = [asyncio.create_task(run("first"))]
    await settle()
    for coroutine in (wait("fetch"), run("second"), wait("other fetch"), run("third")):
        tasks.append(asyncio.create_task(coroutine))
        await settle()
    work.ends[0].set_result("embeddings")
    await asyncio.gather(*tasks)
    assert woken == ["first", "second", "third", "fetch", "other fetch"]


async def test_a_callers_timeout_is_its_own() -> None:
    flights, work = SingleFlight[str](), Work()
    (patient,) = callers(flights, work, 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(flights.run("key", work), 0.01)
    work.ends[0].set_result("embeddings")
    assert (await patient, work.starts) == ("embeddings", 1)


@pytest.mark.parametrize("end", ["result", "failure", "cancellation"])
async def test_memory_is_freed_without_the_cycle_collector(end: str) -> None:
    class Image:
        pass

    async def encode(image: Image) -> str:
        await asyncio.sleep(0)
        if end == "failure":
            raise OSError("broken")
        if end == "cancellation":
            await asyncio.Event().wait()
        return "embeddings"

    async def request(image: Image) -> None:
        with suppress(OSError):
            await flights.run("key", lambda: encode(image))

    flights = SingleFlight[str]()
    image = Image()
    freed = weakref.ref(image)
    gc.collect()
    gc.disable()
    try:
        task = asyncio.create_task(request(image))
        await asyncio.sleep(0)
        del image
        await settle()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        del task
        await settle()
        assert freed() is None
    finally:
        gc.enable()
