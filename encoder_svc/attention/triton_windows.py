"""Attention within windows, the rotation of q and k included: TRITON_ATTN's second kernel.

A window is small enough for one program, and its work is the reading and writing of memory: rotating in registers saves
a pass over q and k. Only an automatic choice takes it (docs/attention.md); an override runs in every layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from encoder_svc.attention.base import PackedSequences

MAX_WINDOW_PATCHES: Final = 64
"""The longest sequence that it takes."""

_LOG2_E: Final = 1.4426950408889634


class WindowAttention:
    """Bidirectional attention within sequences of at most 64 patches.

    Args:
        num_heads: H, of q, k and v alike.
        head_size: D, even and at most 128.
        scale: what scores are multiplied by before the softmax.
    """

    def __init__(self, num_heads: int, head_size: int, scale: float) -> None:
        from encoder_svc.attention.triton_windows_kernel import rotated_windows

        self._kernel = rotated_windows
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self._block_f = max(16, 1 << (head_size // 2 - 1).bit_length())

    def __call__(
        self, qkv_N3HD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], sequences: PackedSequences
    ) -> torch.Tensor:
        """[N, H, D]: rotates q and k, then attends.

        Args:
            qkv_N3HD: contiguous; left as it is.
            rotary: cos and sin, float32 [N, D / 2].
            sequences: at most :data:`MAX_WINDOW_PATCHES` each.
        """
        assert qkv_N3HD.is_contiguous()
        assert sequences.max_seqlen <= MAX_WINDOW_PATCHES
        cos, sin = rotary
        shape = (qkv_N3HD.shape[0], self.num_heads, self.head_size)
        out_NHD = torch.empty(shape, dtype=qkv_N3HD.dtype, device=qkv_N3HD.device)
        self._kernel[(len(sequences.cu_seqlens) - 1, self.num_heads)](
            qkv_N3HD,
            cos,
            sin,
            out_NHD,
            sequences.cu_seqlens,
            self.scale * _LOG2_E,
            num_heads=self.num_heads,
            head_size=self.head_size,
            block_f=self._block_f,
            precision="ieee",
            block=MAX_WINDOW_PATCHES,
            num_warps=4,
        )
        return out_NHD
