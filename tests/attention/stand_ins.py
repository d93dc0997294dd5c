"""Stand-ins for kernel packages that CI has no device for.

Each has the signature of the function it stands for, as that package's documentation gives it, checks what it is
passed as the real one would, and computes the true result.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from encoder_svc.attention.torch_naive import TorchNaive

if TYPE_CHECKING:
    import pytest

HALF = (torch.float16, torch.bfloat16)


def true_result(q, k, v, cu_seqlens, scale, causal) -> torch.Tensor:
    lengths = cu_seqlens.diff().tolist()
    naive = TorchNaive(
        num_heads=q.shape[1], head_size=q.shape[2], scale=scale, num_kv_heads=k.shape[1], causal=bool(causal)
    )
    return naive.forward(q, k, v, cu_seqlens, max(lengths), lengths)


def check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> None:
    """What every varlen flash-attention asks of its input."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in HALF
    assert q.dim() == k.dim() == v.dim() == 3
    assert k.shape == v.shape
    assert q.shape[0] == k.shape[0]
    assert q.shape[1] % k.shape[1] == 0
    assert q.shape[2] == k.shape[2]
    assert q.shape[2] % 8 == 0
    assert q.shape[2] <= 256
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    for cu_seqlens, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.dim() == 1
        assert cu_seqlens.is_contiguous()
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == q.shape[0]
        assert type(longest) is int
        assert longest >= int(cu_seqlens.diff().max())


def fa2_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """flash-attn 2.8: ``flash_attn.flash_attn_varlen_func``."""
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert (dropout_p, window_size, softcap, return_attn_probs) == (0.0, (-1, -1), 0.0, False)
    return true_result(q, k, v, cu_seqlens_q, softmax_scale, causal)


def fa3_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    """flash-attn 3: ``flash_attn_interface.flash_attn_varlen_func``. Earlier releases also returned the lse."""
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert qv is q_descale is k_descale is v_descale is None
    return true_result(q, k, v, cu_seqlens_q, softmax_scale, causal), torch.zeros(q.shape[1], q.shape[0])


def fa4_varlen(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    return_lse=False,
):  # fmt: skip
    """flash-attn 4: ``flash_attn.cute.flash_attn_varlen_func``."""
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert qv is seqused_q is seqused_k is page_table is None
    return true_result(q, k, v, cu_seqlens_q, softmax_scale, causal), None


def fa4_dense(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None)):
    """flash-attn 4: ``flash_attn.cute.flash_attn_func``, [batch, length, heads, head size]."""
    assert q.dim() == k.dim() == v.dim() == 4
    batch, length = q.shape[:2]
    cu_seqlens = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    check_packed(q, k, v, cu_seqlens, cu_seqlens, length, length)
    return true_result(q, k, v, cu_seqlens, softmax_scale, causal).unflatten(0, (batch, length)), None


def fa4_forward(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
    causal=False, tile_mn=None, mma_pv_is_rs=None, intra_wg_overlap=None,
):  # fmt: skip
    """flash-attn 4: ``flash_attn.cute.interface._flash_attn_fwd``."""
    assert (q.shape[2], tile_mn, mma_pv_is_rs, causal) == (80, (128, 128), True, False)
    return fa4_varlen(q, k, v, qv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=softmax_scale)


def torch_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False,
):  # fmt: skip
    """torch 2.13: ``torch.nn.attention.varlen.varlen_attn``."""
    check_packed(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size in ((-1, -1), (-1, 0))
    return true_result(query, key, value, cu_seq_q, scale, window_size == (-1, 0))


def aiter_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, min_seqlen_q=0, dropout_p=0.0,
    softmax_scale=None, logits_soft_cap=0.0, causal=False, window_size=(-1, -1), bias=None, alibi_slopes=None,
    deterministic=False, return_lse=False, return_attn_probs=False,
):  # fmt: skip
    """aiter: ``aiter.flash_attn_varlen_func``."""
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert (min_seqlen_q, dropout_p, logits_soft_cap, return_lse) == (0, 0.0, 0.0, False)
    return true_result(q, k, v, cu_seqlens_q, softmax_scale, causal)


