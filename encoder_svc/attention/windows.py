"""Who takes the layers that attend within windows.

A backend that was chosen for long sequences is not the best for windows of 64 patches. Where the platform chose it,
such layers run on a kernel of their own, if that passes its check; the Selection says so. An override or a pin is
obeyed in every layer.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from encoder_svc.attention.base import PackedSequences
from encoder_svc.attention.selfcheck import TOLERANCES, current
from encoder_svc.attention.torch_naive import TorchNaive
from encoder_svc.attention.triton_windows import MAX_WINDOW_PATCHES, WindowAttention

if TYPE_CHECKING:
    from encoder_svc.attention.layer import MMEncoderAttention
    from encoder_svc.platforms import Platform

logger = logging.getLogger(__name__)

# An ordinary batch of windows, with smaller ones from the edges of an image, and an empty one.
_LENGTHS = (64, 64, 32, 16, 0, 4)


def choose_windows(
    attention: MMEncoderAttention, window_patches: int, platform: Platform, device: str, *, pinned: bool
) -> None:
    """Gives ``attention`` a kernel for windows, and its selection the word for it, where that is the better choice."""
    backend, selection = attention.backend, attention.selection
    fits = window_patches <= MAX_WINDOW_PATCHES and backend.head_size <= 128 and not backend.causal
    is_free = selection.source != "override" and not pinned and attention.dtype != "float32"
    if platform.name != "cuda" or not fits or not is_free or importlib.util.find_spec("triton") is None:
        return
    try:
        windows = WindowAttention(backend.num_heads, backend.head_size, backend.scale)
        with current(torch.device(device)):
            error = relative_error(windows, attention.dtype, device)
        if not error <= TOLERANCES[attention.dtype]:
            raise ValueError(f"it is off by {error:.1e} of TORCH_NAIVE in float32")
    except Exception as error:
        logger.warning("attention: TRITON_ATTN for windows failed its start-up check: %s", error)
        return
    attention.windows = windows
    attention.selection = replace(
        selection,
        windows=f"TRITON_ATTN (triton {version('triton')})",
        reason=f"{selection.reason.rstrip('.')}; windows of up to {MAX_WINDOW_PATCHES} patches run on "
        "TRITON_ATTN's kernel for them.",
    )


@torch.inference_mode()
def relative_error(windows: WindowAttention, dtype: str, device: torch.device | str) -> float:
    """‖out − reference‖ / ‖reference‖ on random input; the reference attends in float32."""
    generator = torch.Generator().manual_seed(0)
    shape = (sum(_LENGTHS), 3, windows.num_heads, windows.head_size)
    qkv_N3HD = torch.randn(shape, generator=generator).to(device, getattr(torch, dtype))
    out = windows(qkv_N3HD, PackedSequences.of(_LENGTHS).to(device))
    q_NHD, k_NHD, v_NHD = qkv_N3HD.float().unbind(1)
    reference = TorchNaive(
        num_heads=windows.num_heads,
        head_size=windows.head_size,
        scale=windows.scale,
        num_kv_heads=windows.num_heads,
        causal=False,
    ).forward(q_NHD, k_NHD, v_NHD, *PackedSequences.of([length for length in _LENGTHS if length]).to(device))
    return float((out.float() - reference).norm() / reference.norm())
