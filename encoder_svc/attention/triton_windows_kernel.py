"""The kernel of attention/triton_windows.py. Imported only by it, for it needs Triton.

Shapes: M query rows, N key rows, each a whole window; F half a head's values, padded to a power of two: the rotation
takes a head in halves, and so does all else here.
"""

# Triton's language has its own semantics and no types.
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl


@triton.jit
def rotated_windows(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    cu_seqlens_ptr,
    scale_log2,
    num_heads: tl.constexpr,
    head_size: tl.constexpr,
    block_f: tl.constexpr,
    precision: tl.constexpr,
    block: tl.constexpr,
):
    """One head of one sequence of at most ``block`` rows. Grid: (sequences, heads)."""
    half: tl.constexpr = head_size // 2
    row_size: tl.constexpr = 3 * num_heads * head_size
    start = tl.load(cu_seqlens_ptr + tl.program_id(0)).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + tl.program_id(0) + 1) - start).to(tl.int32)
    if length <= 0:
        return
    element = out_ptr.dtype.element_ty
    rows_M = tl.arange(0, block)
    f = tl.arange(0, block_f)
    in_M = (rows_M < length)[:, None]
    in_MF = in_M & (f < half)[None, :]

    angles = start * half + rows_M[:, None] * half + f[None, :]
    cos_MF = tl.load(cos_ptr + angles, in_MF, 0.0)
    sin_MF = tl.load(sin_ptr + angles, in_MF, 0.0)
    q_ptr = qkv_ptr + start * row_size + tl.program_id(1) * head_size + rows_M[:, None] * row_size
    k_ptr = q_ptr + num_heads * head_size
    v_ptr = k_ptr + num_heads * head_size
    q1 = tl.load(q_ptr + f[None, :], in_MF, 0.0).to(tl.float32)
    q2 = tl.load(q_ptr + half + f[None, :], in_MF, 0.0).to(tl.float32)
    k1 = tl.load(k_ptr + f[None, :], in_MF, 0.0).to(tl.float32)
    k2 = tl.load(k_ptr + half + f[None, :], in_MF, 0.0).to(tl.float32)
    # Rounded to the tensors' dtype, as rotated q and k are anywhere else.
    q1_MF = (q1 * cos_MF - q2 * sin_MF).to(element)
    q2_MF = (q2 * cos_MF + q1 * sin_MF).to(element)
    k1_NF = (k1 * cos_MF - k2 * sin_MF).to(element)
    k2_NF = (k2 * cos_MF + k1 * sin_MF).to(element)
    scores_MN = tl.dot(q1_MF, tl.trans(k1_NF), input_precision=precision)
    scores_MN = tl.dot(q2_MF, tl.trans(k2_NF), scores_MN, input_precision=precision)
    scores_MN = tl.where((rows_M < length)[None, :], scores_MN * scale_log2, float("-inf"))
    p_MN = tl.exp2(scores_MN - tl.max(scores_MN, 1)[:, None])
    sum_M = tl.sum(p_MN, 1)[:, None]
    p_MN = p_MN.to(element)
    out_rows = out_ptr + (start + rows_M[:, None]) * (num_heads * head_size) + tl.program_id(1) * head_size + f[None, :]
    v1_NF = tl.load(v_ptr + f[None, :], in_MF, 0.0)
    v2_NF = tl.load(v_ptr + half + f[None, :], in_MF, 0.0)
    tl.store(out_rows, (tl.dot(p_MN, v1_NF, input_precision=precision) / sum_M).to(element), in_MF)
    tl.store(out_rows + half, (tl.dot(p_MN, v2_NF, input_precision=precision) / sum_M).to(element), in_MF)
