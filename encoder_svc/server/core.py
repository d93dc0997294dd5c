"""What a replica has one of, however many processes answer its calls: admission, kept embeddings, the device.

The servicer asks a :class:`Core` and does not know whether it is in its own process (server/local_core.py) or in that
of the device (server/frontends/remote.py). Nothing here knows the wire, or what an image was before it was decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from encoder_svc.errors import RequestError
    from encoder_svc.images.types import EncoderImage, GridThw
    from encoder_svc.observability.stages import Stages


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Embeddings:
    """One image's embeddings, as the cache keeps them: ``data`` is [rows, width] of the tower's dtype. Whoever reads
    ``data`` holds on to this: its memory is counted for so long."""

    grid: GridThw
    data: memoryview

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
        """Lets a request in, before its images are looked at. To be closed. Where there is plenty of room a core in
        another process may leave that to the reservation, which refuses it then.

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
            RequestError: QUEUE_FULL or DEADLINE_EXCEEDED; or as :meth:`Core.admit`, if that was left to this.
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
