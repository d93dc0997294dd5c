"""TRITON_ATTN: our own packed attention kernel, in Triton. Package ``triton``, which torch's GPU builds bring along.

FlashAttention's online softmax (Dao et al., 2022). A head size between two powers of two is not padded to the next:
Triton's blocks are powers of two, so 72 and 80 are worked on as 64 + 16, and 96 as 64 + 32.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from encoder_svc.attention.base import AttentionBackend

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOG2_E: Final = 1.4426950408889634
# The narrowest matrix product that tensor cores do.
_NARROWEST: Final = 16
# Values in a load of 16 bytes, or twice that.
_WIDEST_LOAD: Final = 16
_HOPPER_SHARED_BYTES: Final = 227 * 2**10


class Tiles(NamedTuple):
    """A program's share: query rows, key rows at a time, warps, and the depth of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class TritonAttn(AttentionBackend):
    """fp16, bf16 and fp32, head sizes up to 256."""

    name = "TRITON_ATTN"
    capturable = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        from encoder_svc.attention.triton_kernel import packed_attention

        self._kernel = packed_attention
        self._main, self._rest = split_head(self.head_size)

    def forward(
        self,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_NHD, k_NKD, v_NKD))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        # Triton takes a number for a multiple of 16 or of nothing, and loads head size 72 two bytes at a time. Strides
        # counted in units say what they are multiples of.
        strides = [stride for x in (q, k, v, out) for stride in x.stride()[:2]]
        unit = math.gcd(_WIDEST_LOAD, *strides)
        tiles = tiles_for(self.head_size, q.dtype, max_seqlen, _shared_bytes(q.device))
        blocks = -(-max_seqlen // tiles.block_m)
        self._kernel[((len(cu_seqlens) - 1) * blocks, self.num_heads)](
            q,
            k,
            v,
            out,
            cu_seqlens,
            self.scale * _LOG2_E,
            blocks,
            *(stride // unit for stride in strides),
            unit=unit,
            group=self.num_heads // self.num_kv_heads,
            head_size=self.head_size,
            main=self._main,
            rest=self._rest,
            causal=self.causal,
            precision=_precision(q),
            block_m=tiles.block_m,
            block_n=tiles.block_n,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        return out


def split_head(head_size: int) -> tuple[int, int]:
    """A head size as one or two powers of two of at least 16 that cover it, with as little padding as that allows."""
    whole = max(_NARROWEST, 1 << (head_size - 1).bit_length())
    main = whole // 2
    rest = max(_NARROWEST, 1 << (head_size - main - 1).bit_length()) if main >= _NARROWEST else whole
    return (main, rest) if main + rest < whole else (whole, 0)


def tiles_for(head_size: int, dtype: torch.dtype, max_seqlen: int, shared_bytes: int = _HOPPER_SHARED_BYTES) -> Tiles:
    """Fixed by shape, dtype and device, with no tuning at run time: the same input always runs the same code.

    The best of a sweep on an H100 (docs/attention.md), with less loaded ahead where a device has less shared memory.
    """
    parts = split_head(head_size)
    if dtype == torch.float32:
        tiles = Tiles(64, 32, 4, 2) if head_size <= 128 else Tiles(32, 32, 4, 1)
    elif max_seqlen <= 64:
        tiles = Tiles(64, 64, 4, 2) if head_size <= 128 else Tiles(64, 32, 4, 1)
    elif head_size > 128:
        tiles = Tiles(128, 64, 8, 2)
    else:
        tiles = Tiles(128, 64, 4 if parts[1] else 8, 3)
    row_bytes = sum(parts) * dtype.itemsize
    while row_bytes * (tiles.block_m + 2 * tiles.num_stages * tiles.block_n) > shared_bytes:
        if tiles.num_stages > 1:
            tiles = tiles._replace(num_stages=tiles.num_stages - 1)
        elif tiles.block_n > _NARROWEST:
            tiles = tiles._replace(block_n=tiles.block_n // 2)
        else:
            tiles = tiles._replace(block_m=tiles.block_m // 2)
    return tiles


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """What one program may use of a device's shared memory."""
    if device.type != "cuda":  # Triton's interpreter
        return _HOPPER_SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def _precision(q: torch.Tensor) -> str:
    """How float32 products are made: on NVIDIA in three tf32 parts, which keeps float32's accuracy on tensor cores."""
    return "tf32x3" if q.is_cuda and torch.version.hip is None else "ieee"
