"""A server on the test's own event loop, for looking inside."""

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
from encoder_svc.server.entrance import InProcess
from encoder_svc.server.loading import Loader
from encoder_svc.server.local_core import LocalCore
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from encoder_svc.server.pipeline import Pipeline


@dataclass(frozen=True)
class Inside:
    """What a server is made of."""

    pipeline: Pipeline
    core: LocalCore


def pending(core: LocalCore) -> dict[str, int]:
    """What is in work where the device is."""
    admission, engine = core.admission, core.engine
    return {
        "requests": admission.num_requests,
        "images": admission.pending_images,
        "bytes": admission.pending_bytes,
        "patches": admission.pending_patches,
        "expected": admission.expected_patches,
        "queued": engine.queued_images,
        "queued patches": engine.queued_patches,
        "flights": len(core.flights),
        "leaders": len(core.leaders),
        "batches": sum(len(lane._batches) for lane in engine._lanes),
    }


@asynccontextmanager
async def serving(model: Path, *, exit_code: int = 0, **options: object) -> AsyncIterator[tuple[Inside, str]]:
    """The inside of a server that takes requests, and its target. On the CPU, without a cache.

    Args:
        exit_code: that it is to end with.
    """
    port = free_port()
    flags = {"device": "cpu", "dtype": "float32", "cache_bytes": 0, "port": port, **options}
    config = load_config(flags=flags, environment={}).config
    metrics = Metrics()
    server = Server(config, Loader(config, str(model), metrics, StartPhases(0.0)), Observer(metrics))
    running = asyncio.create_task(server.run())
    while not server._is_open:
        await asyncio.sleep(0.01)
        assert not running.done(), running.exception()
    entrance = server._entrance
    assert isinstance(entrance, InProcess)
    assert entrance.pipeline is not None
    core = entrance.pipeline.core
    assert isinstance(core, LocalCore)
    try:
        yield Inside(entrance.pipeline, core), f"127.0.0.1:{port}"
    finally:  # gRPC does not survive a loop that is closed beneath it
        server._stop.set()
        code = await running
    assert code == exit_code
