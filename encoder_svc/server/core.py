"""What a replica has one of, however many processes answer its calls: admission, kept embeddings, the device.

The servicer asks a :class:`Core` and does not know whether it is in its own process (:class:`LocalCore`) or in that of
the device (server/frontends/remote.py). Nothing here knows the wire, or what an image was before it was decoded.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from encoder_svc.errors import Reason, RequestError
from encoder_svc.observability.stages import Stages

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from encoder_svc.cache.promises import Promises
    from encoder_svc.cache.single_flight import SingleFlight
    from encoder_svc.cache.store import EmbeddingStore
    from encoder_svc.engine.admission import Admission, Grant
    from encoder_svc.engine.engine import Engine
    from encoder_svc.images.types import EncoderImage, GridThw


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One image's embeddings, as the cache keeps them: ``data`` is [rows, width] of the tower's dtype."""

    grid: GridThw
    data: memoryview
    crc32: int

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


@dataclass(frozen=True, slots=True)
class Encoded:
    """Embeddings, how they were come by, and where the time went.

    Attributes:
        outcome: ``encoded``, ``cached`` or ``shared`` (with another caller).
        stages: from ``shared`` to ``collect``; all zero if they were cached.
        ready_s: when the last of those ended, on ``time.monotonic``.
    """

    embeddings: Embeddings
    outcome: str
    stages: Stages
    ready_s: float


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image for the device, and when a thread began to decode it and was done, on ``time.monotonic``."""

    image: EncoderImage
    began_s: float
    done_s: float


class Core(Protocol):
    """What the servicer asks of the replica."""

    def refusal_at_the_door(self) -> RequestError | None:
        """Why no request would be let in now; None if one may be. Waits for nobody."""

    async def admit(self, *, num_images: int, num_bytes: int) -> AdmittedRequest:
        """Lets a request in, before its images are looked at. To be closed.

        Raises:
            RequestError: QUEUE_FULL, INFLIGHT_IMAGES or INFLIGHT_BYTES.
        """

    def fetch(self, key: str) -> AbstractAsyncContextManager[Embeddings]:
        """Retained embeddings, to be read while inside. Waits while they are being encoded.

        Raises:
            RequestError: KEY_UNKNOWN or KEY_EXPIRED.
        """

    async def release(self, keys: Sequence[str]) -> int:
        """Gives back one lease of each key; returns how many there were."""


class AdmittedRequest(Protocol):
    """One request's place in the replica."""

    async def reserve(self, images: Sequence[tuple[str, int]], time_remaining_s: float) -> list[int]:
        """Takes room for the request's images, once they are known.

        Args:
            images: the key and the patches of each; an empty key for one that cannot be encoded.

        Returns:
            What each will cost the device, in patches: nothing, if it is kept.

        Raises:
            RequestError: QUEUE_FULL or DEADLINE_EXCEEDED.
        """

    async def encode(
        self,
        index: int,
        decode: Callable[[], AbstractAsyncContextManager[Decoded]],
        *,
        deadline_s: float,
        since_s: float,
        lease_s: float | None,
    ) -> Encoded:
        """The embeddings of the image at ``index``: kept, or from whoever encodes the same image now, or encoded. What
        is returned may be read until :meth:`image_done`.

        Args:
            decode: called, once at most, if the image has to be encoded; inside, its pixels stay.
            deadline_s: on ``time.monotonic``.
            since_s: when the image's stage before ended, on the same clock.
            lease_s: for how long to retain them; None if they are to be sent.

        Raises:
            RequestError: the image's own fault, or the device's; LEASE_BYTES_EXHAUSTED.
        """

    def image_done(self, index: int, *, completed: bool) -> None:
        """Gives back one image's room. ``completed``: it was encoded and sent."""

    def close(self) -> None:
        """Gives back whatever is left."""


class LocalCore:
    """The replica itself. Belongs to the event loop.

    Args:
        own: copies an image's bytes out of its batch's memory, to where whoever sends them can read them; runs in a
            thread.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        admission: Admission,
        store: EmbeddingStore[Embeddings],
        flights: SingleFlight[Encoded],
        promises: Promises,
        own: Callable[[memoryview], memoryview] = lambda data: memoryview(bytes(data)),
    ) -> None:
        self.engine = engine
        self.admission = admission
        self.store = store
        self.flights = flights
        self.promises = promises
        self._own = own

    def refusal_at_the_door(self) -> RequestError | None:
        """See :class:`Core`."""
        return self.admission.refusal_at_the_door()

    async def admit(self, *, num_images: int, num_bytes: int) -> AdmittedRequest:
        """See :class:`Core`."""
        return _LocalRequest(self, self.admission.admit(num_images=num_images, num_bytes=num_bytes))

    @asynccontextmanager
    async def fetch(self, key: str) -> AsyncIterator[Embeddings]:
        """See :class:`Core`."""
        await self.promises.wait(key)
        yield self.store.fetch(key)

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
        data, crc32 = await asyncio.to_thread(self._owned_and_summed, item.data)
        embeddings = Embeddings(image.grid, data, crc32)
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

    def _owned_and_summed(self, data: memoryview) -> tuple[memoryview, int]:
        """Memory of the image's own, and its checksum."""
        owned = self._own(data)
        return owned, zlib.crc32(owned)

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


class _LocalRequest:
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
        return costs

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
        self._grant.image_done(self._images[index].num_patches, completed=completed)

    def close(self) -> None:
        self._grant.close()
