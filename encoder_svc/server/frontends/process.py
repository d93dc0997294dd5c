"""A front end: a gRPC server without a model, which has the device's process encode."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import disable_created_metrics

from encoder_svc.allocator import use_one_heap
from encoder_svc.config import Config
from encoder_svc.errors import ConfigError, Reason, request_error
from encoder_svc.garbage import look_for_cycles_rarely, spare_what_is_loaded
from encoder_svc.observability.logs import configure_logs
from encoder_svc.observability.loop_lag import probe_loop_lag
from encoder_svc.observability.merge import portable
from encoder_svc.observability.metrics import Metrics
from encoder_svc.observability.request import Observer
from encoder_svc.observability.tracer import make_tracer
from encoder_svc.server.front import Front
from encoder_svc.server.frontends.link import Link
from encoder_svc.server.gauges import decoded_gauges

if TYPE_CHECKING:
    from types import ModuleType

    from encoder_svc.observability.tracing import OpenTelemetryTracer
    from encoder_svc.server.frontends.link import Handler
    from encoder_svc.server.pipeline import Pipeline

logger = logging.getLogger(__name__)

# How often in a row the device's process may fail to ask whether this one lives.
_MAX_UNASKED: Final = 2


def run_front_end(link: int, embeddings: int, images: int, door: int) -> int:
    """Answers calls until the device's process, at the other end of ``link``, says to end, or ends.

    Args:
        link: descriptor of a connected socket; the others are those of shared files.
    """
    look_for_cycles_rarely()
    use_one_heap()
    disable_created_metrics()  # type: ignore[no-untyped-call]
    # A terminal's Ctrl-C comes to every process. When to end is the device's process to say.
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, signal.SIG_IGN)
    return asyncio.run(_FrontEnd(embeddings, images, door).run(socket.socket(fileno=link)))


class _FrontEnd:
    def __init__(self, embeddings: int, images: int, door: int) -> None:
        self._files = (embeddings, images, door)
        self._ended = asyncio.Event()
        self._hurry = asyncio.Event()
        self._handlers: dict[str, Handler] = {
            "begin": self._begin,
            "alive": self._alive,
            "prepare": self._prepare,
            "open": self._open,
            "count": self._count,
            "drain": self._drain,
            "hurry": self._hurry.set,
            "stop": self._stop,
        }
        self._link: Link | None = None
        self._num_unasked = 0
        self._stopped = False
        self._tracer: OpenTelemetryTracer | None = None
        self._front: Front | None = None
        self._pipeline: Pipeline | None = None

    async def run(self, end: socket.socket) -> int:
        self._link = await Link.over(end, self._handlers, self._lost)
        await self._ended.wait()
        if self._tracer is not None:
            self._tracer.close()
        return 0

    def _lost(self) -> None:
        if not self._stopped:
            # The device's process died; calls end with their connections. At once: what was asked of it has failed as
            # if it were cancelled, which is not to be told to callers.
            os._exit(1)
        self._ended.set()

    async def _begin(self, config: dict[str, Any], port: int, alive_s: float) -> str | None:
        """Listens, and refuses all calls; returns why not.

        Args:
            alive_s: how often the device's process asks whether this one lives.
        """
        self._config = Config(**config)
        configure_logs(self._config.log_level, self._config.log_format, sys.stderr)
        self._metrics = Metrics()
        try:
            self._tracer = make_tracer(self._config)
            observer = Observer(self._metrics, self._tracer)
            front = Front(self._config, observer, shares_port=True)
            await front.start(port)
        except ConfigError as error:
            return str(error)
        self._front = front
        self._metrics.read_at_scrape({"encoder_requests_running": lambda: observer.num_running})
        self._probe = asyncio.create_task(probe_loop_lag(self._metrics))
        self._listening = asyncio.create_task(self._listen(front, alive_s))
        return None

    async def _prepare(self) -> None:
        """To be opened soon."""
        await asyncio.to_thread(_import_what_serves)

    async def _open(self, **described: Any) -> str | None:
        """Begins to serve; returns why not. See :func:`encoder_svc.server.frontends.opened.open_pipeline`."""
        assert self._link is not None
        assert self._front is not None
        opened = await asyncio.to_thread(_import_what_serves)
        try:
            self._pipeline = opened.open_pipeline(self._config, self._link, self._handlers, self._files, **described)
        except ConfigError as error:
            return str(error)
        self._metrics.read_at_scrape(decoded_gauges(self._pipeline.decoded))
        spare_what_is_loaded()
        await self._front.open(self._pipeline)
        return None

    async def _alive(self) -> None:
        """That this is answered says it; that it is asked says it of the device's process."""
        self._num_unasked = 0

    async def _listen(self, front: Front, alive_s: float) -> None:
        """Health follows the device's process: while that stands still nobody is served, though this one answers.
        Counted, not timed: where this process too stood still, nobody was silent."""
        was_silent = False
        while True:
            await asyncio.sleep(alive_s)
            self._num_unasked += 1
            is_silent = self._num_unasked > _MAX_UNASKED
            if is_silent != was_silent:
                level, what = (logging.ERROR, "silent") if is_silent else (logging.WARNING, "heard again")
                logger.log(level, "the process of the device is %s", what)
                await front.say(is_served=not is_silent)
            was_silent = is_silent

    async def _count(self) -> str:
        return await asyncio.to_thread(portable, self._metrics.registry)

    async def _drain(self, reason: str, message: str, seconds: float) -> int:
        assert self._front is not None
        self._listening.cancel()  # nobody asks any more
        return await self._front.drain(request_error(Reason(reason), message), seconds, self._hurry)

    async def _stop(self, at_once: bool) -> None:  # by name, over the link
        self._stopped = True
        if self._front is not None:
            await self._front.stop(at_once=at_once)
        if self._pipeline is not None:
            self._pipeline.close()


def _import_what_serves() -> ModuleType:
    """Takes seconds."""
    return importlib.import_module("encoder_svc.server.frontends.opened")
