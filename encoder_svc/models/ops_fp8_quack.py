"""``--quantization fp8`` on Hopper with quack-kernels: the products that read a norm are on e4m3, q, k and v and the
MLP's first, and rotate and activate before they store as bf16's do.

The MLP's last product is on e4m3 too where the first can store what it reads, which a gated one cannot: in a range that
no input leaves, so that no pass looks for each row's largest value. Attention's projection stays in bf16: it is short,
and e4m3 costs there as much accuracy as in the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from encoder_svc.models.ops import LinearWeights, MlpWeights
from encoder_svc.models.ops_fp8 import empty_quantised, quantised
from encoder_svc.models.ops_quack import QuackOps, epilogue_of
from encoder_svc.models.ops_triton import E4M3_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from encoder_svc.models.ops import NormWeights, Ops

# Sums stay in the tensor cores' own accumulators, of 14 bits, as with use_fast_accum.
_FAST_SUMS: Final = (("fp8_slow_accum", False),)
# What rounding may add to a bound: each factor is off by up to 6 %.
_ROUNDED: Final = 1.13


@dataclass(frozen=True, slots=True)
class _ShrunkWeights(MlpWeights):
    """What ``down`` reads is multiplied by ``shrink``, which its scales take back."""

    shrink: float


class QuackFp8Ops(QuackOps):
    """bf16 outside the quantised products.

    Args:
        edge: of the first and the last block, and of all else.
    """

    name = "fp8_quack"

    def __init__(self, device: torch.device, edge: Ops) -> None:
        super().__init__(device)
        self._edge = edge

    def of_block(self, index: int, depth: int) -> Ops:
        return self._edge if index in (0, depth - 1) else self

    def lay_out_mlp(self, norm: NormWeights, ups: Sequence[nn.Linear], down: nn.Linear, act: str) -> MlpWeights:
        """
        Raises:
            ValueError: there is no epilogue for this activation.
        """
        mlp = super().lay_out_mlp(norm, ups, down, act)
        if not hasattr(self._epilogues, f"scaled_{epilogue_of(mlp)}"):
            raise ValueError(f"no product ends in {epilogue_of(mlp)}")
        if mlp.gated:
            return mlp
        shrink = E4M3_MAX / (_ROUNDED * largest_output(norm, ups[0]))
        weight, bias, scales, _ = quantised(mlp.down)
        assert scales is not None
        return _ShrunkWeights(
            norm, mlp.up, LinearWeights(weight, bias, scales / shrink), act, gated=False, shrink=shrink
        )

    def add_mlp_(self, hidden_NC: torch.Tensor, mlp: MlpWeights) -> None:
        if not isinstance(mlp, _ShrunkWeights):
            super().add_mlp_(hidden_NC, mlp)
            return
        x = self._normed_product(
            epilogue_of(mlp), hidden_NC, mlp.norm, mlp.up, {"shrink": mlp.shrink}, torch.float8_e4m3fn
        )
        assert mlp.down.scales is not None
        columns = {"columns": mlp.down.scales}
        self._run("scaled_added", x, mlp.down.weight, hidden_NC, hidden_NC, columns, _FAST_SUMS)

    def _lay_out_normed(self, norm: NormWeights, linear: LinearWeights) -> LinearWeights:
        return quantised(linear)

    def _normed_product(
        self,
        epilogue: str,
        x: torch.Tensor,
        norm: NormWeights,
        weights: LinearWeights,
        operands: Mapping[str, torch.Tensor | float],
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        values, scales = empty_quantised(x)
        self.norm_into(values, scales, x, norm)
        assert weights.scales is not None
        operands = {**operands, "rows": scales.view(1, -1), "columns": weights.scales}
        return self._product(f"scaled_{epilogue}", values, weights, operands, dtype or x.dtype, _FAST_SUMS)


def largest_output(norm: NormWeights, linear: nn.Linear) -> float:
    """A bound on what ``linear`` makes of any normed row, and on what an activation leaves of it: a row that is not
    weighted yet is at most as long as the root of its width."""
    weight, bias = linear.weight.float(), linear.bias.float()
    if norm.bias is not None:
        bias = bias + weight @ norm.bias.float()
    lengths = (weight * norm.weight.float()).norm(dim=1) * weight.shape[1] ** 0.5
    return float((lengths + bias.abs()).max())
