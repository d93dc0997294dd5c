"""What an encoder computes beside attention, as torch expressions: the reference, which runs on every device.

A device's own :class:`Ops` replaces what it computes faster, and lays weights out as its kernels want them. Each of its
operations is tested against the one here.

Shapes: N patches, C hidden_size, I intermediate_size, F values in one frame of a patch, H heads, D head_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from encoder_svc.errors import CheckpointError
from encoder_svc.models.positions import rotary_embedding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Rotary = tuple[torch.Tensor, torch.Tensor]
"""What :meth:`Ops.rotary` makes of a batch's positions. Everywhere but where it says otherwise cos and sin, float32
[N, D / 2]: the angles of a head's first half, which its second half repeats."""

CENTRE = 128
"""What is taken from a uint8 pixel, and what the rest is then divided by: both leave bfloat16 and float16 exact."""


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": _quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": F.silu,
}
"""By their names in Hugging Face configs."""


def check_activation(name: str) -> str:
    """The name, if it is one of :data:`ACTIVATIONS`.

    Raises:
        CheckpointError: it is not.
    """
    if name not in ACTIVATIONS:
        raise CheckpointError(f"vision_config's hidden_act '{name}' is not known; known: {', '.join(ACTIVATIONS)}.")
    return name


class LinearWeights(NamedTuple):
    """A linear layer: ``weight`` [out, in], ``bias`` [out].

    Attributes:
        scales: float32 [1, out], what quantised rows of ``weight`` are multiplied by; None where it is not quantised.
        shifts: float32 [1, out], what the shift of a norm inside ``weight`` makes; None where there is no norm inside.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    scales: torch.Tensor | None = None
    shifts: torch.Tensor | None = None


class NormWeights(NamedTuple):
    """A LayerNorm, or an RMSNorm where ``bias`` is None.

    Attributes:
        shift: float32 [C], added to what is normed; None for nothing. See :attr:`Ops.defers_bias`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    shift: torch.Tensor | None = None


class QkvWeights(NamedTuple):
    """The projection of what is normed to q, k and v, each ``num_heads`` heads wide.

    Attributes:
        turns: what a device that rotates inside the product multiplies positions by; None elsewhere.
    """

    norm: NormWeights
    linear: LinearWeights
    num_heads: int
    turns: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """``down(act(up(norm(x))))``; where it is ``gated``, ``up`` makes gate and up values and it is
    ``down(act(gate) * up)``."""

    norm: NormWeights
    up: LinearWeights
    down: LinearWeights
    act: str
    gated: bool


