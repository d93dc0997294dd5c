"""NVIDIA GPUs."""

from __future__ import annotations

from encoder_svc.errors import ConfigError
from encoder_svc.platforms.interface import Platform


class CudaPlatform(Platform):
    """One CUDA device of this process."""

    name = "cuda"

    def __init__(self, index: int = 0) -> None:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if index >= count:
            raise ConfigError(f"--device cuda:{index}: this process sees {count} CUDA devices.")
        self.index = index

    def supported_vit_attn_backends(self) -> tuple[str, ...]:
        return ("TORCH_SDPA", "TORCH_NAIVE")

    def default_dtype(self) -> str:
        return "bfloat16"

    def device_name(self) -> str:
        import torch

        return torch.cuda.get_device_name(self.index)
