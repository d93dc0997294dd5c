"""A CPU's operations. Matrix products go to oneDNN with weights in oneDNN's own layout, and what follows a product is
done inside it; the rest runs in place, over stretches of patches that stay in the cores' caches.

The products are torch's own operators, those that torch.compile emits. They are called directly because compiling wants
a C++ compiler on the machine that serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import nn

from encoder_svc.models.ops import ACTIVATIONS, LinearWeights, MlpWeights, NormWeights, Ops, Rotary

if TYPE_CHECKING:
    from collections.abc import Sequence

# Stretches of patches, as measured on cores with 1 MiB of L2 each (docs/performance-cpu.md).
_NORM_ROWS = 256
_ROTARY_ROWS = 128
_ACTIVATION_ROWS = 128
_INTERPOLATED_ROWS = 128
# What an MLP makes of them, 5 MiB of bfloat16, is read again while it is in the last cache.
_PRODUCT_ROWS = 512
# oneDNN keeps a kernel for every number of rows it met, half a megabyte an image size: so it meets few.
_ROW_MULTIPLE = 16

QUICK_GELU_SLOPE: Final = 1.702
# An activation's name inside oneDNN, and its variant. Quick GELU has none.
_INSIDE_A_PRODUCT = {"gelu": ("gelu", "none"), "gelu_pytorch_tanh": ("gelu", "tanh"), "silu": ("swish", "")}


@dataclass(frozen=True, slots=True)
class _GatedWeights(MlpWeights):
    """``up`` makes the up values alone."""

    gate: LinearWeights


def takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and multiplies this dtype on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class CpuOps(Ops):
    """For dtypes that :func:`takes` names. Layers that were laid out give up their own weights."""

    name = "onednn"

    def lay_out_linear(self, linear: nn.Linear) -> LinearWeights:
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)  # not both in memory
        return LinearWeights(packed, linear.bias)

    def lay_out_mlp(self, norm: NormWeights, ups: Sequence[nn.Linear], down: nn.Linear, act: str) -> MlpWeights:
        *gates, up = (self.lay_out_linear(layer) for layer in ups)
        if gates:
            return _GatedWeights(norm, up, self.lay_out_linear(down), act, gated=True, gate=gates[0])
        return MlpWeights(norm, up, self.lay_out_linear(down), act, gated=False)

    def norm(self, x_NC: torch.Tensor, weights: NormWeights) -> torch.Tensor:
        if weights.bias is not None:
            return super().norm(x_NC, weights)
        # torch's own RMSNorm is seven passes over float32 copies of the whole.
        weight = weights.weight.float()
        normed_NC = torch.empty_like(x_NC)
        for x, normed in zip(x_NC.split(_NORM_ROWS), normed_NC.split(_NORM_ROWS), strict=True):
            lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            scales = lengths.square_().div_(x.shape[-1]).add_(weights.eps).rsqrt_()
            torch.mul(x * scales, weight, out=normed)
        return normed_NC

    def linear(self, x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        products = [_product(_padded(rows), weights)[: len(rows)] for rows in x.split(_PRODUCT_ROWS)]
        return products[0] if len(products) == 1 else torch.cat(products)

    def rotate_(self, qkv_N3HD: torch.Tensor, rotary: Rotary) -> None:
        stretches = (tensor.split(_ROTARY_ROWS) for tensor in (qkv_N3HD[:, :2], *rotary))
        for qk, cos, sin in zip(*stretches, strict=True):
            cos_N11F, sin_N11F = cos[:, None, None], sin[:, None, None]
            first, second = qk.chunk(2, dim=-1)
            rotated_first = (first * cos_N11F).addcmul_(second.float(), sin_N11F, value=-1)
            rotated_second = (second * cos_N11F).addcmul_(first.float(), sin_N11F)
            first.copy_(rotated_first)
            second.copy_(rotated_second)

    def add_interpolated_(
        self, hidden_NC: torch.Tensor, table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> None:
        stretches = (tensor.split(_INTERPOLATED_ROWS) for tensor in (hidden_NC, indices, weights))
        for hidden, some_indices, some_weights in zip(*stretches, strict=True):
            super().add_interpolated_(hidden, table, some_indices, some_weights)

    def add_linear_(self, hidden_NC: torch.Tensor, x: torch.Tensor, weights: LinearWeights) -> None:
        for hidden, stretch in zip(hidden_NC.split(_PRODUCT_ROWS), x.split(_PRODUCT_ROWS), strict=True):
            sums = _combined_product(_padded(stretch), weights, _padded(hidden), "add")
            hidden.copy_(sums[: len(hidden)])

    def add_mlp_(self, hidden_NC: torch.Tensor, mlp: MlpWeights) -> None:
        for hidden in hidden_NC.split(_PRODUCT_ROWS):
            padded = _padded(hidden)
            sums = _combined_product(self._up(self.norm(padded, mlp.norm), mlp), mlp.down, padded, "add")
            hidden.copy_(sums[: len(hidden)])

    def activate_(self, values_NI: torch.Tensor, act: str) -> None:
        """An activation that oneDNN does not know, in place."""
        for stretch in values_NI.split(_ACTIVATION_ROWS):
            if act == "quick_gelu":
                stretch.mul_((stretch * QUICK_GELU_SLOPE).sigmoid_())
            else:
                stretch.copy_(ACTIVATIONS[act](stretch))

    def _up(self, x: torch.Tensor, mlp: MlpWeights) -> torch.Tensor:
        """What an MLP's last layer reads."""
        if isinstance(mlp, _GatedWeights):
            return _combined_product(x, mlp.up, self._activated_product(x, mlp.gate, mlp.act), "mul")
        return self._activated_product(x, mlp.up, mlp.act)

    def _activated_product(self, x: torch.Tensor, weights: LinearWeights, act: str) -> torch.Tensor:
        """``act(x Wᵀ + b)``."""
        if act in _INSIDE_A_PRODUCT:
            return _product(x, weights, *_INSIDE_A_PRODUCT[act])
        values = _product(x, weights)
        self.activate_(values, act)
        return values


def _padded(x: torch.Tensor) -> torch.Tensor:
    """With rows of zeros up to a multiple; itself where it is one."""
    missing = -len(x) % _ROW_MULTIPLE
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _product(x: torch.Tensor, weights: LinearWeights, act: str = "none", variant: str = "") -> torch.Tensor:
    """``act(x Wᵀ + b)``, the activation one of oneDNN's."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weights.weight, weights.bias, act, [], variant)
    return product


def _combined_product(x: torch.Tensor, weights: LinearWeights, other: torch.Tensor, how: str) -> torch.Tensor:
    """``x Wᵀ + b`` and ``other`` added or multiplied, before anything is rounded."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weights.weight, weights.bias, how)
    return product
