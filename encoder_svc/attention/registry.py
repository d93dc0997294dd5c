"""Backend names and where their classes live. A backend is imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from encoder_svc.attention.base import AttentionBackend

_BACKENDS = {
    "TORCH_SDPA": "encoder_svc.attention.torch_sdpa:TorchSdpa",
    "TORCH_NAIVE": "encoder_svc.attention.torch_naive:TorchNaive",
}


def load_backend(name: str) -> type[AttentionBackend]:
    """The class of a backend, by its upper-case name."""
    module, _, attribute = _BACKENDS[name].partition(":")
    backend: type[AttentionBackend] = getattr(importlib.import_module(module), attribute)
    return backend
