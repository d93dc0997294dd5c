"""What every backend is held to: the cases of ragged batches, heads and masks, and how far off it may be."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from encoder_svc.attention import MMEncoderAttention, PackedSequences
from encoder_svc.attention.selfcheck import TOLERANCES, relative_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encoder_svc.platforms import Platform

HEAD_SIZES = (64, 72, 80, 96, 128)
HEADS = {"MHA": (4, 4), "GQA": (4, 2)}
BATCHES = (
    (1,),
    (7,),
    (64,),
    (65,),
    (1024,),
    (1, 7, 64, 65, 1024),
    (65, 1024, 1, 64, 7, 1, 130, 64),
    (64,) * 9,
    (64, 64, 64, 32, 16, 64, 64, 16),
)
CASES = tuple(itertools.product(HEAD_SIZES, HEADS, (False, True)))
CASE_IDS = [f"{size}-{heads}-{'causal' if causal else 'bidirectional'}" for size, heads, causal in CASES]


def worst_error(
    platform: Platform,
    device: str,
    dtype: str,
    case: tuple[int, str, bool],
    *,
    backend: str,
    implementation: str | None = None,
    batches: Sequence[tuple[int, ...]] = BATCHES,
) -> float:
    """The largest relative error over ``batches``, and never beyond the dtype's tolerance."""
    head_size, heads, causal = case
    num_heads, num_kv_heads = HEADS[heads]
    layer = MMEncoderAttention(
        num_heads,
        head_size,
        num_kv_heads=num_kv_heads,
        attn_backend=backend,
        platform=platform,
        dtype=dtype,
        causal=causal,
        flash_attn_implementation=implementation,
    )
    worst = 0.0
    for seed, lengths in enumerate(batches):
        error = relative_error(layer, PackedSequences.of(lengths), device, seed=seed)
        assert error <= TOLERANCES[dtype], (backend, implementation, dtype, case, lengths)
        worst = max(worst, error)
    return worst
