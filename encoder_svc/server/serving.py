"""How requests are served."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """See the options of the same names in config.py."""

    request_window_patches: int
    send_timeout_s: float
    lease_s: float
    max_lease_s: float
