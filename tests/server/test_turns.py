"""Embeddings that are written one after the other, and who is not waited for."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from encoder_svc.server.turns import Turns


class Writer:
    """Writes one image of three chunks, each of which waits to be let through."""

    def __init__(self, turns: Turns, name: str, log: list[str]) -> None:
        self.gate = asyncio.Semaphore(0)
        self._turns, self._name, self._log = turns, name, log

    async def run(self) -> None:
        async with self._turns.turn() as turn:
            for number in range(3):
                await turn.write(partial(self._chunk, number))

    async def _chunk(self, number: int) -> None:
        self._log.append(f"{self._name}{number}")
        await self.gate.acquire()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def log() -> list[str]:
    return []


async def test_images_are_written_in_the_order_in_which_they_came(log: list[str]) -> None:
    turns = Turns(at_a_time=1, patience_s=60)
    writers = [Writer(turns, name, log) for name in "abc"]
    async with asyncio.TaskGroup() as running:
        for writer in writers:
            writer.gate = asyncio.Semaphore(3)  # everything goes through at once
            running.create_task(writer.run())
    assert log == ["a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2"]


async def test_as_many_as_may_are_written_side_by_side(log: list[str]) -> None:
    turns = Turns(at_a_time=2, patience_s=60)
    writers = [Writer(turns, name, log) for name in "abc"]
    tasks = [asyncio.create_task(writer.run()) for writer in writers]
    await settle()
    assert log == ["a0", "b0"]
    for _ in range(3):
        writers[1].gate.release()
    await settle()
    assert log == ["a0", "b0", "b1", "b2", "c0"]
    for writer in writers:
        writer.gate = asyncio.Semaphore(3)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_caller_who_does_not_read_holds_nobody_up(log: list[str]) -> None:
    turns = Turns(at_a_time=1, patience_s=0.01)
    slow, quick = Writer(turns, "s", log), Writer(turns, "q", log)
    quick.gate = asyncio.Semaphore(3)
    first = asyncio.create_task(slow.run())
    await settle()
    await asyncio.wait_for(quick.run(), 10)
    assert log == ["s0", "q0", "q1", "q2"]
    for _ in range(3):
        slow.gate.release()
    await asyncio.wait_for(first, 10)
    assert log[-2:] == ["s1", "s2"]


async def test_who_was_waited_for_once_waits_for_nobody_again(log: list[str]) -> None:
    """With a turn for each of its chunks it would slow down for every other slow one too."""
    turns = Turns(at_a_time=1, patience_s=0.3)
    slow, other = Writer(turns, "s", log), Writer(turns, "o", log)
    tasks = [asyncio.create_task(writer.run()) for writer in (slow, other)]
    while log != ["s0", "o0"]:
        await asyncio.sleep(0.01)
    for _ in range(3):
        slow.gate.release()
    await asyncio.wait_for(tasks[0], 10)
    assert log == ["s0", "o0", "s1", "s2"]
    assert turns.free.locked()
    for _ in range(3):
        other.gate.release()
    await asyncio.wait_for(tasks[1], 10)


@pytest.mark.parametrize("patience_s", [0.001, 60])
async def test_who_leaves_takes_no_turn_along(log: list[str], patience_s: float) -> None:
    turns = Turns(at_a_time=1, patience_s=patience_s)
    writers = [Writer(turns, name, log) for name in "abcd"]
    tasks = [asyncio.create_task(writer.run()) for writer in writers]
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert turns.free._value == 1
