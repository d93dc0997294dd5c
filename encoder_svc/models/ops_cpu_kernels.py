"""A CPU's operations where our own kernels run: what lies between the products takes one pass each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from encoder_svc.models.ops_cpu import QUICK_GELU_SLOPE, CpuOps

if TYPE_CHECKING:
    import torch

    from encoder_svc.attention.cpu_kernels import CpuKernels
    from encoder_svc.models.ops import NormWeights, Rotary


class CpuKernelOps(CpuOps):
    """For bfloat16 where there are kernels for this CPU."""

    name = "onednn and avx512_bf16"

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels

    def norm(self, x_NC: torch.Tensor, weights: NormWeights) -> torch.Tensor:
        if weights.bias is None:
            return self._kernels.rms_norm(x_NC, weights.weight, weights.eps)
        return self._kernels.layer_norm(x_NC, weights.weight, weights.bias, weights.eps)

    def rotate_(self, qkv_N3HD: torch.Tensor, rotary: Rotary) -> None:
        self._kernels.rotate_(qkv_N3HD, *rotary)

    def activate_(self, values_NI: torch.Tensor, act: str) -> None:
        if act == "quick_gelu":
            self._kernels.gate_(values_NI, QUICK_GELU_SLOPE)
        else:
            super().activate_(values_NI, act)
