"""AMD GPUs. Written from documentation: no AMD hardware was at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from encoder_svc.platforms.facts import USE_AITER, USE_AITER_MHA
from encoder_svc.platforms.interface import Platform
from encoder_svc.platforms.probe import probe_gpu
from encoder_svc.platforms.selection import Rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from encoder_svc.platforms.facts import Facts


class RocmPlatform(Platform):
    """One AMD device of this process. torch calls it cuda."""

    name = "rocm"

    @classmethod
    def probe(cls, index: int, environment: Mapping[str, str]) -> Facts:
        return probe_gpu(index, environment)

    def rule(self) -> Rule:
        return rocm_rule(self.facts)

    def default_dtype(self) -> str:
        return "bfloat16"


def rocm_rule(facts: Facts) -> Rule:
    """aiter where the operator switched it on, flash-attn on CDNA, SDPA on all else.

    On RDNA flash-attn comes by promotion: only its Triton build runs there.
    """
    gfx = facts.gfx or ""
    if not gfx.startswith("gfx9"):
        return Rule(order=("TORCH_SDPA",), because=gfx)
    if facts.switch(USE_AITER) and facts.switch(USE_AITER_MHA):
        return Rule(
            order=("ROCM_AITER_FA", "FLASH_ATTN", "TORCH_SDPA"),
            because=f"{gfx} with {USE_AITER} and {USE_AITER_MHA} on",
            settled=("ROCM_AITER_FA",),
        )
    return Rule(order=("FLASH_ATTN", "TORCH_SDPA"), because=f"{gfx} without both of {USE_AITER} and {USE_AITER_MHA} on")
