"""NVIDIA GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from encoder_svc.platforms.interface import Platform
from encoder_svc.platforms.probe import probe_gpu
from encoder_svc.platforms.selection import Rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from encoder_svc.platforms.facts import Facts

_AMPERE = (8, 0)


class CudaPlatform(Platform):
    """One CUDA device of this process."""

    name = "cuda"

    @classmethod
    def probe(cls, index: int, environment: Mapping[str, str]) -> Facts:
        return probe_gpu(index, environment)

    def rule(self) -> Rule:
        return cuda_rule(self.facts)

    def default_dtype(self) -> str:
        return "bfloat16" if _capability(self.facts) >= _AMPERE else "float16"


def cuda_rule(facts: Facts) -> Rule:
    """FLASH_ATTN wherever it takes dtype and head size; what it cannot take, our own kernel does."""
    major, minor = _capability(facts)
    because = f"compute capability {major}.{minor}"
    if (major, minor) >= _AMPERE:
        return Rule(order=("FLASH_ATTN", "TRITON_ATTN", "TORCH_SDPA"), because=because)
    return Rule(order=("XFORMERS", "TORCH_SDPA"), because=because)


def _capability(facts: Facts) -> tuple[int, int]:
    assert facts.capability is not None, "a CUDA device's facts have a capability"
    return facts.capability
