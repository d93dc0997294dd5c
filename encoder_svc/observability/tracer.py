"""The tracer that an operator asked for, if OpenTelemetry is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from encoder_svc.config import tracing_variables
from encoder_svc.errors import ConfigError

if TYPE_CHECKING:
    from encoder_svc.config import Config
    from encoder_svc.observability.tracing import OpenTelemetryTracer


def make_tracer(config: Config) -> OpenTelemetryTracer | None:
    """None, unless ``--tracing`` is on.

    Raises:
        ConfigError: OpenTelemetry is not installed, nor the exporter that its variables name, or it takes no such ones.
    """
    if not config.tracing:
        return None
    try:
        from encoder_svc.observability.tracing import OpenTelemetryTracer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--tracing: needs the package {error.name}: pip install 'encoder-svc[tracing]' — or, from a clone, "
            "pip install -e '.[tracing]'."
        ) from None
    return OpenTelemetryTracer(tracing_variables())
