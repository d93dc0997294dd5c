"""Operations of a CUDA device: element-wise work fused into Triton kernels, residuals added inside matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F

from encoder_svc.models.ops import LinearWeights, MlpWeights, NormWeights, Ops, Rotary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

E4M3_MAX: Final = 448.0
"""The largest value of torch.float8_e4m3fn."""

# 16 bytes of bfloat16: what matrix products load at once.
_ALIGNED_VALUES: Final = 8
# What products on float8 take, and a little more than what others need.
_MLP_MULTIPLE: Final = 16
# A gated MLP's width is padded to whole tiles: Qwen2.5-VL's 3420 is not even aligned, and its last product takes
# 1.70 ms for 41,472 patches where one of 3456 takes 0.48.
_GATED_TILE: Final = 128
# The compute capability from which a kernel may start before the one whose results it waits for has ended.
_STARTS_EARLY: Final = (9, 0)
# Programs, each with a row in flight; of norms, one warp each, twice as many are up to 9 % faster on an H100.
_PROGRAMS_PER_SM: Final = 16
_NORMS_PER_SM: Final = 32


class TritonOps(Ops):
    """fp32, fp16 and bf16, on a device that Triton compiles for."""

    name = "triton"
    defers_bias = True
    row_multiple = _ALIGNED_VALUES

    def __init__(self, device: torch.device) -> None:
        from encoder_svc.models import triton_kernels

        self._kernels: Any = triton_kernels
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self._max_programs, self._max_norms = _PROGRAMS_PER_SM * sms, _NORMS_PER_SM * sms
        # CUDA's programmatic dependent launch.
        self._starts_early = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _STARTS_EARLY

    def lay_out_mlp(self, norm: NormWeights, ups: Sequence[nn.Linear], down: nn.Linear, act: str) -> MlpWeights:
        """Gate and up become one product, padded with zeros to whole tiles; act(0) is 0 for every activation."""
        gated = len(ups) == 2
        padding = -down.in_features % (_GATED_TILE if gated else _MLP_MULTIPLE)
        if not gated and not padding:
            return MlpWeights(norm, self.lay_out_linear(ups[0]), self.lay_out_linear(down), act, gated=False)
        weight = torch.cat([F.pad(up.weight, (0, 0, 0, padding)) for up in ups])
        bias = torch.cat([F.pad(up.bias, (0, padding)) for up in ups])
        down_weight = F.pad(down.weight, (0, padding))
        return MlpWeights(norm, LinearWeights(weight, bias), LinearWeights(down_weight, down.bias), act, gated=gated)

    def centre(self, patches_NF: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        num_rows, num_values = patches_NF.shape
        width = num_values + -num_values % self.row_multiple
        out = torch.empty((num_rows, width), dtype=dtype, device=patches_NF.device)
        self._kernels.centre[(num_rows,)](
            patches_NF, out, num_values=num_values, width=width, block=power_of_two(width)
        )
        return out

    def norm(self, x_NC: torch.Tensor, weights: NormWeights) -> torch.Tensor:
        out = torch.empty_like(x_NC)
        self.norm_into(out, None, x_NC, weights)
        return out

    def norm_into(
        self, out: torch.Tensor, scales: torch.Tensor | None, x_NC: torch.Tensor, weights: NormWeights
    ) -> None:
        """Norms into ``out``; with ``scales``, float32 [N, 1], each row is divided by its own so that it fits e4m3."""
        num_rows, width = x_NC.shape
        self._kernels.norm[(min(num_rows, self._max_norms),)](
            x_NC,
            weights.weight,
            weights.bias,
            weights.shift,
            out,
            scales,
            num_rows,
            weights.eps,
            width=width,
            is_layer_norm=weights.bias is not None,
            has_shift=weights.shift is not None,
            quantise=scales is not None,
            largest=E4M3_MAX,
            **self._by_rows(width),
        )

    def row_scales(self, x_NC: torch.Tensor, weights: NormWeights) -> torch.Tensor:
        """What a norm multiplies each row by, its weights aside: float32 [1, N]."""
        num_rows, width = x_NC.shape
        out = torch.empty((1, num_rows), dtype=torch.float32, device=x_NC.device)
        self._kernels.row_scales[(min(num_rows, self._max_norms),)](
            x_NC,
            weights.shift,
            out,
            num_rows,
            weights.eps,
            width=width,
            is_layer_norm=weights.bias is not None,
            has_shift=weights.shift is not None,
            **self._by_rows(width),
        )
        return out

    def _by_rows(self, width: int) -> dict[str, int]:
        """How a kernel that takes a row at a time is launched."""
        return {
            "block": power_of_two(width),
            "starts_early": self._starts_early,
            "launch_pdl": self._starts_early,
            "num_warps": 1 if width <= 2048 else 8,
        }

    def rotate_(self, qkv_N3HD: torch.Tensor, rotary: Rotary) -> None:
        assert qkv_N3HD.is_contiguous()
        cos, sin = rotary
        num_rows, _, num_heads, head_size = qkv_N3HD.shape
        self._kernels.rotate[(num_rows,)](
            qkv_N3HD,
            cos,
            sin,
            qkv_N3HD.stride(0),
            num_heads=num_heads,
            half=head_size // 2,
            block_heads=power_of_two(2 * num_heads),
            block=power_of_two(head_size // 2),
            num_warps=4,
        )

    def add_linear_(self, hidden_NC: torch.Tensor, x: torch.Tensor, weights: LinearWeights) -> None:
        hidden_NC.addmm_(x, weights.weight.t())

    def add_mlp_(self, hidden_NC: torch.Tensor, mlp: MlpWeights) -> None:
        x = self.linear(self.norm(hidden_NC, mlp.norm), mlp.up)
        out = torch.empty((len(x), mlp.down.weight.shape[1]), dtype=x.dtype, device=x.device) if mlp.gated else x
        self.activate_into(out, None, x, None, mlp)
        self.add_linear_(hidden_NC, out, mlp.down)

    def activate_into(
        self,
        out: torch.Tensor,
        scales: torch.Tensor | None,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        mlp: MlpWeights,
    ) -> None:
        """``act(x + bias)`` into ``out``, which may be ``x`` unless it is gated; ``scales`` as in :meth:`norm_into`."""
        self._kernel_activate(out, scales, x, bias, mlp.act, gated=mlp.gated)

    def _kernel_activate(
        self,
        out: torch.Tensor,
        scales: torch.Tensor | None,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        act: str,
        *,
        gated: bool,
    ) -> None:
        num_rows, width = out.shape
        self._kernels.activate[(min(num_rows, self._max_programs),)](
            x,
            bias,
            out,
            scales,
            num_rows,
            width=width,
            gated=gated,
            has_bias=bias is not None,
            act=act,
            quantise=scales is not None,
            largest=E4M3_MAX,
            block=power_of_two(width),
            num_warps=4 if width <= 2048 else 8,
        )

    def add_interpolated_(
        self, hidden_NC: torch.Tensor, table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> None:
        num_rows, width = hidden_NC.shape
        self._kernels.add_interpolated[(num_rows,)](
            hidden_NC,
            table,
            indices,
            weights,
            width=width,
            corners=indices.shape[1],
            block=power_of_two(width),
            num_warps=2,
        )


def power_of_two(value: int) -> int:
    """The next power of two: how wide a block of Triton's is."""
    return 1 << (value - 1).bit_length()
