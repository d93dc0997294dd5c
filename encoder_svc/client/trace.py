"""The caller's trace context, where OpenTelemetry is installed in its process."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


def trace_metadata() -> tuple[tuple[str, str], ...] | None:
    """What gRPC is to send along so that the server's spans become children of the span that is current here: the
    headers of the process's propagators, W3C trace context by default. None where nothing traces."""
    inject = _inject()
    if inject is None:
        return None
    carrier: dict[str, str] = {}
    inject(carrier)
    # gRPC refuses a key in capitals, which some propagators write.
    return tuple((key.lower(), value) for key, value in carrier.items()) or None


@cache
def _inject() -> Callable[[dict[str, str]], Any] | None:
    try:
        from opentelemetry.propagate import inject
    except ModuleNotFoundError:
        return None
    except Exception as error:  # it loads the propagators that OTEL_PROPAGATORS names, and raises what they raise
        logger.warning("No trace context is sent: OpenTelemetry's propagators cannot be loaded (%s).", error)
        return None
    return inject
