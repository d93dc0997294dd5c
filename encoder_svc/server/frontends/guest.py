"""One front end as the device's process sees it: answers what it asks, and gives everything back when it ends."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from encoder_svc.server.frontends.described import decoded_of, describe_embeddings, describe_encoded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from encoder_svc.server.core import Decoded, Embeddings
    from encoder_svc.server.frontends.link import Handler, Link
    from encoder_svc.server.local_core import LocalCore, LocalRequest
    from encoder_svc.transport.arena import Arena, ArenaView


class Guest:
    """A front end's requests. Belongs to the event loop.

    Args:
        embeddings: where the core's own are kept.
        images: the front end's arena.
    """

    def __init__(self, core: LocalCore, embeddings: Arena, images: ArenaView) -> None:
        self._core = core
        self._embeddings = embeddings
        self._images = images
        self._link: Link | None = None
        self._requests: dict[int, LocalRequest] = {}
        # What the front end may be reading: it stays where it is, evicted or not.
        self._read: dict[tuple[int, int], Embeddings] = {}

    def handlers(self) -> dict[str, Handler]:
        """What a front end asks and tells; see remote.py."""
        return {
            "admit": self._admit,
            "reserve": self._reserve,
            "encode": self._encode,
            "image_done": self._image_done,
            "close": self._close,
            "fetch": self._fetch,
            "fetched_done": self._fetched_done,
            "release": self._core.release,
        }

    def meet(self, link: Link) -> None:
        """The link over which its images are asked for."""
        self._link = link

    @property
    def num_requests(self) -> int:
        """Those that run."""
        return len(self._requests)

    def leave(self) -> None:
        """The front end is gone, and so is whoever asked it."""
        for request in self._requests.values():
            request.close()
        self._requests.clear()
        self._read.clear()

    async def _admit(self, request: int, num_images: int, num_bytes: int) -> None:
        self._requests[request] = await self._core.admit(num_images=num_images, num_bytes=num_bytes)

    async def _reserve(
        self, request: int, images: list[tuple[str, int]], time_remaining_s: float, num_bytes: int | None
    ) -> list[tuple[int, bool]]:
        """What each image costs, and whether to decode it before it is asked for. ``num_bytes``: of a request that was
        not let in before."""
        if num_bytes is not None:
            await self._admit(request, len(images), num_bytes)
        admitted = self._requests[request]
        costs = await admitted.reserve(images, time_remaining_s)
        return [(cost, admitted.leads(index)) for index, cost in enumerate(costs)]

    async def _encode(
        self, request: int, index: int, deadline_s: float, since_s: float, lease_s: float | None
    ) -> dict[str, Any]:
        assert self._link is not None
        admitted = self._requests[request]
        if admitted.joins(index):
            # It came first, and another was quicker, who may wait for the room that this image is decoded in.
            self._link.tell("decode_later", request=request, index=index)
        encoded = await admitted.encode(
            index, partial(self._decoded, request, index), deadline_s=deadline_s, since_s=since_s, lease_s=lease_s
        )
        self._read[request, index] = encoded.embeddings
        return describe_encoded(encoded, self._embeddings.offset)

    @asynccontextmanager
    async def _decoded(self, request: int, index: int) -> AsyncIterator[Decoded]:
        """Of an image that nobody waits for any more the batch may still be under way when this ends, and its place in
        the arena another image's: what the device makes of that is thrown away."""
        assert self._link is not None
        try:
            told = await self._link.ask("decode", request=request, index=index)
            yield decoded_of(told, self._images.view)
        finally:
            self._link.tell("decoded_done", request=request, index=index)

    def _image_done(self, request: int, index: int, completed: bool) -> None:  # by name, over the link
        self._read.pop((request, index), None)
        self._requests[request].image_done(index, completed=completed)

    def _close(self, request: int) -> None:
        admitted = self._requests.pop(request, None)
        if admitted is not None:
            admitted.close()

    async def _fetch(self, number: int, key: str) -> dict[str, Any]:
        async with self._core.fetch(key) as embeddings:
            self._read[-1, number] = embeddings
            return describe_embeddings(embeddings, self._embeddings.offset)

    def _fetched_done(self, number: int) -> None:
        self._read.pop((-1, number), None)
