"""A device as the engine sees it: it is given batches, and what comes out of each is waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from encoder_svc.images.types import EncoderImage


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What came out of a batch.

    Attributes:
        embeddings: the bytes of each image's [rows, width], of the tower's dtype; None where they hold NaN or infinity.
            They may be views of the batch's memory: see :meth:`encoder_svc.engine.runner.DeviceRunner.land_in`.
        h2d_s, forward_s, d2h_s: of the whole batch.
        resize_s: of what came as pixels.
        build_s: to pack it on the host; split_s: to cut it into images.
        padding_ratio: the share of the rows on the device that were padding, 0 to 1.
    """

    embeddings: list[memoryview | None]
    h2d_s: float
    forward_s: float
    d2h_s: float
    resize_s: float = 0.0
    build_s: float = 0.0
    split_s: float = 0.0
    padding_ratio: float = 0.0


class Submitted(Protocol):
    """A batch that was given to the device. Any thread may wait for it; what the device raised is raised there."""

    def wait_until_computed(self) -> None:
        """Blocks until the device works on it no longer; its embeddings may still be on their way to the host."""

    def wait(self) -> BatchResult:
        """Blocks until the batch is through."""


class Gaps(Protocol):
    """Where short jobs run beside a long batch of the same device; see engine/gaps.py."""

    def offer(self, job: Callable[[], None]) -> None:
        """``job`` runs in the next gap that is come to, if any is; it must not raise."""


class Runner(Protocol):
    """A device as the engine sees it."""

    @property
    def depth(self) -> int:
        """How many batches may be in flight; see engine/places.py."""

    @property
    def gaps(self) -> Gaps | None:
        """Where short batches may run while a long one does; None where they cannot."""

    def submit(self, images: Sequence[EncoderImage]) -> Submitted:
        """Gives a batch to the device. Only the device thread calls it. Raises what the device raised."""

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether ``error`` says that the batch did not fit the device's memory."""

    def is_broken(self) -> bool:
        """Whether the device answers nothing but errors any more. Only the device thread calls it."""
