"""What a request's images pass through in the process that answers it: plan → decode. Nothing here knows the wire."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from encoder_svc.allocator import give_back_what_is_free
from encoder_svc.cache.keys import ContentKeys
from encoder_svc.errors import Reason, RequestError, request_error, without_frames
from encoder_svc.platforms.cores import usable_cores
from encoder_svc.server.core import Decoded
from encoder_svc.server.info import limits_of
from encoder_svc.server.threads import image_threads
from encoder_svc.server.window import Window

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from encoder_svc._generated.encoder.v1 import encoder_pb2
    from encoder_svc.config import Config
    from encoder_svc.images.processor import ImageProcessor, PlannedImage
    from encoder_svc.images.types import EncoderImage, ImageSource
    from encoder_svc.server.core import Core
    from encoder_svc.server.info import ModelFacts
    from encoder_svc.server.window import Room

logger = logging.getLogger(__name__)

# Of one request.
_HEADERS_AT_ONCE = 2

# Who took so much to decode an image gives back what the allocator keeps of it.
_LARGE_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """One image of a request after the cheap checks: what to do, or why nothing can be done.

    Attributes:
        plan: how to process it, or its fault.
        key: its content key; empty if it has a fault.
    """

    index: int
    plan: PlannedImage | RequestError
    key: str = ""

    @property
    def num_patches(self) -> int:
        """What it is made of."""
        return 0 if isinstance(self.plan, RequestError) else self.plan.grid.num_patches


class RequestShare:
    """One request's share of the image threads: a request of many images leaves others their turn."""

    def __init__(self, max_decodes: int) -> None:
        self.decode_slots = asyncio.Semaphore(max_decodes)


class Pipeline:
    """Everything behind the servicer once the model is loaded. Belongs to the event loop.

    Args:
        core: the replica, here or in another process.
        info: what GetModelInfo answers.
        decoded: room for what is being decoded, and for the pixels that wait for a device that resizes them.
        header_threads: read headers and hash; of their own, so that refusing is quick while images are being decoded.
        image_threads: decode and resize.
        decodes_per_request: how many images of one request may occupy ``image_threads`` at a time.
        place: puts a processed image where the core can read it; runs in an image thread.
    """

    def __init__(
        self,
        *,
        core: Core,
        info: encoder_pb2.GetModelInfoResponse,
        processor: ImageProcessor,
        keys: ContentKeys,
        decoded: Window,
        header_threads: ThreadPoolExecutor,
        image_threads: ThreadPoolExecutor,
        decodes_per_request: int,
        place: Callable[[EncoderImage], EncoderImage],
    ) -> None:
        self.core = core
        self.info = info
        self.processor = processor
        self.decoded = decoded
        self._keys = keys
        self._header_threads = header_threads
        self._image_threads = image_threads
        self._decodes_per_request = decodes_per_request
        self._place = place

    async def check(self, sources: Sequence[Callable[[], ImageSource | RequestError]]) -> list[CheckedImage]:
        """Checks each image against the limits and names it. Reads headers, decodes nothing.

        Args:
            sources: each is called in a thread, as it may copy an image's bytes.
        """
        loop = asyncio.get_running_loop()
        left, checked = enumerate(sources), []

        async def check_what_is_left() -> None:
            for index, source in left:
                checked.append(await loop.run_in_executor(self._header_threads, self._check, index, source))

        # A job an image, and few jobs at a time: a request of many leaves others their turn.
        await asyncio.gather(*(check_what_is_left() for _ in range(min(_HEADERS_AT_ONCE, len(sources)))))
        return sorted(checked, key=lambda image: image.index)

    def _check(self, index: int, read: Callable[[], ImageSource | RequestError]) -> CheckedImage:
        try:
            source = read()
            if isinstance(source, RequestError):
                raise source
            return CheckedImage(index, self.processor.plan(source), self._keys.key(source.key_fields()))
        except RequestError as error:
            return CheckedImage(index, without_frames(error))
        except Exception:
            logger.exception("an image could not be checked")
            return CheckedImage(index, request_error(Reason.INTERNAL, "The server failed on this image."))

    def share(self) -> RequestShare:
        """For one request."""
        return RequestShare(self._decodes_per_request)

    @asynccontextmanager
    async def decode(self, plan: PlannedImage, share: RequestShare, deadline_s: float) -> AsyncIterator[Decoded]:
        """An image for the device. What it takes to decode it, and pixels that wait for the device, hold their room
        while they do, the latter as long as the caller is inside.

        Args:
            share: the request's.
            deadline_s: on ``time.monotonic``.

        Raises:
            RequestError: the image's own fault; DEADLINE_EXCEEDED.
        """
        async with AsyncExitStack() as pixels:
            async with share.decode_slots:
                room = await pixels.enter_async_context(self.decoded.room(max(plan.decode_bytes, plan.pixel_bytes)))
                if time.monotonic() >= deadline_s:
                    raise request_error(Reason.DEADLINE_EXCEEDED, "The deadline passed before the image was decoded.")
                decoded = await self._in_image_thread(plan, room)
                room.shrink(plan.pixel_bytes)
            yield decoded

    async def _in_image_thread(self, plan: PlannedImage, room: Room) -> Decoded:
        """:meth:`_process`, which holds its room to its end though nobody waits for it any more."""
        job = self._image_threads.submit(self._process, plan)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            if not job.cancelled():
                room.keep_for(job)
            raise
        except RequestError as error:
            without_frames(error)  # they hold what was decoded so far, and the room for it is free next
            raise
        finally:
            del job  # it has the error, whose traceback has this frame

    def _process(self, plan: PlannedImage) -> Decoded:
        """Takes its times in its own thread."""
        began_s = time.monotonic()
        try:
            image = self._place(plan.process())
            return Decoded(image, began_s, time.monotonic())
        finally:
            if plan.decode_bytes >= _LARGE_BYTES:
                give_back_what_is_free()

    def close(self) -> None:
        """Ends the threads. Nothing may be decoded afterwards."""
        self._header_threads.shutdown(wait=False, cancel_futures=True)
        self._image_threads.shutdown(wait=False, cancel_futures=True)


def make_pipeline(
    config: Config,
    facts: ModelFacts,
    core: Core,
    *,
    num_processes: int = 1,
    place: Callable[[EncoderImage], EncoderImage] = lambda image: image,
) -> Pipeline:
    """The pipeline of one of ``num_processes`` that share the operator's bounds on decoding.

    Args:
        place: see :class:`Pipeline`.
    """
    decode_threads = -(-(config.decode_threads or usable_cores()) // num_processes)
    return Pipeline(
        core=core,
        info=facts.info,
        processor=facts.load_processor(limits_of(config)),
        keys=ContentKeys(facts.info.config_hash, facts.settings.hash()),
        decoded=Window(-(-config.max_decoded_bytes // num_processes)),
        header_threads=ThreadPoolExecutor(2, thread_name_prefix="header"),
        image_threads=image_threads(decode_threads),
        decodes_per_request=decode_threads,
        place=place,
    )
