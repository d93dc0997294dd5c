"""TORCH_SDPA: torch's scaled_dot_product_attention, one call for each length of sequence.

SDPA takes no cu_seqlens, but equally long sequences are a plain batch to it. Sixteen images of one size are one
call; so are all the full windows of an image, which the Qwen2.5-VL encoder lays next to each other for this, and those
of several images, which are brought together.

On a CPU that multiplies bfloat16, unless the operator named TORCH_SDPA, SDPA's own kernel gives way to one of ours
(:mod:`encoder_svc.attention.cpu_kernels`) or, where that cannot be compiled or takes no heads so large, and there is no
AMX, without which SDPA's is slow, to SDPA's plain form in blocks (:mod:`encoder_svc.attention.cpu_blocks`).
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from encoder_svc.attention import cpu_blocks
from encoder_svc.attention.base import AttentionBackend
from encoder_svc.attention.cpu_kernels import cpu_kernels, has_amx, has_avx512_bf16

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from encoder_svc.attention.cpu_kernels import CpuKernels


# Scores, of all heads, between two pauses: 10 to 30 ms on two cores.
_SCORES_OF_A_PART = 3 * 2**24


class TorchSdpa(AttentionBackend):
    """Runs on every device that torch runs on, in every floating dtype."""

    name = "TORCH_SDPA"
    _kernels: CpuKernels | None = None
    _in_blocks = False

    def choose_form(self, platform: str, dtype: str, failed: Collection[str] = ()) -> str:
        """See :class:`AttentionBackend`."""
        is_plain = not self.causal and self.num_heads == self.num_kv_heads
        if not is_plain or platform != "cpu" or dtype != "bfloat16":
            return self.implementation
        kernels = cpu_kernels()
        if kernels is not None and kernels.takes(self.head_size) and kernels.form not in failed:
            self._kernels = kernels
            return kernels.form
        self._in_blocks = has_avx512_bf16() and not has_amx() and "blocks" not in failed
        return "blocks" if self._in_blocks else self.implementation

    def forward(
        self,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        heads_of_a_part = max(_SCORES_OF_A_PART // max_seqlen**2, 1)
        if self.pause is None or heads_of_a_part >= self.num_heads or self.num_heads != self.num_kv_heads:
            return self._attend(q_NHD, k_NKD, v_NKD, cu_seqlens, lengths)
        out_NHD = torch.empty_like(q_NHD, memory_format=torch.contiguous_format)
        parts = (x.split(heads_of_a_part, dim=1) for x in (out_NHD, q_NHD, k_NKD, v_NKD))
        for number, (out, q, k, v) in enumerate(zip(*parts, strict=True)):
            if number:
                self.pause()
            out.copy_(self._attend(q, k, v, cu_seqlens, lengths))
        return out_NHD

    def _attend(
        self,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        if self._kernels is not None:
            return self._kernels.attend(q_NHD, k_NKD, v_NKD, cu_seqlens, self.scale)
        runs = _runs_by_length(lengths)
        if len(runs) == 1:
            return self._dense(q_NHD, k_NKD, v_NKD, lengths[0])
        out_NHD = torch.empty(q_NHD.shape, dtype=q_NHD.dtype, device=q_NHD.device)
        for length, rows in runs.items():
            q, k, v = (
                x[rows[0]] if len(rows) == 1 else torch.cat([x[some] for some in rows]) for x in (q_NHD, k_NKD, v_NKD)
            )
            out = self._dense(q, k, v, length)
            for some, part in zip(rows, out.split([some.stop - some.start for some in rows]), strict=True):
                out_NHD[some] = part
        return out_NHD

    def _dense(self, q_NHD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, length: int) -> torch.Tensor:
        """Sequences of one length."""
        q_BHLD, k_BKLD, v_BKLD = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_NHD, k_NKD, v_NKD))
        if self._in_blocks:
            q_GLD, k_GLD, v_GLD = (x.flatten(0, 1) for x in (q_BHLD, k_BKLD, v_BKLD))
            out_BHLD = cpu_blocks.attend(q_GLD, k_GLD, v_GLD, self.scale).view(q_BHLD.shape)
            return out_BHLD.transpose(1, 2).flatten(0, 1)
        out_BHLD = F.scaled_dot_product_attention(
            q_BHLD,
            k_BKLD,
            v_BKLD,
            is_causal=self.causal,
            scale=self.scale,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return out_BHLD.transpose(1, 2).flatten(0, 1)


def _runs_by_length(lengths: Sequence[int]) -> dict[int, list[slice]]:
    """For each length the rows of its sequences; neighbours are one slice."""
    runs: dict[int, list[slice]] = {}
    start = 0
    for length, run in groupby(lengths):
        stop = start + length * sum(1 for _ in run)
        runs.setdefault(length, []).append(slice(start, stop))
        start = stop
    return runs
