"""Attention on a CPU as two matrix products with a softmax between them, a block of queries at a time.

torch's fused kernel for CPUs multiplies bfloat16 with AMX, and without AMX slowly: 0.15 TFLOP/s on two Zen 5 cores,
where oneDNN's products reach 0.7. Scores are float32, as in the fused kernel: rounded to bfloat16 they would cost six
times its error where attention is peaked (docs/performance-cpu.md).

Shapes: G sequences times heads, L length of a sequence, D head_size.
"""

from __future__ import annotations

from typing import Any

import torch

# Scores held at a time: 8 MiB of float32, which are read again while they are in the last cache. Blocks of more than
# 32 MiB glibc maps anew in every call.
_MAX_SCORES = 2**21
_MIN_QUERIES = 64


def attend(q_GLD: torch.Tensor, k_GLD: torch.Tensor, v_GLD: torch.Tensor, scale: float) -> torch.Tensor:
    """Bidirectional attention in bfloat16: [G, L, D].

    Sets torch's precision of float32 matrix products while it runs; nothing else may multiply at that time.
    """
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    # Float32 in and out, bfloat16 inside: torch has no other way to get unrounded products of bfloat16. Queries and
    # keys lose nothing by it.
    products.fp32_precision = "bf16"
    try:
        return _attend(q_GLD.float(), k_GLD.float().transpose(1, 2), v_GLD, scale)
    finally:
        products.fp32_precision = before


def _attend(q_GLD: torch.Tensor, k_GDL: torch.Tensor, v_GLD: torch.Tensor, scale: float) -> torch.Tensor:
    groups, length, _ = q_GLD.shape
    groups_a_block = min(groups, max(torch.get_num_threads(), _MAX_SCORES // length**2))
    queries_a_block = _MAX_SCORES // (groups_a_block * length) // _MIN_QUERIES * _MIN_QUERIES
    queries_a_block = min(length, max(_MIN_QUERIES, queries_a_block))
    scores = torch.empty(groups_a_block * queries_a_block * length)
    weights = torch.empty(scores.shape, dtype=v_GLD.dtype)
    out_GLD = torch.empty_like(v_GLD)
    for q_gLD, k_gDL, v_gLD, out_gLD in zip(
        *(x.split(groups_a_block) for x in (q_GLD, k_GDL, v_GLD, out_GLD)), strict=True
    ):
        for q_gqD, out_gqD in zip(q_gLD.split(queries_a_block, 1), out_gLD.split(queries_a_block, 1), strict=True):
            shape = (*q_gqD.shape[:2], length)
            size = shape[0] * shape[1] * length
            scores_gqL, weights_gqL = scores[:size].view(shape), weights[:size].view(shape)
            torch.baddbmm(scores_gqL, q_gqD, k_gDL, beta=0, alpha=scale, out=scores_gqL)
            weights_gqL.copy_(torch.softmax(scores_gqL, -1, out=scores_gqL))
            torch.bmm(weights_gqL, v_gLD, out=out_gqD)
    return out_GLD
