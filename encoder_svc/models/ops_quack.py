"""Operations of a Hopper GPU with quack-kernels, which flash-attn-4 brings: rotation and activation inside the matrix
products that make what is rotated and activated.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F

from encoder_svc.models.ops import LinearWeights, MlpWeights, NormWeights, QkvWeights, Rotary
from encoder_svc.models.ops_triton import TritonOps
from encoder_svc.models.quack_tiles import best_tile
from encoder_svc.platforms.torch_compiler import compiler_left_out

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

# Where quack's product is the faster one for sums onto a residual, in patches (docs/performance-gpu.md); and only where
# the sum is not much longer than a row.
_MIN_ROWS_ADDED: Final = 8_192
_MAX_INPUTS_AN_OUTPUT: Final = 2
# By what fraction an epilogue slows the largest tiles down. Those of fp8 were not swept.
STRAINS: Final = {"rotated": 0.1, "gelu_pytorch_tanh": 0.04, "quick_gelu": 0.04, "silu_gated": 0.04}
# How the names of epilogues end that make one value of two.
_GATED: Final = "_gated"


class QuackOps(TritonOps):
    """fp16 and bf16.

    Args:
        rotates_in_product: q and k leave :meth:`rotated_qkv`'s product rotated. The rows of their weights are then
            reordered so that the two values of each pair are neighbours.
    """

    name = "quack"

    def __init__(self, device: torch.device, *, rotates_in_product: bool = True) -> None:
        super().__init__(device)
        with compiler_left_out():
            from encoder_svc.models import quack_epilogues
        self._epilogues: Any = quack_epilogues
        self._num_sms: int = torch.cuda.get_device_properties(device).multi_processor_count
        self._rotates_in_product = rotates_in_product

    def lay_out_qkv(
        self, norm: NormWeights, qkv: nn.Linear, num_heads: int, inverse_frequencies: torch.Tensor
    ) -> QkvWeights:
        if not self._rotates_in_product:
            return super().lay_out_qkv(norm, qkv, num_heads, inverse_frequencies)
        weight, bias = (_pairs_side_by_side(values.detach(), num_heads) for values in (qkv.weight, qkv.bias))
        head_size = len(weight) // (3 * num_heads)
        turns = _turns(inverse_frequencies, num_heads, head_size)
        return QkvWeights(norm, self._lay_out_normed(norm, LinearWeights(weight, bias)), num_heads, turns)

    def rotary(self, position_ids: torch.Tensor, inverse_frequencies: torch.Tensor, head_size: int) -> Rotary:
        """Half of row and column together and half of what lies between them, float32 [1, N] each; where the product
        does not rotate, cos and sin."""
        if not self._rotates_in_product:
            return super().rotary(position_ids, inverse_frequencies, head_size)
        return _sum_and_difference(position_ids)

    def rotated_qkv(self, x_NC: torch.Tensor, weights: QkvWeights, rotary: Rotary) -> torch.Tensor:
        if weights.turns is None:
            return super().rotated_qkv(x_NC, weights, rotary)
        operands = dict(zip(("half_sum", "half_difference", "turns"), (*rotary, weights.turns), strict=True))
        qkv = self._normed_product("rotated", x_NC, weights.norm, weights.linear, operands)
        return qkv.view(len(qkv), 3, weights.num_heads, -1)

    def lay_out_mlp(self, norm: NormWeights, ups: Sequence[nn.Linear], down: nn.Linear, act: str) -> MlpWeights:
        """As Triton wants it, but with gate and up values next to each other, as the epilogue pairs them."""
        mlp = super().lay_out_mlp(norm, ups, down, act)
        if not hasattr(self._epilogues, epilogue_of(mlp)):
            return mlp
        weight, bias = mlp.up.weight, mlp.up.bias
        if mlp.gated:
            weight, bias = (torch.stack(part.chunk(2), dim=1).flatten(0, 1) for part in (weight, bias))
        up = self._lay_out_normed(norm, LinearWeights(weight, bias))
        return MlpWeights(norm, up, mlp.down, act, gated=mlp.gated)

    def add_linear_(self, hidden_NC: torch.Tensor, x: torch.Tensor, weights: LinearWeights) -> None:
        outputs, inputs = weights.weight.shape
        if len(x) < _MIN_ROWS_ADDED or inputs > _MAX_INPUTS_AN_OUTPUT * outputs:
            super().add_linear_(hidden_NC, x, weights)
        else:
            self._run("added", x, weights.weight, hidden_NC, hidden_NC, {})

    def add_mlp_(self, hidden_NC: torch.Tensor, mlp: MlpWeights) -> None:
        epilogue = epilogue_of(mlp)
        if not hasattr(self._epilogues, epilogue):
            super().add_mlp_(hidden_NC, mlp)
            return
        self.add_linear_(hidden_NC, self._normed_product(epilogue, hidden_NC, mlp.norm, mlp.up, {}), mlp.down)

    def _lay_out_normed(self, norm: NormWeights, linear: LinearWeights) -> LinearWeights:
        """The weights of :meth:`_normed_product`."""
        return norm_inside(linear, norm)

    def _normed_product(
        self,
        epilogue: str,
        x: torch.Tensor,
        norm: NormWeights,
        weights: LinearWeights,
        operands: Mapping[str, torch.Tensor | float],
    ) -> torch.Tensor:
        """What ``epilogue`` makes of ``norm(x) Wᵀ``, bias included."""
        assert weights.shifts is not None
        operands = {**operands, "scale": self.row_scales(x, norm), "shifts": weights.shifts}
        return self._product(epilogue, x, weights, operands, x.dtype)

    def _product(
        self,
        epilogue: str,
        x: torch.Tensor,
        weights: LinearWeights,
        operands: Mapping[str, torch.Tensor | float],
        dtype: torch.dtype,
        attributes: tuple[tuple[str, object], ...] = (),
    ) -> torch.Tensor:
        """What ``epilogue`` makes of ``x Wᵀ`` with ``operands`` and the bias, in ``dtype``.

        Args:
            attributes: of quack's kernel, by their names.
        """
        outputs = len(weights.weight)
        operands = {**operands, "bias": weights.bias[None]}
        if epilogue.endswith(_GATED):
            out = operands["gated"] = x.new_empty((len(x), outputs // 2), dtype=dtype)
            self._run(epilogue, x, weights.weight, None, None, operands, attributes)
        else:
            out = x.new_empty((len(x), outputs), dtype=dtype)
            self._run(epilogue, x, weights.weight, out, None, operands, attributes)
        return out

    def _run(
        self,
        epilogue: str,
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor | None,
        summand: torch.Tensor | None,
        operands: Mapping[str, torch.Tensor | float],
        attributes: tuple[tuple[str, object], ...] = (),
    ) -> None:
        tile = best_tile(len(x), len(weight), self._num_sms, STRAINS.get(epilogue, 0.0))
        getattr(self._epilogues, epilogue).gemm(
            x,
            weight,
            out,
            summand,
            epi_args=operands,
            tile_M=tile.rows,
            tile_N=tile.columns,
            cluster_M=tile.cluster_rows,
            cluster_N=tile.cluster_columns,
            pingpong=True,
            post_init_attrs=attributes,
        )


def norm_inside(linear: LinearWeights, norm: NormWeights) -> LinearWeights:
    """Weights whose products with rows as they are, ``shifts`` added and scaled by :meth:`TritonOps.row_scales`, bias
    added, are those of ``linear`` with normed rows.

    A norm's weights become part of the rows of ``linear``. Those of a LayerNorm are centred too: of such a row the mean
    of what it is multiplied with makes nothing.
    """
    wide = linear.weight.double()
    bias = linear.bias.double()
    if norm.bias is not None:
        bias = bias + wide @ norm.bias.double()
    weight = wide * norm.weight.double()
    if norm.bias is not None:
        weight -= weight.mean(dim=1, keepdim=True)
    rounded = weight.to(linear.weight.dtype)
    shift = norm.weight.new_zeros(norm.weight.shape) if norm.shift is None else norm.shift
    shifts = rounded.double() @ shift.double()
    return LinearWeights(rounded, bias.float(), shifts=shifts.float()[None])


def epilogue_of(mlp: MlpWeights) -> str:
    """The name that an activation has, or would have, in models/quack_epilogues.py."""
    return f"{mlp.act}{_GATED if mlp.gated else ''}"


def _pairs_side_by_side(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Weight or bias rows of q, k and v; those of q and k with value i of a head's second half after i of its first."""
    heads = rows.unflatten(0, (3, num_heads, -1))
    paired = torch.stack(heads[:2].chunk(2, dim=2), dim=3).flatten(2, 3)
    return torch.cat([paired, heads[2:]]).flatten(0, 2)


def _sum_and_difference(position_ids: torch.Tensor) -> Rotary:
    """Half of each: ``difference · t + sum · |t|`` is ``row · t``, or ``column · -t`` where t is negative."""
    rows, columns = position_ids.t().float().div(2).split(1)
    return rows + columns, rows - columns


def _turns(inverse_frequencies: torch.Tensor, num_heads: int, head_size: int) -> torch.Tensor:
    """By how much of a turn a step down or, where it is negative, one to the right rotates each value of q, k and v:
    float32 [1, 3 H D]."""
    step = inverse_frequencies.double() / (2 * math.pi)
    padding = head_size // 2 - 2 * len(step)
    head = F.pad(torch.cat([step, -step]), (0, padding)).repeat_interleave(2)
    return F.pad(head.repeat(2 * num_heads), (0, num_heads * head_size)).float()[None]
