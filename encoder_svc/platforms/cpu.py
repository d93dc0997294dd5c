"""The CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from encoder_svc.platforms.interface import Platform
from encoder_svc.platforms.probe import probe_cpu
from encoder_svc.platforms.selection import Rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from encoder_svc.platforms.backends import BackendSpec
    from encoder_svc.platforms.facts import Facts


class CpuPlatform(Platform):
    """Runs anywhere torch runs."""

    name = "cpu"

    def __init__(self, facts: Facts | None = None, *, backends: Mapping[str, BackendSpec] | None = None) -> None:
        super().__init__(facts or probe_cpu({}), backends=backends)

    @classmethod
    def probe(cls, index: int, environment: Mapping[str, str]) -> Facts:
        return probe_cpu(environment)

    def rule(self) -> Rule:
        return Rule(order=("TORCH_SDPA",), because="for every dtype and head size")

    def default_dtype(self) -> str:
        return "bfloat16" if self.facts.cpu_flags else "float32"
