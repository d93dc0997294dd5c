"""A server on the test's own event loop, whose front ends are processes of their own."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from encoder_svc.config import load_config
from encoder_svc.observability.metrics import Metrics
from encoder_svc.observability.request import Observer
from encoder_svc.observability.start import StartPhases
from encoder_svc.server.app import Server
from encoder_svc.server.frontends.supervisor import FrontEnds
from encoder_svc.server.loading import Loader
from tests.server.in_process import pending

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from encoder_svc.server.local_core import LocalCore


@dataclass(frozen=True)
class Inside:
    """What a server is made of, and where it is."""

    front_ends: FrontEnds
    core: LocalCore
    metrics: Metrics
    target: str

    def pids(self) -> list[int]:
        """The front ends' processes."""
        return [front_end.pid for front_end in self.front_ends._now()]

    def held(self) -> dict[str, int]:
        """What is in work or given out, everywhere that something can be."""
        arena = self.front_ends._arena
        assert arena is not None
        guests = [front_end._guest for front_end in self.front_ends._now()]
        return pending(self.core) | {
            "embeddings": arena.taken_bytes - self.core.store.stats.cached_bytes - self.core.store.stats.leased_bytes,
            "read": sum(len(guest._read) for guest in guests if guest),
            "guests' requests": sum(len(guest._requests) for guest in guests if guest),
        }

    async def until_idle(self) -> None:
        """Fails if something is still held after a while."""
        for _ in range(200):
            if not any(self.held().values()):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(self.held())


@asynccontextmanager
async def serving(model: Path, *, exit_code: int = 0, **options: object) -> AsyncIterator[Inside]:
    """A server that takes requests, with two front ends. On the CPU, without a cache.

    Args:
        exit_code: that it is to end with.
    """
    ours = {"device": "cpu", "dtype": "float32", "cache_bytes": 0, "port": 0, "log_level": "warning"}
    flags = ours | {"frontend_processes": 2} | options
    config = load_config(flags=flags, environment={}).config
    metrics = Metrics()
    server = Server(config, Loader(config, str(model), metrics, StartPhases(0.0)), Observer(metrics))
    running = asyncio.create_task(server.run())
    while not server._is_open:
        await asyncio.sleep(0.01)
        if running.done():
            await running
    front_ends = server._entrance
    assert isinstance(front_ends, FrontEnds)
    assert front_ends._loaded is not None
    assert front_ends._port is not None
    port = front_ends._port.number
    try:
        yield Inside(front_ends, front_ends._loaded.core, metrics, f"127.0.0.1:{port}")
    finally:  # gRPC does not survive a loop that is closed beneath it
        server._stop.set()
        code = await running
    assert code == exit_code
