"""One front end from the process of the device: started, told what it needs, asked whether it lives, ended."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from encoder_svc.errors import ConfigError, Reason, RequestError, request_error
from encoder_svc.observability.merge import Counted, counted
from encoder_svc.server.frontends.guest import Guest
from encoder_svc.server.frontends.link import Link
from encoder_svc.server.own_processes import python_module
from encoder_svc.server.shared_memory import IMAGE_OPTIONS, asked_for_by, image_bytes
from encoder_svc.transport.arena import ArenaView, new_shared_file

if TYPE_CHECKING:
    from encoder_svc.config import Config
    from encoder_svc.server.frontends.link import Handler
    from encoder_svc.server.loading import Loaded
    from encoder_svc.transport.arena import Arena

logger = logging.getLogger(__name__)

YOUNG_S: Final = 10.0
"""One that ends sooner did not get to work."""

# Every so often it is asked whether it lives, and must say so within twice as long again.
_ALIVE_S: Final = 10.0
# To end calls, and itself.
_FAREWELL_S: Final = 10.0


class FrontEnd:
    """One process, from here.

    Attributes:
        has_begun: it listens.
    """

    def __init__(self, process: asyncio.subprocess.Process, images: int) -> None:
        self.pid = process.pid
        self.has_begun = False
        self._opened_s = math.inf
        self.ended = asyncio.Event()
        self._counted = "[]"
        self._process = process
        self._images = images
        self._handlers: dict[str, Handler] = {}
        self._link: Link | None = None
        self._guest: Guest | None = None
        self._num_lost = 0

    @classmethod
    async def start(cls, embeddings: int, door: int) -> FrontEnd:
        ours, theirs = socket.socketpair()
        images = new_shared_file("encoder-svc-images")
        passed = (theirs.fileno(), embeddings, images, door)
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *python_module("encoder_svc.server.frontends", *passed),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=passed,
                    start_new_session=True,  # a terminal's signals are for this process, which tells the others
                )
        except BaseException:
            ours.close()
            os.close(images)
            raise
        front_end = cls(process, images)
        try:
            front_end._link = await Link.over(ours, front_end._handlers, front_end._lost)
        except BaseException:
            process.kill()
            await process.wait()
            raise
        return front_end

    async def begin(self, config: Config, port: int) -> None:
        """
        Raises:
            ConfigError: it cannot listen.
        """
        refusal = await self._ask("begin", config=asdict(config), port=port, alive_s=_ALIVE_S)
        if refusal is not None:
            raise ConfigError(refusal)
        self.has_begun = True

    @property
    def is_grown(self) -> bool:
        """Whether it has served for a while."""
        return not self.ended.is_set() and time.monotonic() - self._opened_s >= YOUNG_S

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

    def end(self) -> None:
        """At once, and its calls with it."""
        if self._process.returncode is None:
            self._process.kill()

    async def leave_none_behind(self) -> None:
        """Waits for the end of a process whose link has ended, and brings it about."""
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def prepare(self) -> None:
        """Has it import what it needs to be opened.

        Raises:
            RequestError: it ended.
        """
        await self._ask("prepare")

    async def open(self, config: Config, embeddings: Arena, loaded: Loaded) -> None:
        """Has it serve.

        Raises:
            ConfigError: it cannot have the memory or the threads that the config asks for.
            RequestError: it ended.
        """
        if self._guest is not None:
            return  # it began while the model was loaded, and was asked already
        if self.ended.is_set():
            raise request_error(Reason.CANCELLED, "The front end ended before it was opened.")
        facts = loaded.facts
        num_bytes = image_bytes(config, facts)
        with asked_for_by(IMAGE_OPTIONS, num_bytes):
            os.ftruncate(self._images, num_bytes)
            images = ArenaView(self._images, writable=True)
        assert self._link is not None
        self._guest = Guest(loaded.core, embeddings, images)
        self._guest.meet(self._link)
        self._handlers.update(self._guest.handlers())
        refusal = await self._ask(
            "open",
            info=facts.info.SerializeToString().hex(),
            settings=asdict(facts.settings),
            input_processor=facts.input_processor,
            image_bytes=num_bytes,
        )
        if refusal is not None:
            raise ConfigError(refusal)
        self._opened_s = time.monotonic()

    async def count(self) -> None:
        """Asks what it has counted."""
        try:
            self._counted = await self._ask("count")
        except RequestError:
            return  # it just ended; what it last said stays

    def counted(self) -> Counted:
        """What it last said that it has. Takes a while, and may be called in any thread."""
        return counted(self._counted)

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
            num_cut_short = self._num_lost or (0 if self._guest is None else self._guest.num_requests)
            logger.error("a front end (process %d) did not live to drain; its calls are lost", self.pid)
            self.end()
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
            self.end()
            await self._process.wait()

    async def _ask(self, what: str, **fields: Any) -> Any:
        assert self._link is not None
        return await self._link.ask(what, **fields)

    def _lost(self) -> None:
        if self._guest is not None:
            self._num_lost = self._guest.num_requests
            self._guest.leave()
            # It, its link and this refer to each other; the images' memory is not to wait for the cycle collector.
            self._guest = None
            self._handlers.clear()
        os.close(self._images)
        self.ended.set()


async def _cancel(*tasks: asyncio.Task[Any] | None) -> None:
    """Ends tasks whose outcome nobody wants."""
    left = [task for task in tasks if task is not None]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
