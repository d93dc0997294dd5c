"""The CPU."""

from __future__ import annotations

import platform as host

from encoder_svc.platforms.interface import Platform


class CpuPlatform(Platform):
    """Runs anywhere torch runs."""

    name = "cpu"

    def supported_vit_attn_backends(self) -> tuple[str, ...]:
        return ("TORCH_SDPA", "TORCH_NAIVE")

    def default_dtype(self) -> str:
        return "float32"

    def device_name(self) -> str:
        return host.processor() or host.machine()
