"""Operations of a Hopper GPU with quack-kernels, which flash-attn-4 brings: activations inside the matrix product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from encoder_svc.models.ops import LinearWeights, MlpWeights, NormWeights
from encoder_svc.models.ops_triton import TritonOps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

_ACTIVATIONS: Final = {
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh_approx",
    "gelu": "gelu_erf",
    "silu": "silu",
}
_GATED: Final = {"silu": "swiglu"}


# Where quack's product is the faster one, in patches (docs/performance.md): below, cuBLAS has tiles that fill the GPU.
_MIN_ROWS: Final = 2_048
_MIN_ROWS_ADDED: Final = 8_192


class QuackOps(TritonOps):
    """fp16 and bf16."""

    name = "quack"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        from quack.gemm_config import GemmConfig
        from quack.gemm_interface import gemm, gemm_act, gemm_add_inplace

        self._gemm: Callable[..., torch.Tensor] = gemm
        self._gemm_act: Callable[..., Any] = gemm_act
        self._gemm_add: Callable[..., None] = gemm_add_inplace
        self._large_tiles = GemmConfig(
            tile_m=256, tile_n=160, cluster_m=1, cluster_n=1, pingpong=False, is_dynamic_persistent=False
        )
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    def lay_out_mlp(self, ups: Sequence[nn.Linear], down: nn.Linear, act: str) -> MlpWeights:
        """As Triton wants it, but with gate and up values next to each other, as quack pairs them."""
        mlp = super().lay_out_mlp(ups, down, act)
        if not mlp.gated or act not in _GATED:
            return mlp
        weight, bias = (torch.stack(part.chunk(2), dim=1).flatten(0, 1) for part in (mlp.up.weight, mlp.up.bias))
        return MlpWeights(LinearWeights(weight, bias), mlp.down, act, gated=True)

    def linear(self, x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
        if len(x) < _MIN_ROWS:
            return super().linear(x, weights)
        return self._gemm(x, weights.weight.t(), bias=weights.bias, tuned=False)

    def add_linear_(self, hidden_NC: torch.Tensor, x: torch.Tensor, weights: LinearWeights) -> None:
        outputs, inputs = weights.weight.shape
        # cuBLAS is the faster one where the sum is long.
        if len(x) < _MIN_ROWS_ADDED or inputs > outputs:
            super().add_linear_(hidden_NC, x, weights)
        else:
            self._gemm_add(x, weights.weight.t(), hidden_NC, tuned=False)

    def add_mlp_(self, hidden_NC: torch.Tensor, norm: NormWeights, mlp: MlpWeights) -> None:
        activation = (_GATED if mlp.gated else _ACTIVATIONS).get(mlp.act)
        if activation is None:
            super().add_mlp_(hidden_NC, norm, mlp)
            return
        _, x = self._gemm_act(
            self.norm(hidden_NC, norm),
            mlp.up.weight.t(),
            bias=mlp.up.bias,
            activation=activation,
            store_preact=False,
            tuned=False,
            config=self._large_tiles if self._fits_at_once(len(hidden_NC), len(mlp.up.weight)) else None,
        )
        self.add_linear_(hidden_NC, x, mlp.down)

    def _fits_at_once(self, num_rows: int, outputs: int) -> bool:
        """Whether large tiles, slower each, make one wave where smaller ones make two."""
        large: int = -(-num_rows // self._large_tiles.tile_m) * -(-outputs // self._large_tiles.tile_n)
        return num_rows > self._large_tiles.tile_m and large <= self._num_sms
