"""How late the event loop is: a timer that measures by how much it was missed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from encoder_svc.observability.metrics import Metrics

_INTERVAL_S: Final = 0.05


async def probe_loop_lag(metrics: Metrics) -> None:
    """Observes the loop that it runs on, twenty times a second, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + _INTERVAL_S
        await asyncio.sleep(_INTERVAL_S)
        metrics.loop_lag(max(loop.time() - due_s, 0.0))
