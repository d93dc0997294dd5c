"""Where calls come in: in the process of the device, or in processes of their own (server/frontends/)."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

from encoder_svc.platforms.cores import usable_cores
from encoder_svc.server.front import Front
from encoder_svc.server.gauges import decoded_gauges
from encoder_svc.server.pipeline import Pipeline, make_pipeline

if TYPE_CHECKING:
    from encoder_svc.config import Config
    from encoder_svc.errors import RequestError
    from encoder_svc.observability.request import Observer
    from encoder_svc.server.loading import Loaded

# An H100 with images whose rows are wide (docs/performance-server.md).
_MAX_FRONT_ENDS: Final = 8


class Entrance(Protocol):
    """What the server does with whatever answers its calls. Belongs to the event loop.

    Attributes:
        num_restarts: how often another process had to be started in one's place.
        has_failed: whether no call can be answered any more.
    """

    num_restarts: int
    has_failed: bool

    async def start(self) -> int:
        """Listens, and refuses all calls with STARTING; returns the port.

        Raises:
            ConfigError: it cannot listen there, or a certificate cannot be used.
        """

    def prepare(self) -> None:
        """Told in the midst of a start: what :meth:`open` will take is best made ready from now on, beside the rest."""

    async def open(self, loaded: Loaded) -> None:
        """Begins to serve."""

    async def until_failed(self) -> None:
        """Returns once it :attr:`has_failed`; else never."""

    async def drain(self, refusal: RequestError, hurry: asyncio.Event) -> int:
        """Takes no new request, and lets those that run finish within ``drain_s``, or until ``hurry`` is set.

        Args:
            refusal: what new callers are told, and those that are cut short.

        Returns:
            How many were cut short.
        """

    async def stop(self, *, at_once: bool = False) -> None:
        """Closes the port and its connections. Nothing may be decoded afterwards."""


def with_front_ends(config: Config, device: str) -> Config:
    """``config`` with a number of front ends, if it has none: as many as a GPU is known to want, where cores and memory
    that processes share are there for them. A CPU's cores are its device's."""
    if config.frontend_processes is not None:
        return config
    is_wanted = device.startswith("cuda") and hasattr(os, "memfd_create")
    return replace(config, frontend_processes=min(_MAX_FRONT_ENDS, usable_cores() // 2) if is_wanted else 0)


class InProcess:
    """Calls are answered here."""

    num_restarts = 0
    has_failed = False

    def __init__(self, config: Config, observer: Observer) -> None:
        self.pipeline: Pipeline | None = None
        self._config = config
        self._metrics = observer.metrics
        self._front = Front(config, observer)

    async def start(self) -> int:
        """See :class:`Entrance`; so with all of these."""
        return await self._front.start(self._config.port)

    def prepare(self) -> None:
        """All is here."""

    async def open(self, loaded: Loaded) -> None:
        self.pipeline = make_pipeline(self._config, loaded.facts, loaded.core)
        self._metrics.read_at_scrape(decoded_gauges(self.pipeline.decoded))
        await self._front.open(self.pipeline)

    async def until_failed(self) -> None:
        await asyncio.Event().wait()

    async def drain(self, refusal: RequestError, hurry: asyncio.Event) -> int:
        return await self._front.drain(refusal, self._config.drain_s, hurry)

    async def stop(self, *, at_once: bool = False) -> None:
        await self._front.stop(at_once=at_once)
        if self.pipeline is not None:
            self.pipeline.close()
