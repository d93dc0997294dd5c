"""The stages of one image's way through the service. Each begins where the one before it ended, on one clock, so that
together they are the time from the request's arrival to the image's last byte."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """Seconds that one image spent in each stage, in the order in which it meets them; 0 where it never was.

    Attributes:
        admission_s: limits, budgets, headers and content keys of the whole request.
        window_s: until the images of the same request before it left room (``--request-window-patches``).
        shared_s: until another caller, who came first with the same image, had it encoded. Takes the place of the
            stages from here to ``collect``, that one included.
        decode_wait_s: until a thread was free to decode it.
        decode_s: bytes to pixels.
        resize_s: pixels to patches. On the device, with ``--image-processing device``: of the whole batch, after h2d.
        queue_s: until its batch began.
        build_s: its batch was packed on the host.
        device_wait_s: its batch had been given to the device, which was at another, or a thread was waited for.
        h2d_s, forward_s, d2h_s: of the whole batch; by device events on a GPU.
        collect_s: cut out of its batch, and whoever waits for it was told.
        send_wait_s: until the images of the same request before it had been written.
        send_s: written, as fast as the caller reads.
    """

    admission_s: float = 0.0
    window_s: float = 0.0
    shared_s: float = 0.0
    decode_wait_s: float = 0.0
    decode_s: float = 0.0
    resize_s: float = 0.0
    queue_s: float = 0.0
    build_s: float = 0.0
    device_wait_s: float = 0.0
    h2d_s: float = 0.0
    forward_s: float = 0.0
    d2h_s: float = 0.0
    collect_s: float = 0.0
    send_wait_s: float = 0.0
    send_s: float = 0.0

    def items(self) -> list[tuple[str, float]]:
        """Each stage's name, without ``_s``, and its seconds, in order."""
        return [(name, getattr(self, field_name)) for name, field_name in _FIELDS]


_FIELDS: Final = tuple((entry.name.removesuffix("_s"), entry.name) for entry in fields(Stages))
STAGES: Final = tuple(name for name, _ in _FIELDS)
"""The stages' names, in order: the values of the label ``stage``."""
