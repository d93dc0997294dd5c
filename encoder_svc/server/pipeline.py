"""What a request's images pass through: admit → (cache) → decode → encode. Nothing here knows the wire."""

from __future__ import annotations

import asyncio
import time
import zlib
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from encoder_svc.errors import Reason, RequestError, request_error
from encoder_svc.observability.stages import Stages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import ThreadPoolExecutor

    from encoder_svc.cache.keys import ContentKeys
    from encoder_svc.cache.promises import Promises
    from encoder_svc.cache.single_flight import SingleFlight
    from encoder_svc.cache.store import EmbeddingStore
    from encoder_svc.engine.admission import Admission
    from encoder_svc.engine.engine import Engine
    from encoder_svc.images.processor import ImageProcessor, PlannedImage
    from encoder_svc.images.types import EncoderImage, GridThw, ImageSource
    from encoder_svc.models.tower import VisionTower
    from encoder_svc.server.window import Window

# Of one request.
_HEADERS_AT_ONCE = 2


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
class AdmittedImage:
    """One image of a request after the cheap checks: what to do, or why nothing can be done.

    Attributes:
        plan: how to process it, or its fault.
        key: its content key.
        cached: its embeddings, if they were there.
    """

    index: int
    plan: PlannedImage | RequestError
    key: str = ""
    cached: Embeddings | None = None

    @property
    def grid_patches(self) -> int:
        """What it is made of."""
        return 0 if isinstance(self.plan, RequestError) else self.plan.grid.num_patches

    @property
    def num_patches(self) -> int:
        """What it will cost the device."""
        return 0 if self.cached else self.grid_patches


class RequestShare:
    """One request's share of the service: a request of many images leaves image threads, and turns on the device, to
    others."""

    def __init__(self, max_decodes: int) -> None:
        self.decode_slots = asyncio.Semaphore(max_decodes)


