"""Two of our processes that ask each other, both on the test's loop."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import socket
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from encoder_svc.errors import OverloadedError, Reason, RequestError, request_error
from encoder_svc.server.frontends.link import Link

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Other:
    """What is asked."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.cancelled = asyncio.Event()
        self.lost = asyncio.Event()
        self.link: Link | None = None
        self.handlers = {
            "echo": self.echo,
            "refuse": self.refuse,
            "crash": self.crash,
            "hang": self.hang,
            "ask_back": self.ask_back,
            "tell": self.told.append,
        }

    async def echo(self, value: Any, after_s: float = 0.0) -> Any:
        await asyncio.sleep(after_s)
        return value

    async def refuse(self) -> None:
        raise request_error(Reason.QUEUE_FULL, "Full.", retry_after_s=1.5)

    async def crash(self) -> None:
        raise ZeroDivisionError

    async def hang(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def ask_back(self, value: int) -> int:
        assert self.link is not None
        answer: int = await self.link.ask("double", value=value)
        return answer + 1


@pytest.fixture
async def other() -> Other:
    return Other()


@pytest.fixture
async def link(other: Other) -> AsyncIterator[Link]:
    async def double(value: int) -> int:
        return 2 * value

    ours, theirs = socket.socketpair()
    link = await Link.over(ours, {"double": double}, lambda: None)
    other.link = await Link.over(theirs, other.handlers, other.lost.set)
    yield link
    link.close()
    other.link.close()


@pytest.mark.parametrize("value", [1, "ä\n", [1, [2.5, None]], {"a": True}, math.inf, "x" * 1_000_000])
async def test_a_value_comes_back_as_it_went(link: Link, value: Any) -> None:
    assert await link.ask("echo", value=value) == value


async def test_answers_find_their_questions_in_any_order(link: Link) -> None:
    asked = (link.ask("echo", value=number, after_s=0.1 - number / 1000) for number in range(100))
    assert await asyncio.gather(*asked) == list(range(100))


async def test_an_error_is_raised_where_it_was_asked(link: Link) -> None:
    with pytest.raises(OverloadedError) as caught:
        await link.ask("refuse")
    assert (caught.value.reason, caught.value.message, caught.value.retry_after_s) == ("QUEUE_FULL", "Full.", 1.5)


@pytest.mark.parametrize("is_lost", [False, True])
async def test_an_error_keeps_nothing_of_who_asked(link: Link, other: Other, is_lost: bool) -> None:
    class Image:
        pass

    async def ask() -> weakref.ref[Image]:
        image = Image()
        reference = weakref.ref(image)
        with suppress(RequestError):
            await asking(image)
        return reference

    async def asking(_: Image) -> None:
        await link.ask("hang" if is_lost else "refuse")

    gc.disable()
    try:
        task = asyncio.create_task(ask())
        if is_lost:
            await link.ask("echo", value=0)
            assert other.link is not None
            other.link.close()
        reference = await task
        await asyncio.sleep(0)
        assert reference() is None
    finally:
        gc.enable()


async def test_a_crash_is_logged_there_and_internal_here(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(RequestError) as caught:
        await link.ask("crash")
    assert caught.value.reason == "INTERNAL"
    assert "ZeroDivisionError" in caplog.text


async def test_who_is_asked_may_ask_back(link: Link) -> None:
    assert await link.ask("ask_back", value=4) == 9


async def test_what_is_told_comes_in_order(link: Link, other: Other) -> None:
    other.handlers["tell"] = lambda value: other.told.append(value)
    for number in range(50):
        link.tell("tell", value=number)
    await link.ask("echo", value=0)
    assert other.told == list(range(50))


async def test_cancelling_a_question_cancels_the_work(link: Link, other: Other) -> None:
    asking = asyncio.create_task(link.ask("hang"))
    await link.ask("echo", value=0)
    asking.cancel()
    await asyncio.wait_for(other.cancelled.wait(), 5)
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert await link.ask("echo", value=1) == 1


async def test_the_end_of_one_side_ends_what_the_other_waits_for(link: Link, other: Other) -> None:
    asking = asyncio.create_task(link.ask("hang"))
    await link.ask("echo", value=0)
    assert other.link is not None
    other.link.close()
    with pytest.raises(RequestError) as caught:
        await asking
    assert caught.value.reason == "CANCELLED"
    await asyncio.wait_for(other.cancelled.wait(), 5)
    with pytest.raises(RequestError):
        await link.ask("echo", value=1)


async def test_the_end_is_told_once(link: Link, other: Other) -> None:
    link.close()
    await asyncio.wait_for(other.lost.wait(), 5)


async def test_nothing_is_kept_of_what_was_cancelled_before_it_began(link: Link, other: Other) -> None:
    asking = [asyncio.create_task(link.ask("hang")) for _ in range(100)]
    await asyncio.sleep(0)
    for task in asking:
        task.cancel()  # in the same breath: the other side reads both at once
    await asyncio.gather(*asking, return_exceptions=True)
    await link.ask("echo", value=0)
    assert other.link is not None
    assert not other.link._answering
