"""The config hash: one key over all that shapes a compiled artefact or a result.

Compile caches, captured graphs, tuning results and kept embeddings are all filed under it, so that none made with one
attention backend, dtype, device or version is ever used with another.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigFactors:
    """Everything that the hash covers.

    Attributes:
        backend, implementation, implementation_version: the attention Selection's.
        revision: of the model's weights.
        model_config: the encoder's dimensions and switches.
        windows: what takes the layers of windows, where it is not the backend.
        operations: what computes all beside attention, with its packages' versions.
        quantisation: of the weights; ``"none"`` where there is none.
        graph_buckets: patches of each captured graph; empty where none is captured.
        torch: its version.
        workflow: the modules of the family.
        processor: the hash over how images become patches.
        platform, device_name: where it runs.
    """

    backend: str
    implementation: str
    implementation_version: str
    dtype: str
    revision: str
    torch: str
    platform: str
    device_name: str
    windows: str = ""
    operations: str = "torch"
    quantisation: str = "none"
    graph_buckets: tuple[int, ...] = ()
    processor: str = ""
    workflow: Mapping[str, Any] = field(default_factory=dict)
    model_config: Mapping[str, Any] = field(default_factory=dict)

    def hash(self) -> str:
        """SHA-256, 64 hex digits. The same factors give the same hash in every process."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
