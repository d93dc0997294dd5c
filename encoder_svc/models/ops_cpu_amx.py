"""A CPU's operations where products are ours too, with AMX: norms and activations write what the next product reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from encoder_svc.models.amx_products import SIGMOIDS, AmxProducts
from encoder_svc.models.ops import LinearWeights, MlpWeights, NormWeights
from encoder_svc.models.ops_cpu_kernels import CpuKernelOps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encoder_svc.attention.cpu_kernels import CpuKernels
    from encoder_svc.models.ops import QkvWeights, Rotary

# Whose MLP's inner values, 10 MiB, are read again while they are in the last cache.
_ROWS: Final = 1024


@dataclass(frozen=True, slots=True)
class _GatedWeights(MlpWeights):
    """``up`` has gate's and up's panels by turns, and up's bias."""

    gate_bias: torch.Tensor


class AmxOps(CpuKernelOps):
    """For bfloat16 on CPUs with AMX. Layers that were laid out give up their own weights."""

    name = "amx_bf16"

    def __init__(self, kernels: CpuKernels, products: AmxProducts) -> None:
        super().__init__(kernels)
        self._products = products

    def lay_out_linear(self, linear: nn.Linear) -> LinearWeights:
        panels = self._products.panels(linear.weight.detach())
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)  # not both in memory
        return LinearWeights(panels, bias)

    def lay_out_mlp(self, norm: NormWeights, ups: Sequence[nn.Linear], down: nn.Linear, act: str) -> MlpWeights:
        if act not in SIGMOIDS:
            raise ValueError(f"its activations are {', '.join(SIGMOIDS)}, not {act}")
        *gates, up = (self.lay_out_linear(layer) for layer in ups)
        if not gates:
            return MlpWeights(norm, up, self.lay_out_linear(down), act, gated=False)
        by_turns = LinearWeights(torch.stack([gates[0].weight, up.weight], dim=1), up.bias)
        return _GatedWeights(norm, by_turns, self.lay_out_linear(down), act, gated=True, gate_bias=gates[0].bias)

    def linear(self, x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        return self._product(self._products.blocks(x), len(x), weights)

    def rotated_qkv(self, x_NC: torch.Tensor, weights: QkvWeights, rotary: Rotary) -> torch.Tensor:
        head_size = len(weights.linear.bias) // (3 * weights.num_heads)
        qkv_N3HD = x_NC.new_empty(len(x_NC), 3, weights.num_heads, head_size)
        linear, rotates = weights.linear, self._products.rotates(head_size)
        stretches = (tensor.split(_ROWS) for tensor in (x_NC, qkv_N3HD, *rotary))
        for x, qkv, cos, sin in zip(*stretches, strict=True):
            blocks = self._normed(x, weights.norm)
            if rotates:
                self._products.multiply_rotated(blocks, linear.weight, linear.bias, qkv, cos, sin)
            else:
                self._products.multiply(blocks, linear.weight, linear.bias, qkv, len(x))
                self.rotate_(qkv, (cos, sin))
        return qkv_N3HD

    def add_linear_(self, hidden_NC: torch.Tensor, x: torch.Tensor, weights: LinearWeights) -> None:
        for hidden, some in zip(hidden_NC.split(_ROWS), x.split(_ROWS), strict=True):
            blocks = self._products.blocks(some)
            self._products.multiply(blocks, weights.weight, weights.bias, hidden, len(hidden), add=True)

    def add_mlp_(self, hidden_NC: torch.Tensor, mlp: MlpWeights) -> None:
        gate_bias = mlp.gate_bias if isinstance(mlp, _GatedWeights) else None
        for hidden in hidden_NC.split(_ROWS):
            inner = self._products.empty_blocks(len(hidden), len(mlp.up.bias))
            self._products.multiply(
                self._normed(hidden, mlp.norm),
                mlp.up.weight,
                mlp.up.bias,
                inner,
                len(hidden),
                gate_bias_O=gate_bias,
                act=mlp.act,
                in_blocks=True,
            )
            self._products.multiply(inner, mlp.down.weight, mlp.down.bias, hidden, len(hidden), add=True)

    def _normed(self, x_NC: torch.Tensor, norm: NormWeights) -> torch.Tensor:
        """In blocks."""
        blocks = self._products.empty_blocks(*x_NC.shape)
        self._kernels.norm_to_blocks(x_NC, norm.weight, norm.bias, norm.eps, blocks)
        return blocks

    def _product(self, blocks: torch.Tensor, num_rows: int, weights: LinearWeights) -> torch.Tensor:
        out = torch.empty(num_rows, len(weights.bias), dtype=torch.bfloat16)
        self._products.multiply(blocks, weights.weight, weights.bias, out, num_rows)
        return out
