"""FLASHINFER: cuDNN's ragged prefill, by way of flashinfer. Package ``flashinfer-python``.

cuDNN builds a plan for each number of sequences and each longest sequence, tens of milliseconds each. Both are
rounded up here, with empty sequences at the end, so that few plans serve all batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F

from encoder_svc.attention.base import AttentionBackend

if TYPE_CHECKING:
    from collections.abc import Sequence

_WORKSPACE_BYTES: Final = 128 * 2**20
_SMALLEST_BATCH: Final = 8
_SMALLEST_MAX_SEQLEN: Final = 128


class FlashInfer(AttentionBackend):
    """fp16 and bf16, head sizes that are multiples of 8."""

    name = "FLASHINFER"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        from flashinfer.cudnn import cudnn_batch_prefill_with_kv_cache

        self._prefill = cudnn_batch_prefill_with_kv_cache
        self._workspace: torch.Tensor | None = None

    def forward(
        self,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        num_rows, num_sequences = q_NHD.shape[0], len(lengths)
        batch = _round_up(num_sequences, _SMALLEST_BATCH)
        starts = F.pad(cu_seqlens, (0, batch - num_sequences), value=num_rows)
        lengths_B111 = starts.diff().view(-1, 1, 1, 1)
        # The offsets count values of a contiguous [N, H, D].
        q_NHD, k_NKD, v_NKD = q_NHD.contiguous(), k_NKD.contiguous(), v_NKD.contiguous()
        q_offsets = starts * (self.num_heads * self.head_size)
        kv_offsets = q_offsets if self.num_kv_heads == self.num_heads else starts * (self.num_kv_heads * self.head_size)
        longest = _round_up(max_seqlen, _SMALLEST_MAX_SEQLEN)
        out: torch.Tensor
        out, _ = self._prefill(
            q_NHD,
            k_NKD,
            v_NKD,
            self.scale,
            self._workspace_on(q_NHD.device),
            max_token_per_sequence=longest,
            max_sequence_kv=longest,
            actual_seq_lens_q=lengths_B111,
            actual_seq_lens_kv=lengths_B111,
            causal=self.causal,
            return_lse=False,
            batch_offsets_q=q_offsets,
            batch_offsets_o=q_offsets,
            batch_offsets_k=kv_offsets,
            batch_offsets_v=kv_offsets,
            is_cuda_graph_compatible=True,
        )
        return out

    def _workspace_on(self, device: torch.device) -> torch.Tensor:
        """Scratch for cuDNN, shared by the layers; nothing in it outlives a call."""
        if self._workspace is None or self._workspace.device != device:
            self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.int8, device=device)
        return self._workspace


def _round_up(number: int, smallest: int) -> int:
    """To the next power of two, at least ``smallest``."""
    return max(smallest, 1 << (number - 1).bit_length())
