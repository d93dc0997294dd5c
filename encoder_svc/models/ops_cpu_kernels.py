"""A CPU's operations where our own kernels run: what lies between the products takes one pass each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from encoder_svc.models.ops_cpu import PRODUCT_ROWS, QUICK_GELU_SLOPE, CpuOps, padded, product

if TYPE_CHECKING:
    import torch

    from encoder_svc.attention.cpu_kernels import CpuKernels
    from encoder_svc.models.ops import NormWeights, QkvWeights, Rotary


class CpuKernelOps(CpuOps):
    """For bfloat16 where there are kernels for this CPU."""

    name = "onednn and avx512_bf16"

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels

    def norm(self, x_NC: torch.Tensor, weights: NormWeights) -> torch.Tensor:
        if weights.bias is None:
            return self._kernels.rms_norm(x_NC, weights.weight, weights.eps)
        return self._kernels.layer_norm(x_NC, weights.weight, weights.bias, weights.eps)

    def rotated_qkv(self, x_NC: torch.Tensor, norm: NormWeights, weights: QkvWeights, rotary: Rotary) -> torch.Tensor:
        shape = (3, weights.num_heads, len(weights.linear.bias) // (3 * weights.num_heads))
        qkv_N3HD = x_NC.new_empty(len(x_NC), *shape)
        stretches = (tensor.split(PRODUCT_ROWS) for tensor in (x_NC, qkv_N3HD, *rotary))
        for x, qkv, cos, sin in zip(*stretches, strict=True):
            made = product(self.norm(padded(x), norm), weights.linear)
            self._kernels.rotate(made[: len(x)].unflatten(1, shape), cos, sin, qkv)
        return qkv_N3HD

    def rotate_(self, qkv_N3HD: torch.Tensor, rotary: Rotary) -> None:
        self._kernels.rotate(qkv_N3HD, *rotary, qkv_N3HD)

    def activate_(self, values_NI: torch.Tensor, act: str) -> None:
        if act == "quick_gelu":
            self._kernels.gate_(values_NI, QUICK_GELU_SLOPE)
        else:
            super().activate_(values_NI, act)
