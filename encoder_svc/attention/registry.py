"""From a backend's entry to its class. What the backends are and need is in :mod:`encoder_svc.platforms.backends`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from encoder_svc.attention.base import AttentionBackend
    from encoder_svc.platforms import BackendSpec


def load_backend(spec: BackendSpec) -> type[AttentionBackend]:
    """The class of a backend. It is imported now, when it is first asked for."""
    module, _, attribute = spec.cls.partition(":")
    backend: type[AttentionBackend] = getattr(importlib.import_module(module), attribute)
    return backend