class Ops:
    """Operations of one device. Holds no state of a batch.

    Attributes:
        name: part of the config hash.
        defers_bias: :meth:`add_linear_` leaves the bias out, and each norm that follows adds, as its ``shift``, all
            biases left out before it. So that residuals are added inside the matrix product.
        row_multiple: patches are padded with zeros to a multiple of this many values, for aligned matrix products.
    """

    name = "torch"
    defers_bias = False
    row_multiple = 1

    def of_block(self, index: int, depth: int) -> Ops:
        """The operations of block ``index`` of ``depth``."""
        return self

    def lay_out_linear(self, linear: nn.Linear) -> LinearWeights:
        """A layer's weights as this device wants them."""
        return LinearWeights(linear.weight, linear.bias)

    def lay_out_mlp(self, norm: NormWeights, ups: Sequence[nn.Linear], down: nn.Linear, act: str) -> MlpWeights:
        """An MLP's weights as this device wants them; two ``ups`` are gate and up, and become one product."""
        return MlpWeights(norm, _merged(ups), self.lay_out_linear(down), act, gated=len(ups) == 2)

    def lay_out_qkv(
        self, norm: NormWeights, qkv: nn.Linear, num_heads: int, inverse_frequencies: torch.Tensor
    ) -> QkvWeights:
        """The weights of :meth:`rotated_qkv`.

        Args:
            inverse_frequencies: of :func:`encoder_svc.models.positions.inverse_frequencies`.
        """
        return QkvWeights(norm, self.lay_out_linear(qkv), num_heads)

    def rotary(self, position_ids: torch.Tensor, inverse_frequencies: torch.Tensor, head_size: int) -> Rotary:
        """What :meth:`rotated_qkv` needs of a batch's positions, made once for all blocks.

        Args:
            position_ids: int64 [N, 2], row and column of each patch.
            head_size: as attention takes it, padding included.
        """
        return rotary_embedding(position_ids, inverse_frequencies, head_size)

    def centre(self, patches_NF: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """uint8 patches as ``(x - 128) / 128``, exact, padded with zeros to a multiple of ``row_multiple``."""
        centred = (patches_NF.to(dtype) - CENTRE) / CENTRE
        padding = -patches_NF.shape[1] % self.row_multiple
        return F.pad(centred, (0, padding)) if padding else centred

    def norm(self, x_NC: torch.Tensor, weights: NormWeights) -> torch.Tensor:
        """LayerNorm or RMSNorm of ``x + shift``, computed in float32."""
        x = x_NC if weights.shift is None else x_NC.float() + weights.shift
        weight, bias = (value if value is None else value.to(x.dtype) for value in weights[:2])
        if bias is None:
            return F.rms_norm(x, weight.shape, weight, weights.eps).to(x_NC.dtype)  # type: ignore[union-attr]
        return F.layer_norm(x, bias.shape, weight, bias, weights.eps).to(x_NC.dtype)

    def linear(self, x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        """``x Wᵀ + b``."""
        return F.linear(x, weights.weight, weights.bias)

    def norm_linear(self, x_NC: torch.Tensor, norm: NormWeights, linear: LinearWeights) -> torch.Tensor:
        """``norm(x) Wᵀ + b``."""
        return self.linear(self.norm(x_NC, norm), linear)

    def rotated_qkv(self, x_NC: torch.Tensor, weights: QkvWeights, rotary: Rotary) -> torch.Tensor:
        """q, k and v of ``x``, contiguous [N, 3, H, D], q and k rotated.

        The values of a rotated head may come in any order, the same for q and k: no score changes.
        """
        qkv = self.norm_linear(x_NC, weights.norm, weights.linear)
        qkv_N3HD = qkv.view(len(qkv), 3, weights.num_heads, -1)
        self.rotate_(qkv_N3HD, rotary)
        return qkv_N3HD

    def rotate_(self, qkv_N3HD: torch.Tensor, rotary: Rotary) -> None:
        """Rotates q and k in place, in float32.

        Source: RoFormer (Su et al., 2021), with a head's two halves as the pairs.
        """
        cos, sin = (table[:, None, None] for table in rotary)
        first, second = qkv_N3HD[:, :2].float().chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        qkv_N3HD[:, :2] = rotated.to(qkv_N3HD.dtype)

    def add_interpolated_(
        self, hidden_NC: torch.Tensor, table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Adds to each row of ``hidden`` the weighted sum of a few rows of ``table``, made in float32.

        Args:
            indices: int64 [N, corners].
            weights: float32 [N, corners].
        """
        hidden_NC += (F.embedding(indices, table) * weights.unsqueeze(-1)).sum(dim=1).to(hidden_NC.dtype)

    def add_linear_(self, hidden_NC: torch.Tensor, x: torch.Tensor, weights: LinearWeights) -> None:
        """Adds ``x Wᵀ + b`` to ``hidden`` in place; without b under :attr:`defers_bias`."""
        hidden_NC += F.linear(x, weights.weight, weights.bias)

    def add_mlp_(self, hidden_NC: torch.Tensor, mlp: MlpWeights) -> None:
        """Adds ``mlp(hidden)`` to ``hidden`` in place; without the last bias under :attr:`defers_bias`."""
        x = self.norm_linear(hidden_NC, mlp.norm, mlp.up)
        act = ACTIVATIONS[mlp.act]
        if mlp.gated:
            gate, up = x.chunk(2, dim=-1)
            x = act(gate) * up
        else:
            x = act(x)
        self.add_linear_(hidden_NC, x, mlp.down)


def _merged(layers: Sequence[nn.Linear]) -> LinearWeights:
    """The layers' weights below each other, once in memory: the layers keep views of them."""
    if len(layers) == 1:
        return LinearWeights(layers[0].weight, layers[0].bias)
    weight, bias = (torch.cat([getattr(layer, name).data for layer in layers]) for name in ("weight", "bias"))
    sizes = [layer.out_features for layer in layers]
    for layer, *views in zip(layers, weight.split(sizes), bias.split(sizes), strict=True):
        layer.weight, layer.bias = (nn.Parameter(view, requires_grad=False) for view in views)
    return LinearWeights(weight, bias)
