"""ROCM_AITER_FA: the varlen flash attention of AMD's aiter, for CDNA3 and later. Package ``amd-aiter``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from encoder_svc.attention.base import AttentionBackend

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class RocmAiterFa(AttentionBackend):
    """fp16 and bf16, head sizes that are multiples of 8 up to 256."""

    name = "ROCM_AITER_FA"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        from aiter import flash_attn_varlen_func

        self._varlen = flash_attn_varlen_func

    def forward(
        self,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        returned = self._varlen(
            q_NHD,
            k_NKD,
            v_NKD,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=self.scale,
            causal=self.causal,
        )
        out: torch.Tensor = returned[0] if isinstance(returned, (tuple, list)) else returned
        return out
