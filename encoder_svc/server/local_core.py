"""The replica in its own process: see server/core.py."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from encoder_svc.errors import Reason, RequestError, request_error
from encoder_svc.observability.stages import Stages
from encoder_svc.server.core import Embeddings, Encoded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from encoder_svc.cache.promises import Promises
    from encoder_svc.cache.single_flight import SingleFlight
    from encoder_svc.cache.store import EmbeddingStore
    from encoder_svc.engine.admission import Admission, Grant
    from encoder_svc.engine.engine import Engine
    from encoder_svc.server.core import Decoded


class Memory(Protocol):
    """Where embeddings lie while they are kept and sent."""

    def holds(self, data: memoryview) -> bool:
        """Whether these bytes are there, in a place of their own."""

    def own(self, data: memoryview) -> memoryview:
        """A copy there, of an image's bytes in its batch's memory. In a thread.

        Raises:
            MemoryError: there is no room.
        """


class Heap:
    """This process's own memory."""

    def holds(self, data: memoryview) -> bool:
        """See :class:`Memory`; so with the other."""
        return False

    def own(self, data: memoryview) -> memoryview:
        # Others run meanwhile, as not with bytes(): several MB an image kept the event loop waiting.
        return np.frombuffer(data, np.uint8).copy().data.toreadonly()


