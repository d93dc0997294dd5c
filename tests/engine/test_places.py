"""Who may be packed when, without a device."""

from __future__ import annotations

import asyncio

import pytest

from encoder_svc.engine.places import Place, Places


async def is_there_one(places: Places, *, full: bool = False) -> Place | None:
    try:
        async with asyncio.timeout(0.01):
            return await places.take(lambda: full)
    except TimeoutError:
        return None


@pytest.mark.parametrize(("depth", "number", "number_full"), [(1, 1, 1), (2, 1, 2), (3, 2, 3)])
async def test_the_last_of_several_is_for_a_full_batch(depth: int, number: int, number_full: int) -> None:
    places = Places(depth)
    taken = [await is_there_one(places) for _ in range(depth + 1)]
    assert [place is not None for place in taken] == [True] * number + [False] * (depth + 1 - number)
    taken = [await is_there_one(places, full=True) for _ in range(depth + 1)]
    assert sum(place is not None for place in taken) == number_full - number


async def test_a_computed_batch_gives_its_place_to_one_and_its_end_to_none() -> None:
    places = Places(3)
    first, _ = await is_there_one(places), await is_there_one(places)
    first.computed()
    first.computed()
    assert await is_there_one(places) is not None
    assert await is_there_one(places, full=True) is None
    first.end()
    assert await is_there_one(places) is None
    assert await is_there_one(places, full=True) is not None


async def test_nobody_is_made_up_while_another_is_packed() -> None:
    places = Places(3)
    with places.packing():
        assert await is_there_one(places, full=True) is None
    assert await is_there_one(places) is not None


async def test_who_waits_hears_that_a_batch_has_become_full() -> None:
    places, full = Places(2), False
    await places.take(lambda: full)
    waiting = asyncio.create_task(places.take(lambda: full))
    await asyncio.sleep(0)
    full = True
    places.look_again()
    async with asyncio.timeout(1):
        await waiting
