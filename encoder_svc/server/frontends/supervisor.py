"""The front ends of a server: starts them, tells them what they need, and starts another where one ends."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.errors import ConfigError, RequestError
from encoder_svc.observability.merge import Counted, add, counted, what_only_grows
from encoder_svc.server.address import hold_port
from encoder_svc.server.credentials import server_credentials
from encoder_svc.server.frontends.door import DoorSign
from encoder_svc.server.frontends.host import Guest
from encoder_svc.server.frontends.link import Link
from encoder_svc.transport.arena import Arena, ArenaView, new_shared_file

if TYPE_CHECKING:
    from encoder_svc.config import Config
    from encoder_svc.observability.request import Observer
    from encoder_svc.server.frontends.link import Handler
    from encoder_svc.server.loading import Loaded

logger = logging.getLogger(__name__)

# One that ends sooner did not get to work; so many in a row, and it is no use.
_YOUNG_S: Final = 10.0
_MAX_YOUNG: Final = 3
_PAUSE_S: Final = 0.5
_MAX_PAUSE_S: Final = 30.0
# Every so often it is asked whether it lives, and must say so within twice as long again.
_ALIVE_S: Final = 10.0
_COUNT_TIMEOUT_S: Final = 2.0
# To end calls, and itself.
_FAREWELL_S: Final = 10.0
# Of the arena: what holes between blocks may take.
_HOLES: Final = 1.25
# float32.
_MAX_VALUE_BYTES: Final = 4


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
        self._port: socket.socket | None = None
        self._running: list[_FrontEnd | None] = [None] * config.frontend_processes
        self._keepers: list[asyncio.Task[None]] = []
        self._ending = False
        self._gone: Counted = {}
        self._failed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        observer.metrics.add_others(self.count)

    def own(self, data: memoryview) -> memoryview:
        """A copy of an image's bytes, where every front end can read it. In a thread."""
        assert self._arena is not None
        return self._arena.own(data)

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
        port: int = self._port.getsockname()[1]
        return port

    async def open(self, loaded: Loaded) -> None:
        self._arena = Arena(self._embeddings, _embedding_bytes(self._config, loaded))
        loaded.core.admission.on_change = self._sign.write
        self._loaded = loaded
        begun = [front_end for front_end in self._now() if front_end.has_begun]  # the others will find it loaded
        opening = (front_end.open(self._config, self._arena, loaded) for front_end in begun)
        for error in await asyncio.gather(*opening, return_exceptions=True):
            if isinstance(error, RequestError):
                logger.error("a front end ended while it opened; another is started")
            elif error is not None:
                raise error

    async def until_failed(self) -> None:
        await self._failed.wait()

    async def drain(self, refusal: RequestError, hurry: asyncio.Event) -> int:
        self._ending = True
        drained = (front_end.drain(refusal, self._config.drain_s, hurry) for front_end in self._now())
        return sum(await asyncio.gather(*drained))

    async def stop(self, *, at_once: bool = False) -> None:
        self._ending = True
        await asyncio.gather(*(front_end.stop(at_once=at_once) for front_end in self._now()))
        for keeper in self._keepers:
            keeper.cancel()
        if self._port is not None:
            self._port.close()

    def count(self) -> Counted:
        """What the front ends counted, those that are gone among them. In a scrape's thread."""
        total = dict(self._gone)
        front_ends = self._now()
        if self._loop is not None and front_ends:
            counting = asyncio.run_coroutine_threadsafe(self._count_all(front_ends), self._loop)
            try:
                counting.result(_COUNT_TIMEOUT_S)
            except TimeoutError:
                counting.cancel()
        for front_end in front_ends:
            add(total, front_end.counted)
        return total

    async def _count_all(self, front_ends: list[_FrontEnd]) -> None:
        await asyncio.gather(*(front_end.count() for front_end in front_ends))

    def _now(self) -> list[_FrontEnd]:
        return [front_end for front_end in self._running if front_end is not None]

    async def _start_one(self, place: int) -> None:
        """
        Raises:
            ConfigError: it cannot listen.
            RequestError: it ended.
        """
        assert self._port is not None
        front_end = await _FrontEnd.start(self._embeddings, self._door)
        self._running[place] = front_end
        await front_end.begin(self._config, self._port.getsockname()[1])
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
                self._running[place] = None
                add(self._gone, what_only_grows(front_end.counted))
            num_young = num_young + 1 if clock() - since_s < _YOUNG_S else 0
            if num_young >= _MAX_YOUNG and not any(other.is_grown for other in self._now()):
                logger.critical("front ends end as soon as they are started")
                self.has_failed = True
                self._failed.set()
                return
            self.num_restarts += 1
            await asyncio.sleep(min(_PAUSE_S * (2**num_young - 1), _MAX_PAUSE_S))
            try:
                await self._start_one(place)
            except (ConfigError, RequestError, OSError) as error:
                logger.error("a front end did not start: %s", error)
                if (begun := self._running[place]) is not None:
                    self._running[place] = None
                    await begun.stop(at_once=True)


