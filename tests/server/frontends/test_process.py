"""A front end's own process, without a port."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from encoder_svc.errors import RequestError
from encoder_svc.server.frontends.process import _FrontEnd

if TYPE_CHECKING:
    import pytest


async def test_one_whose_device_s_process_died_ends_before_anybody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    told_at_its_end: list[list[str]] = []
    monkeypatch.setattr("os._exit", lambda _: told_at_its_end.append(list(told)))
    ours, theirs = socket.socketpair()
    front_end = _FrontEnd(-1, -1, -1)
    running = asyncio.create_task(front_end.run(theirs))
    while (link := front_end._link) is None:
        await asyncio.sleep(0)

    async def ask() -> None:
        try:
            await link.ask("encode")
        except RequestError as error:
            told.append(error.reason)

    asking = asyncio.create_task(ask())
    await asyncio.sleep(0.01)
    ours.close()
    await asyncio.gather(running, asking)
    assert told_at_its_end == [[]]
