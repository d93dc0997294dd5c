"""XFORMERS: memory-efficient attention under a block-diagonal mask. Package ``xformers``.

Source: "Self-attention Does Not Need O(n²) Memory" (Rabe and Staats, 2021), as xformers' CUTLASS kernels do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from encoder_svc.attention.base import AttentionBackend

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class Xformers(AttentionBackend):
    """fp16 and fp32 on every NVIDIA GPU, bf16 from 8.0 on."""

    name = "XFORMERS"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        from xformers.ops import memory_efficient_attention_forward
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        self._attend = memory_efficient_attention_forward
        self._mask_of = BlockDiagonalMask.from_seqlens
        self._last_mask: tuple[tuple[int, ...], torch.device, Any] | None = None

    def forward(
        self,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        # [batch, N, K, H / K, D]: xformers' form of grouped heads, keys and values repeated without a copy.
        kv_heads, group = self.num_kv_heads, self.num_heads // self.num_kv_heads
        q = q_NHD.unflatten(1, (kv_heads, group)).unsqueeze(0)
        k, v = (x.unsqueeze(2).expand(-1, -1, group, -1).unsqueeze(0) for x in (k_NKD, v_NKD))
        if group == 1:
            q, k, v = (x.squeeze(3) for x in (q, k, v))
        out: torch.Tensor = self._attend(q, k, v, attn_bias=self._mask(lengths, q.device), p=0.0, scale=self.scale)
        return out.view(q_NHD.shape)

    def _mask(self, lengths: Sequence[int], device: torch.device) -> Any:
        """Made once a batch, not once a layer: making it copies to the device. A mask is a value, so keeping the last
        one changes no result."""
        key = tuple(lengths)
        last = self._last_mask
        if last is None or last[0] != key or last[1] != device:
            mask = self._mask_of(list(key), device=device)
            last = self._last_mask = (key, device, mask.make_causal() if self.causal else mask)
        return last[2]
