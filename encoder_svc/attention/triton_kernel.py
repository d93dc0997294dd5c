"""TRITON_ATTN's kernel. Imported only by that backend, for it needs Triton.

Shapes: M query rows and N key rows of a block; a head's values are split in two parts, A and B (B may be empty).
"""

# Triton's language has its own semantics and no types.
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl


@triton.jit
def packed_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    cu_seqlens_ptr,
    scale_log2,
    blocks_per_sequence,
    q_stride_n,
    q_stride_h,
    k_stride_n,
    k_stride_h,
    v_stride_n,
    v_stride_h,
    out_stride_n,
    out_stride_h,
    unit: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    main: tl.constexpr,
    rest: tl.constexpr,
    causal: tl.constexpr,
    precision: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
):
    """One block of query rows of one head of one sequence. Grid: (sequences × blocks_per_sequence, heads).

    Strides are counted in units of ``unit`` values.
    """
    q_stride_n *= unit
    q_stride_h *= unit
    k_stride_n *= unit
    k_stride_h *= unit
    v_stride_n *= unit
    v_stride_h *= unit
    out_stride_n *= unit
    out_stride_h *= unit
    sequence = tl.program_id(0) // blocks_per_sequence
    first_m = (tl.program_id(0) % blocks_per_sequence) * block_m
    head = tl.program_id(1)
    # 64 bits for where a sequence begins; within one, 32 hold half a million rows.
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + sequence + 1) - start).to(tl.int32)
    if first_m >= length:
        return

    rows_M = first_m + tl.arange(0, block_m)
    cols_N = tl.arange(0, block_n)
    a = tl.arange(0, main)
    b = main + tl.arange(0, rest if rest else 16)
    q_rows = q_ptr + start * q_stride_n + head * q_stride_h + rows_M[:, None] * q_stride_n
    k_cols = k_ptr + start * k_stride_n + (head // group) * k_stride_h + cols_N[None, :] * k_stride_n
    v_rows = v_ptr + start * v_stride_n + (head // group) * v_stride_h + cols_N[:, None] * v_stride_n
    out_rows = out_ptr + start * out_stride_n + head * out_stride_h + rows_M[:, None] * out_stride_n
    in_M = rows_M[:, None] < length
    q_MA = tl.load(q_rows + a[None, :], in_M & (a < head_size)[None, :], 0.0)
    q_MB = tl.load(q_rows + b[None, :], in_M & (b < head_size)[None, :], 0.0)

    highest_M = tl.full([block_m], float("-inf"), tl.float32)
    sum_M = tl.zeros([block_m], tl.float32)
    out_MA = tl.zeros_like(q_MA).to(tl.float32)
    out_MB = tl.zeros_like(q_MB).to(tl.float32)
    # Blocks of keys that every query row sees whole need no mask.
    whole = length // block_n * block_n
    end = length
    if causal:
        whole = tl.minimum(whole, first_m // block_n * block_n)
        end = tl.minimum(length, first_m + block_m)
    for first_n in range(0, whole, block_n):
        highest_M, sum_M, out_MA, out_MB = _see_keys(
            highest_M, sum_M, out_MA, out_MB, q_MA, q_MB, k_cols + first_n * k_stride_n, v_rows + first_n * v_stride_n,
            a, b, rows_M, first_n + cols_N, length, scale_log2, head_size, rest, causal, precision, masked=False,
        )  # fmt: skip
    for first_n in range(whole, end, block_n):
        highest_M, sum_M, out_MA, out_MB = _see_keys(
            highest_M, sum_M, out_MA, out_MB, q_MA, q_MB, k_cols + first_n * k_stride_n, v_rows + first_n * v_stride_n,
            a, b, rows_M, first_n + cols_N, length, scale_log2, head_size, rest, causal, precision, masked=True,
        )  # fmt: skip

    element = out_ptr.dtype.element_ty
    tl.store(out_rows + a[None, :], (out_MA / sum_M[:, None]).to(element), in_M & (a < head_size)[None, :])
    if rest:
        tl.store(out_rows + b[None, :], (out_MB / sum_M[:, None]).to(element), in_M & (b < head_size)[None, :])


@triton.jit
def _see_keys(
    highest_M, sum_M, out_MA, out_MB, q_MA, q_MB, k_cols, v_rows, a, b, rows_M, cols_N, length, scale_log2,
    head_size: tl.constexpr, rest: tl.constexpr, causal: tl.constexpr, precision: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """One block of keys and values, by the online softmax: highest score, sum and outputs so far, and after it."""
    in_a, in_b, in_N = a < head_size, b < head_size, cols_N < length
    if masked:
        k_AN = tl.load(k_cols + a[:, None], in_a[:, None] & in_N[None, :], 0.0)
        v_NA = tl.load(v_rows + a[None, :], in_N[:, None] & in_a[None, :], 0.0)
    else:
        k_AN = tl.load(k_cols + a[:, None], in_a[:, None], 0.0)
        v_NA = tl.load(v_rows + a[None, :], in_a[None, :], 0.0)
    scores_MN = tl.dot(q_MA, k_AN, input_precision=precision)
    if rest:
        if masked:
            k_BN = tl.load(k_cols + b[:, None], in_b[:, None] & in_N[None, :], 0.0)
            v_NB = tl.load(v_rows + b[None, :], in_N[:, None] & in_b[None, :], 0.0)
        else:
            k_BN = tl.load(k_cols + b[:, None], in_b[:, None], 0.0)
            v_NB = tl.load(v_rows + b[None, :], in_b[None, :], 0.0)
        scores_MN = tl.dot(q_MB, k_BN, scores_MN, input_precision=precision)
    scores_MN *= scale_log2
    if masked:
        seen_MN = in_N[None, :]
        if causal:
            seen_MN = seen_MN & (cols_N[None, :] <= rows_M[:, None])
        scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
    # Never -inf: the first block holds key 0, which every row sees.
    new_highest_M = tl.maximum(highest_M, tl.max(scores_MN, 1))
    shrink_M = tl.exp2(highest_M - new_highest_M)
    p_MN = tl.exp2(scores_MN - new_highest_M[:, None])
    sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
    p_MN = p_MN.to(q_MA.dtype)
    out_MA = tl.dot(p_MN, v_NA, out_MA * shrink_M[:, None], input_precision=precision)
    if rest:
        out_MB = tl.dot(p_MN, v_NB, out_MB * shrink_M[:, None], input_precision=precision)
    return new_highest_M, sum_M, out_MA, out_MB
