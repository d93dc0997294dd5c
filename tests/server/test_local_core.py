"""Which of several requests an image is decoded for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from tests.server.in_process import Inside, pending, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


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
