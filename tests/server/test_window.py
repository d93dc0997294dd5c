from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

from encoder_svc.server.window import Window


async def started(window: Window, amount: int, log: list[int]) -> tuple[asyncio.Task[None], asyncio.Event]:
    """A task that enters, notes ``amount``, and leaves once the event is set."""
    leave = asyncio.Event()

    async def stay() -> None:
        async with window.room(amount):
            log.append(amount)
            await leave.wait()

    task = asyncio.create_task(stay())
    await asyncio.sleep(0)
    return task, leave


async def test_what_does_not_fit_waits_and_what_came_later_waits_behind_it() -> None:
    window, log = Window(10), []
    first, leave = await started(window, 6, log)
    second, leave_second = await started(window, 5, log)
    third, leave_third = await started(window, 1, log)
    assert log == [6]
    leave.set()
    await first
    await asyncio.sleep(0)
    assert (log, window.held) == ([6, 5, 1], 6)
    leave_second.set()
    leave_third.set()
    await asyncio.gather(second, third)
    assert window.held == 0


async def test_what_takes_nothing_does_not_wait_behind_what_does_not_fit() -> None:
    window, log = Window(10), []
    async with window.room(10):
        waiting, leave = await started(window, 5, log)
        passing, leave_passing = await started(window, 0, log)
        assert log == [0]
    leave.set()
    leave_passing.set()
    await asyncio.gather(waiting, passing)
    assert (log, window.held) == ([0, 5], 0)


async def test_what_is_larger_than_the_window_goes_alone() -> None:
    window, log = Window(10), []
    async with AsyncExitStack() as inside:
        await inside.enter_async_context(window.room(1))
        task, leave = await started(window, 25, log)
        assert log == []
    await asyncio.sleep(0)
    assert (log, window.held) == ([25], 25)
    leave.set()
    await task


async def test_what_is_needed_no_more_lets_others_in() -> None:
    window, log = Window(10), []
    async with window.room(10) as room:
        task, leave = await started(window, 6, log)
        room.shrink(5)
        await asyncio.sleep(0)
        assert (log, window.held) == ([], 5)
        room.shrink(4)
        await asyncio.sleep(0)
        assert (log, window.held) == ([6], 10)
    assert window.held == 6
    leave.set()
    await task


async def test_callers_that_leave_at_any_time_leave_nothing_behind() -> None:
    chance = random.Random(0)
    window, most = Window(20), 0

    async def one() -> None:
        nonlocal most
        async with window.room(chance.randint(1, 12)):
            most = max(most, window.held)
            await asyncio.sleep(chance.uniform(0, 0.002))

    tasks = [asyncio.create_task(one()) for _ in range(300)]
    while not all(task.done() for task in tasks):
        chance.choice(tasks).cancel()
        await asyncio.sleep(0.0005)
    assert any(task.cancelled() for task in tasks)
    assert not all(task.cancelled() for task in tasks)
    assert 12 < most <= 20
    assert window.held == 0


async def test_room_that_a_thread_keeps_is_given_back_when_it_ends() -> None:
    window, log, ends = Window(10), [], threading.Event()
    with ThreadPoolExecutor(1) as threads:
        async with window.room(8) as room:
            room.keep_for(threads.submit(ends.wait))
        waiting, leave = await started(window, 5, log)
        assert (log, window.held) == ([], 8)
        ends.set()
        while not log:
            await asyncio.sleep(0.01)
        assert window.held == 5
    leave.set()
    await waiting
    assert window.held == 0
