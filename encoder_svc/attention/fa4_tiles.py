"""Smaller tiles for flash-attn 4 on Hopper, where its own leave much of the GPU idle.

For heads of 80 it takes 192 queries at a time: one image of 1,024 patches and 16 heads makes 96 tiles for the 132
multiprocessors of an H100. Of 128 queries it makes 128 tiles, each done sooner. By a sweep over tiles and shapes
(docs/performance-gpu.md).
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HEAD_SIZE: Final = 80
"""The head size that this holds for: that of all released encoders, padded or not."""

_OWN_ROWS: Final = 192
_ROWS, _COLUMNS = 128, 128
# How long a wave of the smaller tiles takes, as a part of one of its own.
_TIME_OF_A_WAVE: Final = 0.8
_HOPPER: Final = 9
_PARAMETERS: Final = frozenset(
    ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "tile_mn", "mma_pv_is_rs")
)


def takes_tiles(function: Callable[..., Any]) -> bool:
    """Whether flash-attn 4's own function can be told its tiles, which its public ones do not offer."""
    return inspect.signature(function).parameters.keys() >= _PARAMETERS


@cache
def hopper_multiprocessors(device: torch.device) -> int:
    """How many a Hopper GPU has; 0 for any other device."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return 0
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def smaller_are_faster(lengths: Sequence[int], num_heads: int, num_multiprocessors: int) -> bool:
    """By how often all multiprocessors take a tile."""
    own, smaller = (
        -(-num_heads * sum(-(-length // rows) for length in lengths) // num_multiprocessors)
        for rows in (_OWN_ROWS, _ROWS)
    )
    return _TIME_OF_A_WAVE * smaller < own


def lengths_of_its_own(num_heads: int, num_multiprocessors: int) -> tuple[int, ...]:
    """Of a small ragged batch that its own tiles are faster for: they make one wave, and smaller ones two."""
    tiles = max(2, num_multiprocessors // num_heads)
    return ((tiles - 1) * _OWN_ROWS, 100)


def smaller_tiled(function: Callable[..., Any], scale: float) -> Callable[..., torch.Tensor]:
    """Attention of q, k, v, ``cu_seqlens`` and the longest sequence by flash-attn 4's own ``function``."""

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> torch.Tensor:
        out: torch.Tensor = function(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=scale,
            tile_mn=(_ROWS, _COLUMNS),
            mma_pv_is_rs=True,
        )[0]
        return out

    return run
