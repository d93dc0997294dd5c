"""Which of several requests an image is decoded for, and where its embeddings are kept."""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest

from encoder_svc.client import AsyncEncoderClient
from encoder_svc.errors import Reason, RequestError, request_error
from encoder_svc.images.types import GridThw
from encoder_svc.server.core import Embeddings
from encoder_svc.transport.arena import Arena, new_shared_file
from tests.server.in_process import Inside, pending, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from encoder_svc.server.core import Decoded


@pytest.fixture
async def inside(tiny_checkpoint: Callable[[str], Path]) -> AsyncIterator[Inside]:
    async with serving(tiny_checkpoint("qwen2_vl")) as (inside, _):
        yield inside


async def test_the_first_that_reserved_an_image_leads_until_it_is_done(inside: Inside) -> None:
    first, second = [await inside.core.admit(num_images=3, num_bytes=10) for _ in range(2)]
    await first.reserve([("a", 4), ("a", 4), ("b", 4)], math.inf)
    await second.reserve([("c", 4), ("a", 4), ("", 0)], math.inf)
    assert [first.leads(index) for index in range(3)] == [True, False, True]
    assert [second.leads(index) for index in range(3)] == [True, False, False]
    first.image_done(0, completed=False)
    third = await inside.core.admit(num_images=1, num_bytes=10)
    await third.reserve([("a", 4)], math.inf)
    assert third.leads(0)
    for request in (first, second, third):
        request.close()
    assert not any(pending(inside.core).values())


@pytest.mark.parametrize("ends", ["the image", "the request"])
async def test_embeddings_that_were_kept_are_the_stores_alone_when_they_are_done_with(
    inside: Inside, ends: str
) -> None:
    data = np.zeros(16, np.uint8)
    left = weakref.ref(data)
    inside.core.store.lease("a", Embeddings(GridThw(1, 2, 2), data.data), 60)
    del data
    request = await inside.core.admit(num_images=1, num_bytes=10)
    assert await request.reserve([("a", 4)], math.inf) == [0]
    inside.core.store.release("a")
    assert left() is not None
    if ends == "the image":
        request.image_done(0, completed=True)
        assert left() is None
    request.close()
    assert left() is None


async def test_embeddings_that_are_fetched_count_until_they_were_read(inside: Inside) -> None:
    core = inside.core
    core.store.lease("a", Embeddings(GridThw(1, 2, 2), memoryview(bytes(16))), 60)
    async with core.fetch("a"):
        await core.release(["a"])
        assert core.store.stats.leased_bytes == 16
    assert core.store.stats.leased_bytes == 0


async def test_who_comes_second_joins_whoever_encodes(inside: Inside) -> None:
    first, second = [await inside.core.admit(num_images=1, num_bytes=10) for _ in range(2)]
    for request in (first, second):
        await request.reserve([("a", 4)], math.inf)
    assert not first.joins(0)
    may_end = asyncio.Event()

    @asynccontextmanager
    async def never() -> AsyncIterator[Decoded]:
        await may_end.wait()
        raise request_error(Reason.IMAGE_CORRUPT, "Broken.")
        yield

    encoding = asyncio.create_task(second.encode(0, never, deadline_s=math.inf, since_s=time.monotonic(), lease_s=None))
    await asyncio.sleep(0)
    assert first.leads(0)
    assert first.joins(0)
    may_end.set()
    with pytest.raises(RequestError, match="Broken"):
        await encoding
    assert not first.joins(0)
    for request in (first, second):
        request.close()
    assert not any(pending(inside.core).values())


async def test_without_room_for_its_embeddings_an_image_is_to_come_again(
    tiny_checkpoint: Callable[[str], Path], photos: list[Path]
) -> None:
    async with serving(tiny_checkpoint("qwen2_vl")) as (inside, target), AsyncEncoderClient(target) as client:
        heap, inside.core.memory = inside.core.memory, Arena(new_shared_file("full"), 64)
        with pytest.raises(RequestError, match="no room") as raised:
            await client.encode(photos[:1])
        assert (raised.value.reason, raised.value.retry_after_s) == (Reason.QUEUE_FULL, 1.0)
        inside.core.memory = heap
        assert len(await client.encode(photos[:1])) == 1
