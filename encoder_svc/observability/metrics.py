"""Prometheus metrics on a port of their own. So far: what is served, and which attention backend was chosen by whom."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from encoder_svc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

_BUILD_LABELS = ("model", "revision", "platform", "attn_backend", "attn_implementation", "attn_source")


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._build_info = Gauge(
            "encoder_build_info", "What this replica serves; always 1.", _BUILD_LABELS, registry=self.registry
        )

    def set_build_info(self, **labels: str) -> None:
        """Says what is served: model, revision, platform, attn_backend, attn_implementation, attn_source."""
        self._build_info.labels(**labels).set(1)


@contextmanager
def metrics_server(metrics: Metrics, host: str, port: int | None) -> Iterator[None]:
    """Serves ``/metrics`` on ``host`` while inside; nothing if ``port`` is None.

    Raises:
        ConfigError: the port is taken.
    """
    if port is None:
        yield
        return
    try:
        server, thread = start_http_server(port, addr=host, registry=metrics.registry)
    except OSError as error:
        raise ConfigError(f"--metrics-port {port}: cannot listen on {host} ({error.strerror}).") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
