"""Ten minutes of everything at once: memory, threads and files stay where they were.

make test ARGS="-n 0 -m soak -s"
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

from encoder_svc.bench.pictures import noise_picture
from encoder_svc.client import AsyncEncoderClient, RequestError
from tests.serving import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DURATION_S = 600.0
NUM_CALLERS = 16
CACHE = "64MiB"


class Caller:
    """Sends requests of all kinds until told to stop, as many different callers would."""

    def __init__(self, client: AsyncEncoderClient, photos: list[bytes], seed: int) -> None:
        self.seen: Counter[str] = Counter()
        self._client = client
        self._photos = photos
        self._random = random.Random(seed)
        sides = (112, 224, 448, 700, 1024)
        self._pictures = [noise_picture(side, side, "jpeg", seed=seed) for side in sides]
        self._marks = itertools.count(seed * 2**40)

    async def run(self, ends_s: float) -> None:
        kinds = [self._new, self._new, self._known, self._leaves, self._retains, self._bad, self._many, self._hurried]
        while time.monotonic() < ends_s:
            kind = self._random.choice(kinds)
            try:
                await kind()
                self.seen[kind.__name__] += 1
            except RequestError as error:
                self.seen[f"{kind.__name__}: {error.reason}"] += 1

    def _unique(self) -> bytes:
        picture = self._random.choice(self._pictures).unique(next(self._marks))
        assert isinstance(picture, bytes)
        return picture

    async def _new(self) -> None:
        await self._client.encode([self._unique()])

    async def _known(self) -> None:
        await self._client.encode([self._random.choice(self._photos)])

    async def _leaves(self) -> None:
        call = asyncio.create_task(self._client.encode([self._unique()]))
        await asyncio.wait([call], timeout=self._random.uniform(0, 0.5))
        call.cancel()
        await asyncio.wait([call])
        if not call.cancelled():
            call.exception()

    async def _retains(self) -> None:
        retained = await self._client.retain([self._unique()], lease_s=2)
        keys = [image.key for image in retained]
        await self._client.fetch(keys)
        if self._random.random() < 0.5:
            await self._client.release(keys)

    async def _bad(self) -> None:
        whole = self._unique()
        await self._client.encode([whole[: self._random.randrange(len(whole) // 2)]])

    async def _many(self) -> None:
        await self._client.encode([self._unique() for _ in range(8)])

    async def _hurried(self) -> None:
        await self._client.encode([self._unique()], timeout_s=self._random.uniform(0.01, 0.3))


def taken(server: psutil.Process) -> tuple[float, int, int]:
    """Megabytes, threads and files of a server and its front ends. Memory that several share counts once."""
    processes = [server, *server.children()]
    return (
        sum(process.memory_full_info().pss for process in processes) / 1e6,
        sum(process.num_threads() for process in processes),
        sum(process.num_fds() for process in processes),
    )


@pytest.mark.soak
@pytest.mark.timeout(DURATION_S + 300)
@pytest.mark.parametrize("front_ends", ["0", "2"])
async def test_ten_minutes_leave_nothing_behind(
    tiny_checkpoint: Callable[[str], Path], photos: list[Path], front_ends: str
) -> None:
    options = ("--device", "cpu", "--cache-bytes", CACHE, "--max-queued-patches", "100000")
    options += ("--frontend-processes", front_ends)
    with ServerProcess("--model", tiny_checkpoint("qwen2_5_vl"), *options) as server:
        process = psutil.Process(server.process.pid)
        ends_s = time.monotonic() + DURATION_S
        samples: list[tuple[float, int, int]] = []
        async with AsyncEncoderClient(server.target, connections=4) as client:
            known = [photo.read_bytes() for photo in photos]
            callers = [Caller(client, known, seed) for seed in range(1, NUM_CALLERS + 1)]
            running = asyncio.gather(*(caller.run(ends_s) for caller in callers))
            while time.monotonic() < ends_s:
                samples.append(taken(process))
                await asyncio.sleep(1)
            await running
        exit_code = server.stop()
    table = np.array(samples)
    quarters = np.array_split(table, 4)
    for number, quarter in enumerate(quarters, start=1):
        memory, threads, files = quarter.T
        print(
            f"quarter {number}: memory median {np.median(memory):.0f}, most {memory.max():.0f} MB; threads at most "
            f"{threads.max():.0f}; files at most {files.max():.0f}"
        )
    seen = sum((caller.seen for caller in callers), Counter())
    print(dict(seen.most_common()))
    assert seen["_new"] > DURATION_S / 10
    assert exit_code == 0
    # The first quarter fills the cache and the allocator; from then on nothing grows.
    assert np.median(quarters[3][:, 0]) < 1.05 * np.median(quarters[1][:, 0])
    assert quarters[3][:, 1].max() <= quarters[1][:, 1].max()
    assert quarters[3][:, 2].max() <= quarters[1][:, 2].max() + 2
