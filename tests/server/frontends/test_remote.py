"""What a front end decodes for the device's process, and when it gives it back."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import socket
import weakref
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest

from encoder_svc.engine.load import Budgets, Load
from encoder_svc.errors import Reason, RequestError, request_error
from encoder_svc.images.types import GridThw, ProcessedImage
from encoder_svc.server.core import Decoded
from encoder_svc.server.frontends.door import DoorSign, DoorSignReader
from encoder_svc.server.frontends.link import Link
from encoder_svc.server.frontends.remote import Placed, RemoteCore
from encoder_svc.transport.arena import Arena, ArenaView, new_shared_file

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


class Image:
    """One that is decoded once somebody lets it be."""

    def __init__(self, placed: Placed) -> None:
        self.num_begun = 0
        self.is_held = False
        self.may_end = asyncio.Event()
        self.error: RequestError | None = None
        self._placed = placed

    @asynccontextmanager
    async def decode(self) -> AsyncIterator[Decoded]:
        self.num_begun += 1
        self.is_held = True
        try:
            await self.may_end.wait()
            if self.error is not None:
                raise self.error
            patches = np.zeros((4, 3, 2, 2), np.uint8)
            yield Decoded(self._placed.place(ProcessedImage(GridThw(1, 2, 2), patches)), 0.0, 0.0)
        finally:
            self.is_held = False


@pytest.fixture
def placed() -> Iterator[Placed]:
    file = new_shared_file("images")
    yield Placed(Arena(file, 2**16))
    os.close(file)


@pytest.fixture
def image(placed: Placed) -> Image:
    return Image(placed)


async def turns() -> None:
    """So many turns of the loop that everything that can happen has."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_will_be_asked_for_is_decoded_before_that_and_once(placed: Placed, image: Image) -> None:
    placed.offer(1, 0, image.decode, begin=True)
    await turns()
    assert image.num_begun == 1
    image.may_end.set()
    told = await placed.handlers()["decode"](1, 0)
    assert told["image"]["grid"] == (1, 2, 2)
    placed.withdraw(1, 0)
    await turns()
    assert image.num_begun == 1
    assert image.is_held
    placed.handlers()["decoded_done"](1, 0)
    await turns()
    assert not image.is_held


async def test_what_may_be_asked_for_waits_until_it_is(placed: Placed, image: Image) -> None:
    image.may_end.set()
    placed.offer(1, 0, image.decode, begin=False)
    await turns()
    assert image.num_begun == 0
    await placed.handlers()["decode"](1, 0)
    assert image.num_begun == 1


@pytest.mark.parametrize("is_decoded", [True, False])
async def test_what_nobody_asked_for_is_given_back(placed: Placed, image: Image, is_decoded: bool) -> None:
    placed.offer(1, 0, image.decode, begin=True)
    await turns()
    if is_decoded:
        image.may_end.set()
        await turns()
    assert image.is_held
    placed.withdraw(1, 0)
    await turns()
    assert not image.is_held
    with pytest.raises(RequestError, match="CANCELLED"):
        await placed.handlers()["decode"](1, 0)


async def test_what_another_encodes_gives_its_room_back_and_may_be_asked_for_later(
    placed: Placed, image: Image
) -> None:
    image.may_end.set()
    placed.offer(1, 0, image.decode, begin=True)
    await turns()
    assert image.is_held
    placed.handlers()["decode_later"](1, 0)
    await turns()
    assert not image.is_held
    await placed.handlers()["decode"](1, 0)
    assert image.num_begun == 2


@pytest.mark.parametrize("is_decoded", [True, False])
async def test_who_asked_and_leaves_holds_nothing(placed: Placed, image: Image, is_decoded: bool) -> None:
    placed.offer(1, 0, image.decode, begin=True)
    asking = asyncio.create_task(placed.handlers()["decode"](1, 0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    if is_decoded:
        image.may_end.set()
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait([asking])
    placed.handlers()["decoded_done"](1, 0)
    await turns()
    assert not image.is_held


async def test_an_image_s_own_fault_reaches_who_asks(placed: Placed, image: Image) -> None:
    image.error = request_error(Reason.IMAGE_CORRUPT, "Broken.")
    image.may_end.set()
    placed.offer(1, 0, image.decode, begin=True)
    await turns()
    with pytest.raises(RequestError, match="Broken"):
        await placed.handlers()["decode"](1, 0)
    assert not image.is_held


@pytest.mark.parametrize("is_begun", [False, True])
async def test_an_image_s_own_fault_keeps_nothing_of_it(placed: Placed, is_begun: bool) -> None:
    async def decode() -> weakref.ref[Image]:
        image = Image(placed)
        image.error = request_error(Reason.IMAGE_CORRUPT, "Broken.")
        image.may_end.set()
        placed.offer(1, 0, image.decode, begin=is_begun)
        with suppress(RequestError):
            await placed.handlers()["decode"](1, 0)
        placed.withdraw(1, 0)
        image.error = None
        return weakref.ref(image)

    gc.disable()
    try:
        reference = await decode()
        await turns()
        assert reference() is None
    finally:
        gc.enable()


async def test_so_many_are_let_in_ahead_as_all_front_ends_may_have_and_more_are_asked_for(placed: Placed) -> None:
    asked: list[tuple[int, int]] = []
    reserved: list[int | None] = []

    async def admit(request: int, num_images: int, num_bytes: int) -> None:
        asked.append((num_images, num_bytes))

    async def reserve(num_bytes: int | None, **_: object) -> list[tuple[int, bool]]:
        reserved.append(num_bytes)
        return [(4, True)]

    theirs, ours = socket.socketpair()
    handlers = {"admit": admit, "reserve": reserve, "close": lambda request: None}
    other = await Link.over(theirs, handlers, lambda: None)
    link = await Link.over(ours, {}, lambda: None)
    door, kept = new_shared_file("door"), new_shared_file("kept")
    os.ftruncate(kept, 64)
    budgets = Budgets(max_queued_patches=1000, max_inflight_images=8, max_inflight_bytes=1000)
    DoorSign(door).write(Load())
    core = RemoteCore(link, placed, ArenaView(kept), DoorSignReader(door, budgets, 2))
    first, second, third = [await core.admit(num_images=1, num_bytes=10) for _ in range(3)]
    assert asked == [(1, 10)]  # of four images that all may have, two front ends have two each
    for request in (first, third):
        assert await request.reserve([("a", 4)], math.inf) == [4]
    assert reserved == [10, None]
    second.close()
    await core.admit(num_images=2, num_bytes=10)
    assert len(asked) == 1
    for end in (link, other):
        end.close()
    for file in (door, kept):
        os.close(file)
