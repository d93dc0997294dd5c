"""The front ends of a server: starts them, tells them what they need, and starts another where one ends."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING, Final

from encoder_svc.errors import ConfigError, RequestError
from encoder_svc.observability.merge import Counted, add, give_way, what_only_grows
from encoder_svc.server.address import hold_port
from encoder_svc.server.credentials import server_credentials
from encoder_svc.server.frontends.child import YOUNG_S, FrontEnd
from encoder_svc.server.frontends.door import DoorSign
from encoder_svc.server.gauges import decoded_gauges
from encoder_svc.server.shared_memory import EMBEDDING_OPTIONS, asked_for_by, embedding_bytes
from encoder_svc.server.window import Window
from encoder_svc.transport.arena import Arena, new_shared_file

if TYPE_CHECKING:
    from encoder_svc.config import Config
    from encoder_svc.observability.request import Observer
    from encoder_svc.server.address import HeldPort
    from encoder_svc.server.loading import Loaded

logger = logging.getLogger(__name__)

# So many in a row that end young, and it is no use.
_MAX_YOUNG: Final = 3
_PAUSE_S: Final = 0.5
_MAX_PAUSE_S: Final = 30.0
_COUNT_TIMEOUT_S: Final = 2.0


class FrontEnds:
    """See :class:`encoder_svc.server.entrance.Entrance`. Belongs to the event loop."""

    def __init__(self, config: Config, observer: Observer) -> None:
        self.num_restarts = 0
        self.has_failed = False
        self._config = config
        self._embeddings = new_shared_file("encoder-svc-embeddings")
        self._door = new_shared_file("encoder-svc-door")
        self._sign = DoorSign(self._door)
        self._arena: Arena | None = None
        self._loaded: Loaded | None = None
        self._port: HeldPort | None = None
        self._running: list[FrontEnd | None] = [None] * (config.frontend_processes or 0)
        self._keepers: list[asyncio.Task[None]] = []
        self._preparing: set[asyncio.Task[None]] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self._ending = False
        self._gone: Counted = {}
        # A scrape's thread finds a front end either running or gone.
        self._removing = threading.Lock()
        self._failed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._metrics = observer.metrics
        self._metrics.add_others(self.count)

    async def start(self) -> int:
        """See :class:`Entrance`; so with all of these."""
        self._loop = asyncio.get_running_loop()
        server_credentials(self._config)
        self._port = hold_port(self._config.host, self._config.port)
        places = range(len(self._running))
        started = await asyncio.gather(*map(self._start_one, places), return_exceptions=True)
        for error in started:
            if error is not None:
                await self.stop(at_once=True)
            if isinstance(error, RequestError):
                raise ConfigError(f"a front end did not start: {error.message} Its own last words are above.")
            if error is not None:
                raise error
        self._keepers = [asyncio.create_task(self._keep(place)) for place in places]
        return self._port.number

    def prepare(self) -> None:
        for front_end in self._now():
            preparing = asyncio.create_task(front_end.prepare())
            self._preparing.add(preparing)
            preparing.add_done_callback(self._preparing.discard)
            # One that ended meanwhile is its keeper's to replace.
            preparing.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def open(self, loaded: Loaded) -> None:
        num_bytes = embedding_bytes(self._config, loaded.facts)
        with asked_for_by(EMBEDDING_OPTIONS, num_bytes):
            self._arena = Arena(self._embeddings, num_bytes)
        loaded.core.memory = self._arena
        loaded.land_in(self._arena)
        loaded.core.admission.on_change = self._sign.write
        self._loaded = loaded
        # Nothing is decoded here; a scrape adds what the front ends say to metrics that are there.
        self._metrics.read_at_scrape(decoded_gauges(Window(0)))
        begun = [front_end for front_end in self._now() if front_end.has_begun]  # the others will find it loaded
        opening = (front_end.open(self._config, self._arena, loaded) for front_end in begun)
        opened = await asyncio.gather(*opening, return_exceptions=True)
        for front_end, error in zip(begun, opened, strict=True):
            if isinstance(error, RequestError):
                logger.error("a front end (process %d) did not open: %s", front_end.pid, error)
                front_end.end()  # another is started
            elif error is not None:
                raise error

    async def until_failed(self) -> None:
        await self._failed.wait()

    async def drain(self, refusal: RequestError, hurry: asyncio.Event) -> int:
        await self._start_no_more()
        begun = [front_end for front_end in self._now() if front_end.has_begun]  # the others have no calls
        drained = (front_end.drain(refusal, self._config.drain_s, hurry) for front_end in begun)
        return sum(await asyncio.gather(*drained))

    async def stop(self, *, at_once: bool = False) -> None:
        await self._start_no_more()
        await asyncio.gather(*(front_end.stop(at_once=at_once) for front_end in self._now()), *self._leaving)
        if self._port is not None:
            self._port.close()

    async def _start_no_more(self) -> None:
        self._ending = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    def count(self) -> Counted:
        """What the front ends counted, those that are gone among them. In a scrape's thread."""
        with self._removing:
            total, front_ends = dict(self._gone), self._now()
        if self._loop is not None and front_ends:
            counting = asyncio.run_coroutine_threadsafe(self._count_all(front_ends), self._loop)
            try:
                counting.result(_COUNT_TIMEOUT_S)
            except TimeoutError:
                counting.cancel()
        for front_end in front_ends:
            give_way()
            add(total, front_end.counted())
        return total

    async def _count_all(self, front_ends: list[FrontEnd]) -> None:
        await asyncio.gather(*(front_end.count() for front_end in front_ends))

    def _now(self) -> list[FrontEnd]:
        return [front_end for front_end in self._running if front_end is not None]

    async def _start_one(self, place: int) -> None:
        """
        Raises:
            ConfigError: it cannot listen, or not have what the config asks for.
            RequestError: it ended.
        """
        assert self._port is not None
        front_end = await FrontEnd.start(self._embeddings, self._door)
        self._running[place] = front_end
        if self._loaded is not None:  # no caller shall come to it that it would refuse
            await front_end.prepare()
        await front_end.begin(self._config, self._port.number)
        if self._arena is not None and self._loaded is not None:
            await front_end.open(self._config, self._arena, self._loaded)

    async def _keep(self, place: int) -> None:
        """Starts another whenever one ends."""
        num_young, clock = 0, asyncio.get_running_loop().time
        while not self._ending:
            front_end, since_s = self._running[place], clock()
            if front_end is not None:
                await front_end.until_ended()
                if self._ending:
                    return
                logger.error("a front end (process %d) ended; its calls are lost, another is started", front_end.pid)
                self._remove(place, front_end)
                leaving = asyncio.create_task(front_end.leave_none_behind())
                self._leaving.add(leaving)
                leaving.add_done_callback(self._leaving.discard)
                await asyncio.shield(leaving)
            num_young = num_young + 1 if clock() - since_s < YOUNG_S else 0
            if num_young >= _MAX_YOUNG and not any(other.is_grown for other in self._now()):
                logger.critical("front ends end as soon as they are started")
                self.has_failed = True
                self._failed.set()
                return
            self.num_restarts += 1
            await asyncio.sleep(min(_PAUSE_S * num_young**2, _MAX_PAUSE_S))
            try:
                await self._start_one(place)
            except (ConfigError, RequestError, OSError) as error:
                logger.error("a front end did not start: %s", error)
                if (begun := self._running[place]) is not None:
                    self._remove(place, begun)
                    await begun.stop(at_once=True)

    def _remove(self, place: int, front_end: FrontEnd) -> None:
        """It is gone; what it counted is not."""
        gone = dict(self._gone)
        add(gone, what_only_grows(front_end.counted()))
        with self._removing:
            self._running[place], self._gone = None, gone