class LocalCore:
    """The replica itself. Belongs to the event loop.

    Args:
    Attributes:
        memory: where embeddings are kept; this process's own, unless others are to read them.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        admission: Admission,
        store: EmbeddingStore[Embeddings],
        flights: SingleFlight[Encoded],
        promises: Promises,
    ) -> None:
        self.engine = engine
        self.admission = admission
        self.store = store
        self.flights = flights
        self.promises = promises
        self.memory: Memory = Heap()
        # By the key of an image: who is to encode it, a request and an index, from the reservation until it is done.
        self.leaders: dict[str, tuple[LocalRequest, int]] = {}

    def refusal_at_the_door(self) -> RequestError | None:
        """See :class:`Core`."""
        return self.admission.refusal_at_the_door()

    async def admit(self, *, num_images: int, num_bytes: int) -> LocalRequest:
        """See :class:`Core`."""
        return LocalRequest(self, self.admission.admit(num_images=num_images, num_bytes=num_bytes))

    @asynccontextmanager
    async def fetch(self, key: str) -> AsyncIterator[Embeddings]:
        """See :class:`Core`."""
        await self.promises.wait(key)
        embeddings = self.store.fetch(key)
        yield embeddings  # in hand meanwhile: what is read counts

    async def release(self, keys: Sequence[str]) -> int:
        """See :class:`Core`."""
        return sum(self.store.release(key) for key in keys)

    async def encode(
        self,
        key: str,
        kept: Embeddings | None,
        decode: Callable[[], AbstractAsyncContextManager[Decoded]],
        *,
        flow: object,
        deadline_s: float,
        since_s: float,
    ) -> Encoded:
        """See :meth:`AdmittedRequest.encode`. ``kept``: what was found under the key before; ``flow``: what shares its
        turns on the device."""
        kept = self.store.get(key) or kept
        if kept is not None:
            return Encoded(kept, "cached", Stages(), since_s)
        shared_s, led = 0.0, False

        async def lead() -> Encoded:
            nonlocal led
            led = True
            return await self._encode_and_keep(key, decode, flow, deadline_s, since_s + shared_s)

        while True:
            try:
                encoded = await self.flights.run(key, lead)
                if led:
                    return replace(encoded, stages=replace(encoded.stages, shared_s=shared_s))
                ready_s = time.monotonic()
                return Encoded(encoded.embeddings, "shared", Stages(shared_s=ready_s - since_s), ready_s)
            except RequestError as error:
                # Somebody else's time ran out, or they left, not we: lead the next flight, or join it.
                theirs = error.reason in (Reason.DEADLINE_EXCEEDED, Reason.CANCELLED)
                if led or not theirs or time.monotonic() >= deadline_s:
                    raise
                shared_s = time.monotonic() - since_s

    async def _encode_and_keep(
        self,
        key: str,
        decode: Callable[[], AbstractAsyncContextManager[Decoded]],
        flow: object,
        deadline_s: float,
        since_s: float,
    ) -> Encoded:
        async with decode() as decoded:
            image = decoded.image
            queued_s = time.monotonic()
            item = await self.engine.encode(image, flow=flow, timeout_s=deadline_s - queued_s)
        embeddings = Embeddings(image.grid, await self._kept(item.data))
        self.store.put(key, embeddings)
        ready_s = time.monotonic()
        stages = Stages(
            decode_wait_s=decoded.began_s - since_s,
            decode_s=image.decode_s,
            resize_s=image.resize_s + item.resize_s,
            queue_s=queued_s - decoded.done_s + item.queue_s,
            build_s=item.build_s,
            device_wait_s=item.device_wait_s,
            h2d_s=item.h2d_s,
            forward_s=item.forward_s,
            d2h_s=item.d2h_s,
            collect_s=item.split_s + ready_s - item.ended_s,
        )
        return Encoded(embeddings, "encoded", stages, ready_s)

    async def _kept(self, data: memoryview) -> memoryview:
        """An image's bytes in a place of their own.

        Raises:
            RequestError: QUEUE_FULL. It takes many holes between what is kept and what is read.
        """
        if self.memory.holds(data):
            return data
        try:
            return await asyncio.to_thread(self.memory.own, data)
        except MemoryError:
            raise request_error(
                Reason.QUEUE_FULL,
                "Embeddings that are kept or being read leave no room for this image's.",
                retry_after_s=1.0,
            ) from None

    async def expire_leases(self) -> None:
        """Frees leases that ran out, also while nobody calls. Runs until cancelled."""
        while True:
            await asyncio.sleep(1.0)
            self.store.expire()


@dataclass(frozen=True, slots=True)
class _ReservedImage:
    key: str
    kept: Embeddings | None
    num_patches: int


class LocalRequest:
    """See :class:`AdmittedRequest`. It is also what its images share their turns on the device by."""

    def __init__(self, core: LocalCore, grant: Grant) -> None:
        self._core = core
        self._grant = grant
        self._images: list[_ReservedImage] = []

    async def reserve(self, images: Sequence[tuple[str, int]], time_remaining_s: float) -> list[int]:
        peek = self._core.store.peek
        for key, num_patches in images:
            kept = peek(key) if key else None
            self._images.append(_ReservedImage(key, kept, 0 if kept or not key else num_patches))
        costs = [image.num_patches for image in self._images]
        self._grant.reserve(sum(costs), time_remaining_s)
        for index, image in enumerate(self._images):
            if image.num_patches and not self._core.flights.in_flight(image.key):
                self._core.leaders.setdefault(image.key, (self, index))
        return costs

    def leads(self, index: int) -> bool:
        """Whether this image is decoded for this request, as far as can be said now: nobody else was first."""
        return self._core.leaders.get(self._images[index].key) == (self, index)

    def joins(self, index: int) -> bool:
        """Whether another encodes this image at the moment, so that it need not be decoded now."""
        return self._core.flights.in_flight(self._images[index].key)

    def _leads_no_more(self, index: int) -> None:
        if self.leads(index):
            del self._core.leaders[self._images[index].key]

    async def encode(
        self,
        index: int,
        decode: Callable[[], AbstractAsyncContextManager[Decoded]],
        *,
        deadline_s: float,
        since_s: float,
        lease_s: float | None,
    ) -> Encoded:
        core, image = self._core, self._images[index]

        async def encoded() -> Encoded:
            return await core.encode(image.key, image.kept, decode, flow=self, deadline_s=deadline_s, since_s=since_s)

        if lease_s is None:
            return await encoded()
        with core.promises.promise(image.key):
            result = await encoded()
            core.store.lease(image.key, result.embeddings, lease_s)
            return result

    def image_done(self, index: int, *, completed: bool) -> None:
        self._leads_no_more(index)
        image = self._images[index]
        self._images[index] = replace(image, kept=None)
        self._grant.image_done(image.num_patches, completed=completed)

    def close(self) -> None:
        for index in range(len(self._images)):
            self._leads_no_more(index)
        self._images.clear()  # the queue may know of the request a while longer, for the turns of others
        self._grant.close()
