"""The replica as a front end sees it: every question goes over the link, to where the device is."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from encoder_svc.errors import Reason, RequestError, request_error
from encoder_svc.server.frontends.described import describe_decoded, embeddings_of, encoded_of
from encoder_svc.server.shared_images import copied

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from encoder_svc.images.types import EncoderImage
    from encoder_svc.server.core import AdmittedRequest, Decoded, Embeddings, Encoded
    from encoder_svc.server.frontends.door import DoorSignReader
    from encoder_svc.server.frontends.link import Handler, Link
    from encoder_svc.transport.arena import Arena, ArenaView

    Decode = Callable[[], AbstractAsyncContextManager[Decoded]]

# For room in the arena: as long as the device may well take for what is in it.
_ROOM_WAIT_S: Final = 60.0


class Placed:
    """Images where the device's process can read them, until it has.

    Args:
        arena: this front end's own.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._decodes: dict[tuple[int, int], Decode] = {}
        self._begun: dict[tuple[int, int], asyncio.Task[tuple[Decoded, AsyncExitStack]]] = {}
        self._placed: dict[tuple[int, int], AsyncExitStack] = {}
        self._ending: set[asyncio.Task[Any]] = set()

    def place(self, image: EncoderImage) -> EncoderImage:
        """A copy of an image in the arena. In an image thread, which waits while the arena is full.

        Raises:
            RequestError: QUEUE_FULL, if it stays full.
        """
        try:
            return copied(image, self._arena, _ROOM_WAIT_S)
        except MemoryError:
            raise request_error(
                Reason.QUEUE_FULL, "The images that wait for the device leave no room for this one.", retry_after_s=1.0
            ) from None

    def offer(self, request: int, index: int, decode: Decode, *, begin: bool) -> None:
        """From now on the image may be asked for. ``begin``: it most likely will be."""
        self._decodes[request, index] = decode
        if begin:
            self._begun[request, index] = asyncio.create_task(_held(decode))

    def withdraw(self, request: int, index: int) -> None:
        """Its request is over. What was asked for already stays."""
        self._decodes.pop((request, index), None)
        self._decode_later(request, index)

    def handlers(self) -> dict[str, Handler]:
        """What the device's process asks and tells."""
        return {"decode": self._decode, "decode_later": self._decode_later, "decoded_done": self._decoded_done}

    async def _decode(self, request: int, index: int) -> dict[str, Any]:
        decode = self._decodes.get((request, index))
        if decode is None:
            raise request_error(Reason.CANCELLED, "The request that held the image is over.")
        begun = self._begun.pop((request, index), None) or asyncio.create_task(_held(decode))
        try:
            decoded, self._placed[request, index] = await begun
        except asyncio.CancelledError:
            self._drop(begun)
            raise
        finally:
            del begun  # has the image's error, whose traceback has this frame: see Link.ask
        return describe_decoded(decoded, self._arena.offset)

    def _decode_later(self, request: int, index: int) -> None:
        """It may still be asked for, but is not to be decoded now."""
        if begun := self._begun.pop((request, index), None):
            self._drop(begun)

    def _decoded_done(self, request: int, index: int) -> None:
        """The device's process has read it, or wants it no more."""
        held = self._placed.pop((request, index), None)
        if held is not None:
            self._close(held)

    def _drop(self, begun: asyncio.Task[tuple[Decoded, AsyncExitStack]]) -> None:
        """Gives back what was decoded, or will be, for nobody."""

        def ended(_: object) -> None:
            if not begun.cancelled() and begun.exception() is None:
                self._close(begun.result()[1])

        begun.cancel()
        begun.add_done_callback(ended)
        self._keep(begun)

    def _close(self, held: AsyncExitStack) -> None:
        self._keep(asyncio.create_task(held.aclose()))

    def _keep(self, ending: asyncio.Task[Any]) -> None:
        """The loop holds tasks but weakly."""
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)


async def _held(decode: Decode) -> tuple[Decoded, AsyncExitStack]:
    """An image, and what to close once it has been read."""
    async with AsyncExitStack() as held:
        return await held.enter_async_context(decode()), held.pop_all()


