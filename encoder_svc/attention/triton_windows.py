"""Attention within windows: TRITON_ATTN's second kernel.

A window is small enough for one program, and its work is the reading and writing of memory. Only an automatic choice
takes it (docs/attention.md); an override runs in every layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from encoder_svc.attention.base import PackedSequences

MAX_WINDOW_PATCHES: Final = 64
"""The longest sequence that it takes."""

# Of a Triton product.
_SMALLEST_BLOCK: Final = 16
_LOG2_E: Final = 1.4426950408889634


class WindowAttention:
    """Bidirectional attention within sequences of at most 64 patches.

    Args:
        num_heads: H, of q, k and v alike.
        head_size: D, even and at most 128.
        scale: what scores are multiplied by before the softmax.
    """

    def __init__(self, num_heads: int, head_size: int, scale: float) -> None:
        from encoder_svc.attention.triton_windows_kernel import windows

        self._kernel = windows
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self._block_f = max(_SMALLEST_BLOCK, 1 << (head_size.bit_length() - 1))
        rest = head_size - self._block_f
        self._block_g = max(_SMALLEST_BLOCK, 1 << (rest - 1).bit_length()) if rest > 0 else 0

    def __call__(self, qkv_N3HD: torch.Tensor, sequences: PackedSequences) -> torch.Tensor:
        """Attention within each sequence, [N, H, D].

        Args:
            qkv_N3HD: contiguous, q and k rotated.
            sequences: at most :data:`MAX_WINDOW_PATCHES` each.
        """
        assert qkv_N3HD.is_contiguous()
        assert sequences.max_seqlen <= MAX_WINDOW_PATCHES
        shape = (qkv_N3HD.shape[0], self.num_heads, self.head_size)
        out_NHD = torch.empty(shape, dtype=qkv_N3HD.dtype, device=qkv_N3HD.device)
        self._kernel[(len(sequences.cu_seqlens) - 1, self.num_heads)](
            qkv_N3HD,
            out_NHD,
            sequences.cu_seqlens,
            self.scale * _LOG2_E,
            num_heads=self.num_heads,
            head_size=self.head_size,
            block_f=self._block_f,
            block_g=self._block_g,
            precision="ieee",
            block=MAX_WINDOW_PATCHES,
            num_warps=4,
        )
        return out_NHD
