"""TORCH_NAIVE: attention as its formula reads. The reference that every other backend is tested against.

``softmax(q kᵀ · scale) v`` within each sequence (Vaswani et al., 2017, eq. 1), in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from encoder_svc.attention.base import AttentionBackend

if TYPE_CHECKING:
    from collections.abc import Sequence


class TorchNaive(AttentionBackend):
    """One sequence after the other, scores written out. Memory grows with the square of a sequence."""

    name = "TORCH_NAIVE"

    def forward(
        self,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        group = self.num_heads // self.num_kv_heads
        outputs = []
        for q, k, v in zip(*(x.float().split(list(lengths)) for x in (q_NHD, k_NKD, v_NKD)), strict=True):
            k_LHD, v_LHD = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            scores_HLL = torch.einsum("qhd,khd->hqk", q, k_LHD) * self.scale
            if self.causal:
                future = torch.ones_like(scores_HLL[0], dtype=torch.bool).triu(diagonal=1)
                scores_HLL = scores_HLL.masked_fill(future, -torch.inf)
            outputs.append(torch.einsum("hqk,khd->qhd", scores_HLL.softmax(dim=-1), v_LHD))
        return torch.cat(outputs).to(q_NHD.dtype)
