"""The kernel of attention/triton_windows.py. Imported only by it, for it needs Triton.

Shapes: M query rows, N key rows, each a whole window; F and G the first and the other values of a head, both powers of
two: a head of 80 is taken as 64 and 16, not padded to 128.
"""

# Triton's language has its own semantics and no types.
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl


@triton.jit
def windows(
    qkv_ptr,
    out_ptr,
    cu_seqlens_ptr,
    scale_log2,
    num_heads: tl.constexpr,
    head_size: tl.constexpr,
    block_f: tl.constexpr,
    block_g: tl.constexpr,
    precision: tl.constexpr,
    block: tl.constexpr,
):
    """One head of one sequence of at most ``block`` rows. Grid: (sequences, heads)."""
    row_size: tl.constexpr = 3 * num_heads * head_size
    start = tl.load(cu_seqlens_ptr + tl.program_id(0)).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + tl.program_id(0) + 1) - start).to(tl.int32)
    if length <= 0:
        return
    element = out_ptr.dtype.element_ty
    rows_M = tl.arange(0, block)
    f = tl.arange(0, block_f)[None, :]
    in_M = (rows_M < length)[:, None]
    in_MF = in_M & (f < head_size)
    q_ptr = qkv_ptr + start * row_size + tl.program_id(1) * head_size + rows_M[:, None] * row_size
    k_ptr = q_ptr + num_heads * head_size
    v_ptr = k_ptr + num_heads * head_size
    # All loads before the first product: with some of them after it, Triton 3.6 loses keys of the last one on an H100.
    q_MF = tl.load(q_ptr + f, in_MF, 0.0)
    k_NF = tl.load(k_ptr + f, in_MF, 0.0)
    v_NF = tl.load(v_ptr + f, in_MF, 0.0)
    if block_g > 0:
        g = block_f + tl.arange(0, block_g)[None, :]
        in_MG = in_M & (g < head_size)
        q_MG = tl.load(q_ptr + g, in_MG, 0.0)
        k_NG = tl.load(k_ptr + g, in_MG, 0.0)
        v_NG = tl.load(v_ptr + g, in_MG, 0.0)
    scores_MN = tl.dot(q_MF, tl.trans(k_NF), input_precision=precision)
    if block_g > 0:
        scores_MN = tl.dot(q_MG, tl.trans(k_NG), scores_MN, input_precision=precision)
    scores_MN = tl.where((rows_M < length)[None, :], scores_MN * scale_log2, float("-inf"))
    p_MN = tl.exp2(scores_MN - tl.max(scores_MN, 1)[:, None])
    sum_M = tl.sum(p_MN, 1)[:, None]
    p_MN = p_MN.to(element)
    out_rows = out_ptr + (start + rows_M[:, None]) * (num_heads * head_size) + tl.program_id(1) * head_size
    tl.store(out_rows + f, (tl.dot(p_MN, v_NF, input_precision=precision) / sum_M).to(element), in_MF)
    if block_g > 0:
        tl.store(out_rows + g, (tl.dot(p_MN, v_NG, input_precision=precision) / sum_M).to(element), in_MG)
