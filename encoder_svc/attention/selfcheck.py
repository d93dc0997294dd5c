"""The start-up check: the selected kernel runs once against TORCH_NAIVE in float32 before anything is served.

A kernel that the platform chose and that fails here is passed over with a warning; one that the operator chose is not
replaced, and nothing is served.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

import torch

from encoder_svc.attention.base import PackedSequences
from encoder_svc.attention.torch_naive import TorchNaive
from encoder_svc.errors import AttentionBackendError, AttentionKernelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from encoder_svc.attention.layer import MMEncoderAttention

logger = logging.getLogger(__name__)

TOLERANCES: Final = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}
"""Largest relative error, ‖out − reference‖ / ‖reference‖, by dtype."""

# A ragged batch, then windows of one length, which some backends take by another path.
_BATCHES: Final = ((1, 7, 64, 65), (64, 64, 64))


def checked_attention(
    build: Callable[[Mapping[tuple[str, str], str]], MMEncoderAttention], device: torch.device | str
) -> MMEncoderAttention:
    """The first attention layer that passes the check.

    Args:
        build: makes the layer, passing over the (backend, implementation) pairs that it is given.

    Raises:
        AttentionBackendError: an override or a pin failed, or nothing passes.
    """
    failed: dict[tuple[str, str], str] = {}
    while True:
        try:
            attention = build(failed)
            check(attention, device)
            return attention
        except AttentionKernelError as error:
            kernel = (error.backend, error.implementation)
            # A platform that offers the same kernel again does not choose: the operator did.
            if kernel in failed:
                raise AttentionBackendError(
                    f"{error.backend} ({error.implementation}) failed its start-up check: {error.why}"
                ) from error
            failed[kernel] = f"failed its start-up check: {error.why}"
            logger.warning("attention: %s (%s) failed its start-up check: %s", *kernel, error.why)


def check(attention: MMEncoderAttention, device: torch.device | str) -> None:
    """Runs the layer once on small ragged input, and on what its backend names besides.

    Raises:
        AttentionKernelError: an exception, a NaN, or an error beyond :data:`TOLERANCES`.
    """
    selection, tolerance = attention.selection, TOLERANCES[attention.dtype]
    for lengths in (*_BATCHES, *attention.backend.more_to_check(torch.device(device))):
        error = relative_error(attention, PackedSequences.of(lengths), device)
        if not error <= tolerance:  # NaN is not <= anything
            raise AttentionKernelError(
                selection.backend,
                selection.implementation,
                f"on sequences of {lengths} patches it is off by {error:.1e} of TORCH_NAIVE in float32, more than the "
                f"{tolerance:.0e} allowed for {attention.dtype}",
            )


def relative_error(
    attention: MMEncoderAttention, sequences: PackedSequences, device: torch.device | str, *, seed: int = 0
) -> float:
    """‖out − reference‖ / ‖reference‖ on random input; the reference is TORCH_NAIVE in float32 on the same input."""
    backend = attention.backend
    generator = torch.Generator().manual_seed(seed)
    heads = (backend.num_heads, backend.num_kv_heads, backend.num_kv_heads)
    shapes = [(sum(sequences.lengths), num_heads, backend.head_size) for num_heads in heads]
    dtype = getattr(torch, attention.dtype)
    q_NHD, k_NKD, v_NKD = (torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes)
    sequences = sequences.to(device)
    with torch.inference_mode(), current(torch.device(device)):
        out = attention(q_NHD, k_NKD, v_NKD, *sequences)
        if out.shape != q_NHD.shape or out.dtype != dtype:
            raise AttentionKernelError(
                attention.selection.backend,
                attention.selection.implementation,
                f"it returned {tuple(out.shape)} of {out.dtype} for {tuple(q_NHD.shape)} of {dtype}",
            )
        reference = TorchNaive(
            num_heads=backend.num_heads,
            head_size=backend.head_size,
            scale=backend.scale,
            num_kv_heads=backend.num_kv_heads,
            causal=backend.causal,
        ).forward(q_NHD.float(), k_NKD.float(), v_NKD.float(), *sequences)
        return float((out.float() - reference).norm() / reference.norm())


def current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, wherever its tensors are. For batches the runner's streams set it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