class _FrontEnd:
    """One process, from here.

    Attributes:
        has_begun: it listens.
    """

    def __init__(self, process: asyncio.subprocess.Process, images: int) -> None:
        self.pid = process.pid
        self.has_begun = False
        self._opened_s = math.inf
        self.ended = asyncio.Event()
        self.counted: Counted = {}
        self._process = process
        self._images = images
        self._handlers: dict[str, Handler] = {}
        self._link: Link | None = None
        self._guest: Guest | None = None

    @classmethod
    async def start(cls, embeddings: int, door: int) -> _FrontEnd:
        ours, theirs = socket.socketpair()
        images = new_shared_file("encoder-svc-images")
        passed = (theirs.fileno(), embeddings, images, door)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "encoder_svc.server.frontends", *map(str, passed)),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=passed,
                start_new_session=True,  # a terminal's signals are for this process, which tells the others
            )
        front_end = cls(process, images)
        front_end._link = await Link.over(ours, front_end._handlers, front_end._lost)
        return front_end

    async def begin(self, config: Config, port: int) -> None:
        """
        Raises:
            ConfigError: it cannot listen.
        """
        refusal = await self._ask("begin", config=asdict(config), port=port)
        if refusal is not None:
            raise ConfigError(refusal)
        self.has_begun = True

    @property
    def is_grown(self) -> bool:
        """Whether it has served for a while."""
        return not self.ended.is_set() and time.monotonic() - self._opened_s >= _YOUNG_S

    async def until_ended(self) -> None:
        """Returns once it is gone. One that hangs is ended."""
        while not self.ended.is_set():
            ended = asyncio.create_task(self.ended.wait())
            asking: asyncio.Task[Any] | None = None
            try:
                await asyncio.wait([ended], timeout=_ALIVE_S)
                asking = asyncio.create_task(self._ask("alive"))
                for _ in range(2):  # the first time too much may have stood still, this process too
                    await asyncio.wait([ended, asking], timeout=_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
                if not ended.done() and not asking.done():
                    logger.error("a front end (process %d) hangs and is ended", self.pid)
                    self._process.kill()
                    await self.ended.wait()
            finally:
                await _cancel(ended, asking)

    async def open(self, config: Config, embeddings: Arena, loaded: Loaded) -> None:
        if self._guest is not None:
            return  # it began while the model was loaded, and was asked already
        image_bytes = _image_bytes(config, loaded)
        os.ftruncate(self._images, image_bytes)
        assert self._link is not None
        self._guest = Guest(loaded.core, embeddings, ArenaView(self._images, writable=True))
        self._guest.meet(self._link)
        self._handlers.update(self._guest.handlers())
        facts = loaded.facts
        await self._ask(
            "open",
            info=facts.info.SerializeToString().hex(),
            settings=asdict(facts.settings),
            input_processor=facts.input_processor,
            image_bytes=image_bytes,
        )
        self._opened_s = time.monotonic()

    async def count(self) -> None:
        try:
            self.counted = counted(await self._ask("count"))
        except RequestError:
            return  # it just ended; what it last said stays

    async def drain(self, refusal: RequestError, seconds: float, hurry: asyncio.Event) -> int:
        """See :meth:`FrontEnds.drain`. Of one that hangs all requests are cut short."""
        assert self._link is not None
        asking = asyncio.create_task(
            self._ask("drain", reason=refusal.reason, message=refusal.message, seconds=seconds)
        )
        hurrying = asyncio.create_task(hurry.wait())
        await asyncio.wait([asking, hurrying], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if hurry.is_set():
            self._link.tell("hurry")
        await asyncio.wait([asking], timeout=_FAREWELL_S)
        if asking.done() and not asking.cancelled() and asking.exception() is None:
            num_cut_short: int = asking.result()
        else:
            num_cut_short = 0 if self._guest is None else self._guest.num_requests
            if self._process.returncode is None:
                self._process.kill()
        await _cancel(asking, hurrying)
        return num_cut_short

    async def stop(self, *, at_once: bool) -> None:
        assert self._link is not None
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await self._ask("stop", at_once=at_once)
                self._link.close()
                await self._process.wait()
        except (TimeoutError, RequestError):
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()

    async def _ask(self, what: str, **fields: Any) -> Any:
        assert self._link is not None
        return await self._link.ask(what, **fields)

    def _lost(self) -> None:
        if self._guest is not None:
            self._guest.leave()
        os.close(self._images)
        self.ended.set()


def _embedding_bytes(config: Config, loaded: Loaded) -> int:
    """Room for all that may be kept, retained, or pending. Most of it is never touched, and takes no memory."""
    info = loaded.facts.info
    value_bytes = _MAX_VALUE_BYTES if info.dtype == encoder_pb2.DTYPE_FLOAT32 else 2
    patch_bytes = info.width * value_bytes // info.spatial_merge_size**2
    pending = (config.max_queued_patches + config.max_request_patches) * patch_bytes
    return round((config.cache_bytes + config.max_leased_bytes + pending) * _HOLES)


def _image_bytes(config: Config, loaded: Loaded) -> int:
    """Room for the images of one front end that wait for the device: ``max_decoded_bytes``, and the largest of all."""
    settings = loaded.facts.settings
    pixel_values = config.max_request_patches * settings.patch_dim * _MAX_VALUE_BYTES
    largest = max(pixel_values, config.max_image_pixels * settings.channels)
    return config.max_decoded_bytes + largest


async def _cancel(*tasks: asyncio.Task[Any] | None) -> None:
    """Ends tasks whose outcome nobody wants."""
    left = [task for task in tasks if task is not None]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
