"""TORCH_SDPA: torch's scaled_dot_product_attention, one call for each run of equally long sequences.

SDPA takes no cu_seqlens, but a run of equal sequences is a plain batch to it. Sixteen images of one size are one
call; so are all the full windows of an image, which the Qwen2.5-VL encoder lays next to each other for this.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from encoder_svc.attention.base import AttentionBackend

if TYPE_CHECKING:
    from collections.abc import Sequence


class TorchSdpa(AttentionBackend):
    """Runs on every device that torch runs on, in every floating dtype."""

    name = "TORCH_SDPA"

    def forward(
        self,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        out_NHD = torch.empty(q_NHD.shape, dtype=q_NHD.dtype, device=q_NHD.device)
        start = 0
        for length, run in groupby(lengths):
            batch = sum(1 for _ in run)
            rows = slice(start, start + batch * length)
            start = rows.stop
            q_BHLD, k_BKLD, v_BKLD = (
                x[rows].unflatten(0, (batch, length)).transpose(1, 2) for x in (q_NHD, k_NKD, v_NKD)
            )
            out_BHLD = F.scaled_dot_product_attention(
                q_BHLD,
                k_BKLD,
                v_BKLD,
                is_causal=self.causal,
                scale=self.scale,
                enable_gqa=self.num_heads != self.num_kv_heads,
            )
            out_NHD[rows] = out_BHLD.transpose(1, 2).flatten(0, 1)
        return out_NHD
