"""What the load generator saw, in bounded memory. ``encoder_svc.bench`` says what is counted."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Final

from encoder_svc.bench.samples import Samples
from encoder_svc.client.types import StageTimings

if TYPE_CHECKING:
    from encoder_svc.client.types import EncodedImage
    from encoder_svc.errors import RequestError

STAGES: Final = tuple(entry.name for entry in fields(StageTimings))

_MAX_TIMELINE_BINS = 240
_MIN_BIN_S = 0.25
_MAX_ERROR_KINDS = 256


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """What errors are counted by.

    Attributes:
        scope: ``request`` if the call failed as a whole, ``image`` if one image of it did.
        code: name of the gRPC status.
        reason: stable, upper case.
    """

    scope: str
    code: str
    reason: str


_OTHER_KINDS = ErrorKind("any", "UNKNOWN", "OTHER")


@dataclass(kw_only=True, slots=True)
class Exchange:
    """One request and what has come back so far. Times in seconds of one monotonic clock.

    Attributes:
        due_s: when it was to be sent.
        sent_s: when it was.
        first_s: when its first image was complete.
        ended_s: when its answer was.
        num_images: in the request.
        num_encoded: images that succeeded.
        errors: of its images and, last, of the call.
    """

    due_s: float
    sent_s: float
    num_images: int
    first_s: float | None = None
    ended_s: float = math.nan
    num_encoded: int = 0
    errors: list[RequestError] = field(default_factory=list)


class Recorder:
    """Takes images as they arrive and requests as they end.

    Args:
        began_s: when the load began, with its warm-up.
        window_starts_s, window_ends_s: what is measured.
        timeout_s: a request that takes longer does not count as goodput.
    """

    def __init__(self, *, began_s: float, window_starts_s: float, window_ends_s: float, timeout_s: float) -> None:
        self.window_starts_s = window_starts_s
        self.window_ends_s = window_ends_s
        self._began_s = began_s
        self._timeout_s = timeout_s
        # Requests due in the window.
        self.num_succeeded = self.num_partly_failed = self.num_failed = self.num_unfinished = self.num_not_sent = 0
        self.num_images_encoded = self.num_images_failed = 0
        self.errors: Counter[ErrorKind] = Counter()
        self.latency_s, self.first_embedding_s, self.failure_latency_s = Samples(), Samples(), Samples()
        self.send_lag_s, self.retry_after_s = Samples(), Samples()
        # What arrived in the window.
        self.num_requests_ended = self.num_images = self.num_patches = self.num_rows = self.num_bytes = 0
        self.num_good_images = 0
        self.stages_s = {stage: Samples() for stage in STAGES}
        # From the start to the window's end.
        length_s = max(window_ends_s - began_s, _MIN_BIN_S)
        self.bin_s = max(_MIN_BIN_S, length_s / _MAX_TIMELINE_BINS)
        self.images_by_bin = [0] * math.ceil(length_s / self.bin_s)
        self.errors_by_bin = [0] * len(self.images_by_bin)

    @property
    def window_s(self) -> float:
        """Length of the window in seconds, 0 if the run was interrupted before it."""
        return max(0.0, self.window_ends_s - self.window_starts_s)

    def image(self, image: EncodedImage, now_s: float) -> None:
        """One image's embeddings are complete."""
        self._count_in_bin(self.images_by_bin, now_s)
        if not self._in_window(now_s):
            return
        t, h, w = image.grid_thw
        self.num_images += 1
        self.num_patches += t * h * w
        self.num_rows += image.embeddings.shape[0]
        self.num_bytes += image.embeddings.nbytes
        for stage in STAGES:
            self.stages_s[stage].add(getattr(image.timings, stage))

    def ended(self, exchange: Exchange) -> None:
        """A request's answer is complete, or the request failed."""
        latency_s = exchange.ended_s - exchange.due_s
        succeeded = exchange.num_encoded == exchange.num_images and not exchange.errors
        for _ in exchange.errors:
            self._count_in_bin(self.errors_by_bin, exchange.ended_s)
        if self._in_window(exchange.ended_s) and succeeded:
            self.num_requests_ended += 1
            if latency_s <= self._timeout_s:
                self.num_good_images += exchange.num_encoded
        if not self._in_window(exchange.due_s):
            return
        self.send_lag_s.add(exchange.sent_s - exchange.due_s)
        self.num_images_encoded += exchange.num_encoded
        self.num_images_failed += exchange.num_images - exchange.num_encoded
        if succeeded:
            assert exchange.first_s is not None
            self.num_succeeded += 1
            self.latency_s.add(latency_s)
            self.first_embedding_s.add(exchange.first_s - exchange.due_s)
            return
        self.num_partly_failed += exchange.num_encoded > 0
        self.num_failed += exchange.num_encoded == 0
        self.failure_latency_s.add(latency_s)
        for error in exchange.errors:
            self._count_error(error)

    def unfinished(self, exchange: Exchange) -> None:
        """The run was interrupted while this request ran."""
        self.num_unfinished += self._in_window(exchange.due_s)

    def not_sent(self, due_s: float) -> None:
        """A request was due while too many were outstanding."""
        self.num_not_sent += self._in_window(due_s)

    def interrupt(self, now_s: float) -> None:
        """The run ends here: so does the window."""
        self.window_ends_s = min(self.window_ends_s, now_s)
        num_bins = math.ceil((self.window_ends_s - self._began_s) / self.bin_s)
        del self.images_by_bin[num_bins:], self.errors_by_bin[num_bins:]

    def _in_window(self, time_s: float) -> bool:
        return self.window_starts_s <= time_s < self.window_ends_s

    def _count_error(self, error: RequestError) -> None:
        kind = ErrorKind("request" if error.image_index is None else "image", error.code, str(error.reason))
        if kind not in self.errors and len(self.errors) >= _MAX_ERROR_KINDS:
            kind = _OTHER_KINDS
        self.errors[kind] += 1
        if error.retry_after_s is not None:
            self.retry_after_s.add(error.retry_after_s)

    def _count_in_bin(self, bins: list[int], now_s: float) -> None:
        place = int((now_s - self._began_s) / self.bin_s)
        if place < len(bins):
            bins[place] += 1