class Pipeline:
    """Everything behind the servicer once the model is loaded. Belongs to the event loop.

    Args:
        decoded: room for the pixels that wait for a device that resizes them.
        header_threads: read headers and hash; of their own, so that refusing is quick while images are being decoded.
        image_threads: decode and resize.
        decodes_per_request: how many images of one request may occupy ``image_threads`` at a time.
    """

    def __init__(
        self,
        *,
        tower: VisionTower,
        processor: ImageProcessor,
        keys: ContentKeys,
        engine: Engine,
        admission: Admission,
        store: EmbeddingStore[Embeddings],
        flights: SingleFlight[Encoded],
        promises: Promises,
        decoded: Window,
        header_threads: ThreadPoolExecutor,
        image_threads: ThreadPoolExecutor,
        decodes_per_request: int,
    ) -> None:
        self.tower = tower
        self.processor = processor
        self.engine = engine
        self.admission = admission
        self.store = store
        self.promises = promises
        self.decoded = decoded
        self._keys = keys
        self._flights = flights
        self._header_threads = header_threads
        self._image_threads = image_threads
        self._decodes_per_request = decodes_per_request

    async def admit(self, sources: Sequence[Callable[[], ImageSource | RequestError]]) -> list[AdmittedImage]:
        """Checks each image against the limits and looks for its embeddings. Reads headers, decodes nothing.

        Args:
            sources: each is called in a thread, as it may copy an image's bytes.
        """
        loop = asyncio.get_running_loop()
        left, planned = enumerate(sources), []

        async def plan_what_is_left() -> None:
            for index, source in left:
                planned.append(await loop.run_in_executor(self._header_threads, self._plan, index, source))

        # A job an image, and few jobs at a time: a request of many leaves others their turn.
        await asyncio.gather(*(plan_what_is_left() for _ in range(min(_HEADERS_AT_ONCE, len(sources)))))
        planned.sort(key=lambda image: image.index)
        return [
            AdmittedImage(image.index, image.plan, image.key, self.store.peek(image.key)) if image.key else image
            for image in planned
        ]

    def _plan(self, index: int, read: Callable[[], ImageSource | RequestError]) -> AdmittedImage:
        try:
            source = read()
            if isinstance(source, RequestError):
                raise source
            return AdmittedImage(index, self.processor.plan(source), self._keys.key(source.key_fields()))
        except RequestError as error:
            return AdmittedImage(index, error)

    def share(self) -> RequestShare:
        """For one request."""
        return RequestShare(self._decodes_per_request)

    async def encode(self, image: AdmittedImage, share: RequestShare, *, deadline_s: float, since_s: float) -> Encoded:
        """An admitted image's embeddings: cached, or from whoever encodes the same image now, or encoded.

        Args:
            share: the request's.
            deadline_s: on ``time.monotonic``.
            since_s: when the image's stage before ended, on the same clock.

        Raises:
            RequestError: the image's own fault, or the device's.
        """
        plan = image.plan
        if isinstance(plan, RequestError):
            raise plan
        kept = self.store.get(image.key) or image.cached
        if kept is not None:
            return Encoded(kept, "cached", Stages(), since_s)
        shared_s, led = 0.0, False

        async def lead() -> Encoded:
            nonlocal led
            led = True
            return await self._encode_and_keep(image.key, plan, share, deadline_s, since_s + shared_s)

        while True:
            try:
                encoded = await self._flights.run(image.key, lead)
                if led:
                    return replace(encoded, stages=replace(encoded.stages, shared_s=shared_s))
                ready_s = time.monotonic()
                return Encoded(encoded.embeddings, "shared", Stages(shared_s=ready_s - since_s), ready_s)
            except RequestError as error:
                # Somebody else's time ran out, not ours: lead the next flight, or join it.
                if led or error.reason != Reason.DEADLINE_EXCEEDED or time.monotonic() >= deadline_s:
                    raise
                shared_s = time.monotonic() - since_s

    async def _encode_and_keep(
        self, key: str, plan: PlannedImage, share: RequestShare, deadline_s: float, since_s: float
    ) -> Encoded:
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as pixels:
            async with share.decode_slots:
                if plan.pixel_bytes:
                    await pixels.enter_async_context(self.decoded.room(plan.pixel_bytes))
                if time.monotonic() >= deadline_s:
                    raise request_error(Reason.DEADLINE_EXCEEDED, "The deadline passed before the image was decoded.")
                began_s, processed, done_s = await loop.run_in_executor(self._image_threads, _timed, plan.process)
            queued_s = time.monotonic()
            item = await self.engine.encode(processed, flow=share, timeout_s=deadline_s - time.monotonic())
        data, crc32 = await asyncio.to_thread(_copied_and_summed, item.data)
        embeddings = Embeddings(processed.grid, data, crc32)
        self.store.put(key, embeddings)
        ready_s = time.monotonic()
        stages = Stages(
            decode_wait_s=began_s - since_s,
            decode_s=processed.decode_s,
            resize_s=processed.resize_s + item.resize_s,
            queue_s=queued_s - done_s + item.queue_s,
            build_s=item.build_s,
            device_wait_s=item.device_wait_s,
            h2d_s=item.h2d_s,
            forward_s=item.forward_s,
            d2h_s=item.d2h_s,
            collect_s=item.split_s + ready_s - item.ended_s,
        )
        return Encoded(embeddings, "encoded", stages, ready_s)

    async def expire_leases(self) -> None:
        """Frees leases that ran out, also while nobody calls. Runs until cancelled."""
        while True:
            await asyncio.sleep(1.0)
            self.store.expire()

    async def aclose(self) -> None:
        """Ends the device's and the image threads. Nothing may be encoded afterwards."""
        await self.engine.aclose()
        self._header_threads.shutdown(wait=False, cancel_futures=True)
        self._image_threads.shutdown(wait=False, cancel_futures=True)


def _copied_and_summed(data: memoryview) -> tuple[memoryview, int]:
    """Memory of the image's own, and its checksum."""
    copied = bytes(data)
    return memoryview(copied), zlib.crc32(copied)


def _timed(process: Callable[[], EncoderImage]) -> tuple[float, EncoderImage, float]:
    """What it returns, between when it began and when it was done: taken in its own thread."""
    began_s = time.monotonic()
    processed = process()
    return began_s, processed, time.monotonic()
