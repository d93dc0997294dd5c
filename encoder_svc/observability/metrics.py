"""Prometheus metrics on a port of their own. So far: what is served, and which attention backend was chosen by whom."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge

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