class RemoteCore:
    """See :class:`encoder_svc.server.core.Core`. Belongs to the event loop.

    Args:
        embeddings: the arena that the device's process keeps them in.
    """

    def __init__(self, link: Link, placed: Placed, embeddings: ArenaView, door: DoorSignReader) -> None:
        self.link = link
        self.placed = placed
        self.embeddings = embeddings
        self._door = door
        self._last_number = 0
        self._ahead: Counter[str] = Counter()

    def refusal_at_the_door(self) -> RequestError | None:
        """See :class:`encoder_svc.server.core.Core`; so with all of these."""
        return self._door.refusal()

    async def admit(self, *, num_images: int, num_bytes: int) -> AdmittedRequest:
        """See :class:`encoder_svc.server.core.Core`. While the replica is not half full, the request is let in together
        with its reservation: a question waits for two busy loops."""
        brings = {"num_requests": 1, "num_images": num_images, "num_bytes": num_bytes}
        if self._door.is_half_empty(**{what: self._ahead[what] + number for what, number in brings.items()}):
            return _RemoteRequest(self, self._number(), brings)
        request = _RemoteRequest(self, self._number())
        try:
            await self.link.ask("admit", request=request.number, num_images=num_images, num_bytes=num_bytes)
        except asyncio.CancelledError:
            request.close()  # it may have been let in all the same
            raise
        return request

    @asynccontextmanager
    async def fetch(self, key: str) -> AsyncIterator[Embeddings]:
        number = self._number()
        try:
            found = await self.link.ask("fetch", number=number, key=key)
            yield embeddings_of(found, self.embeddings.view)
        finally:
            self.link.tell("fetched_done", number=number)

    async def release(self, keys: Sequence[str]) -> int:
        released: int = await self.link.ask("release", keys=list(keys))
        return released

    def note_ahead(self, brings: dict[str, int]) -> None:
        """A request is here that was not let in yet."""
        self._ahead.update(brings)

    def note_asked(self, brings: dict[str, int]) -> None:
        """The device's process knows of it now, or it is over."""
        self._ahead.subtract(brings)

    def _number(self) -> int:
        self._last_number += 1
        return self._last_number


class _RemoteRequest:
    """See :class:`encoder_svc.server.core.AdmittedRequest`. ``brings``: what it holds, if it was not let in yet."""

    def __init__(self, core: RemoteCore, number: int, brings: dict[str, int] | None = None) -> None:
        self.number = number
        self._core = core
        self._link = core.link
        self._brings = brings
        self._to_decode: list[bool] = []
        if brings:
            core.note_ahead(brings)

    async def reserve(self, images: Sequence[tuple[str, int]], time_remaining_s: float) -> list[int]:
        try:
            reserved: list[tuple[int, bool]] = await self._link.ask(
                "reserve",
                request=self.number,
                images=images,
                time_remaining_s=time_remaining_s,
                num_bytes=self._brings and self._brings["num_bytes"],
            )
        finally:
            self._is_known()
        self._to_decode = [leads for _, leads in reserved]
        return [cost for cost, _ in reserved]

    def _is_known(self) -> None:
        if self._brings:
            self._core.note_asked(self._brings)
            self._brings = None

    async def encode(
        self, index: int, decode: Decode, *, deadline_s: float, since_s: float, lease_s: float | None
    ) -> Encoded:
        placed = self._core.placed
        placed.offer(self.number, index, decode, begin=self._to_decode[index])
        try:
            told = await self._link.ask(
                "encode", request=self.number, index=index, deadline_s=deadline_s, since_s=since_s, lease_s=lease_s
            )
        finally:
            placed.withdraw(self.number, index)
        return encoded_of(told, self._core.embeddings.view)

    def image_done(self, index: int, *, completed: bool) -> None:
        self._link.tell("image_done", request=self.number, index=index, completed=completed)

    def close(self) -> None:
        self._is_known()
        self._link.tell("close", request=self.number)
