"""``--quantization fp8``: matrix products on e4m3, each row of the input and of the weights with a scale of its own.

Inputs are quantised where they are made, inside the norm and the activation; products add up in float32. The first and
the last block stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from encoder_svc.models.ops import LinearWeights, MlpWeights, NormWeights, Ops
from encoder_svc.models.ops_triton import E4M3_MAX, TritonOps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


class Fp8Ops(TritonOps):
    """bf16 outside the products.

    Args:
        edge: of the first and the last block, and of all else.
    """

    name = "fp8"

    def __init__(self, device: torch.device, edge: Ops) -> None:
        super().__init__(device)
        self._edge = edge

    def of_block(self, index: int, depth: int) -> Ops:
        return self._edge if index in (0, depth - 1) else self

    def lay_out_linear(self, linear: nn.Linear) -> LinearWeights:
        return quantised(LinearWeights(linear.weight, linear.bias))

    def lay_out_mlp(self, norm: NormWeights, ups: Sequence[nn.Linear], down: nn.Linear, act: str) -> MlpWeights:
        mlp = super().lay_out_mlp(norm, ups, down, act)
        if mlp.up.scales is not None:
            return mlp
        return MlpWeights(norm, quantised(mlp.up), quantised(mlp.down), act, gated=mlp.gated)

    def norm_linear(self, x_NC: torch.Tensor, norm: NormWeights, linear: LinearWeights) -> torch.Tensor:
        return _product(*self._norm_quantised(x_NC, norm), linear, linear.bias, x_NC.dtype)

    def add_linear_(self, hidden_NC: torch.Tensor, x: torch.Tensor, weights: LinearWeights) -> None:
        values, scales = empty_quantised(x)
        self._kernel_activate(values, scales, x, None, "none", gated=False)
        hidden_NC += _product(values, scales, weights, None, hidden_NC.dtype)

    def add_mlp_(self, hidden_NC: torch.Tensor, mlp: MlpWeights) -> None:
        # The bias is added with the activation: in this product's epilogue it takes a fifth of the product's time.
        x = _product(*self._norm_quantised(hidden_NC, mlp.norm), mlp.up, None, hidden_NC.dtype)
        values, scales = empty_quantised(x[:, : mlp.down.weight.shape[1]])
        self.activate_into(values, scales, x, mlp.up.bias, mlp)
        hidden_NC += _product(values, scales, mlp.down, None, hidden_NC.dtype)

    def _norm_quantised(self, x_NC: torch.Tensor, norm: NormWeights) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = empty_quantised(x_NC)
        self.norm_into(values, scales, x_NC, norm)
        return values, scales


def empty_quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return values, torch.empty((len(x), 1), dtype=torch.float32, device=x.device)


def quantised(linear: LinearWeights) -> LinearWeights:
    weight = linear.weight.float()
    scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return LinearWeights((weight / scales).to(torch.float8_e4m3fn), linear.bias, scales.t().contiguous())


def _product(
    values: torch.Tensor, scales: torch.Tensor, linear: LinearWeights, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    assert linear.scales is not None
    return torch._scaled_mm(
        values, linear.weight.t(), scales, linear.scales, bias=bias, out_dtype=dtype, use_fast_accum=True
    )