def cudnn_prefill(
    q, k_cache, v_cache, scale, workspace_buffer, *, max_token_per_sequence, max_sequence_kv, actual_seq_lens_q=None,
    actual_seq_lens_kv=None, block_tables=None, causal, return_lse, q_scale=None, k_scale=None, v_scale=None,
    batch_offsets_q=None, batch_offsets_o=None, batch_offsets_k=None, batch_offsets_v=None, batch_offsets_stats=None,
    batch_offsets_units="elements", out=None, lse=None, is_cuda_graph_compatible=False, backend=None,
    o_data_type=None, lse_base="log2",
):  # fmt: skip
    """flashinfer 0.7: ``flashinfer.cudnn.cudnn_batch_prefill_with_kv_cache``."""
    assert q.is_contiguous()
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    assert workspace_buffer.dtype == torch.int8
    batch = actual_seq_lens_q.shape[0]
    assert batch & (batch - 1) == 0, "batches come in powers of two, so that few plans are built"
    for lengths in (actual_seq_lens_q, actual_seq_lens_kv):
        assert lengths.shape == (batch, 1, 1, 1)
        assert lengths.dtype == torch.int32
    rows = {"q": q, "o": q, "k": k_cache, "v": v_cache}
    offsets = {"q": batch_offsets_q, "o": batch_offsets_o, "k": batch_offsets_k, "v": batch_offsets_v}
    starts = torch.nn.functional.pad(actual_seq_lens_q.flatten().cumsum(0), (1, 0)).int()
    for name, offset in offsets.items():
        assert offset.dtype == torch.int32
        assert torch.equal(offset, starts * rows[name].shape[1] * rows[name].shape[2]), "in values, not in rows"
    used = [0, *(int(start) for start, length in zip(starts[1:], actual_seq_lens_q.flatten(), strict=True) if length)]
    cu_seqlens = torch.tensor(used, dtype=torch.int32)
    check_packed(q, k_cache, v_cache, cu_seqlens, cu_seqlens, max_token_per_sequence, max_sequence_kv)
    assert not return_lse
    return true_result(q, k_cache, v_cache, cu_seqlens, scale, causal), None


class BlockDiagonalMask:
    """xformers: ``xformers.ops.fmha.attn_bias.BlockDiagonalMask``."""

    def __init__(self, lengths: list[int], device: torch.device, *, causal: bool = False) -> None:
        assert isinstance(lengths, list)
        self.lengths, self.device, self.causal = lengths, device, causal

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None) -> BlockDiagonalMask:
        return cls(q_seqlen, device)

    def make_causal(self) -> BlockDiagonalMask:
        return BlockDiagonalMask(self.lengths, self.device, causal=True)


def xformers_forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """xformers 0.0.35: ``xformers.ops.memory_efficient_attention_forward``; [1, N, H, D], or [1, N, G, H, D]."""
    assert isinstance(attn_bias, BlockDiagonalMask)
    assert attn_bias.device == query.device
    assert p == 0.0
    assert query.shape == key.shape == value.shape
    assert query.shape[0] == 1
    assert sum(attn_bias.lengths) == query.shape[1]
    assert query.shape[-1] % 8 == 0
    if query.dim() == 5:
        assert key.stride(3) == value.stride(3) == 0, "grouped heads are expanded, not copied"
    cu_seqlens = torch.tensor([0, *attn_bias.lengths], dtype=torch.int32).cumsum(0).int()
    q, k, v = (x[0].flatten(1, -2) for x in (query, key, value))
    return true_result(q, k, v, cu_seqlens, scale, attn_bias.causal).view(query.shape)


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Puts modules of these names and contents, and their parents, where ``import`` finds them."""
    names = {name.rsplit(".", cut)[0] for name in modules for cut in range(name.count(".") + 1)}
    for name in sorted(names):
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    for name, contents in modules.items():
        for attribute, value in contents.items():
            setattr(sys.modules[name], attribute, value)
