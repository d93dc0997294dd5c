"""Kernels for CPUs with AVX512-BF16, in C: attention, with AMX where the CPU has it, and what lies between an encoder's
matrix products.

torch's products are fast on such a CPU (oneDNN), but its attention is not, and what lies between products takes it
several passes (docs/performance-cpu.md).

Shapes: N patches, H heads, D head_size, C values of a row.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from functools import cache
from typing import Final

import torch

from encoder_svc.attention.cpu_compiler import load_compiled

logger = logging.getLogger(__name__)

_POINTER, _STRIDE, _COUNT, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ATTEND: Final = (*[_POINTER] * 4, *[_STRIDE] * 4, _POINTER, _INT, _INT, _INT, _FLOAT, _INT)
_OPERATIONS: Final = {
    "rotate": (_POINTER, _STRIDE, _POINTER, _POINTER, _COUNT, _INT, _INT, _INT),
    "gate": (_POINTER, _COUNT, _FLOAT, _INT),
    "rms_norm": (*[_POINTER] * 3, _FLOAT, _COUNT, _INT, _INT, _INT),
    "layer_norm": (*[_POINTER] * 4, _FLOAT, _COUNT, _INT, _INT, _INT),
}
# Source, function and the largest head: with AMX a query's sums fill five of eight tiles.
_ATTENTION: Final = {
    "avx512_bf16": ("attention/cpu_attention.c", "attend", 128),
    "amx_bf16": ("attention/cpu_attention_amx.c", "attend_amx", 80),
}


class CpuKernels:
    """The compiled kernels, for bfloat16 on the CPU. They run on torch's threads.

    Args:
        form: of attention, ``"avx512_bf16"`` or ``"amx_bf16"``.
        definitions: macros to compile with.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, or it failed.
    """

    def __init__(self, form: str, *definitions: str) -> None:
        self.form = form
        source, self._attend, self._max_head_size = _ATTENTION[form]
        self._library = load_compiled(("attention/cpu_operations.c", source), *definitions)
        for name, arguments in (_OPERATIONS | {self._attend: _ATTEND}).items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, None

    def takes(self, head_size: int) -> bool:
        """Whether :meth:`attend` takes heads of this size."""
        return head_size % 2 == 0 and head_size <= self._max_head_size

    def attend(
        self, q_NHD: torch.Tensor, k_NHD: torch.Tensor, v_NHD: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Bidirectional attention within each sequence: [N, H, D]. Heads of a patch lie side by side in each input."""
        num_heads, head_size = q_NHD.shape[1:]
        inputs = [x if x.stride()[1:] == (head_size, 1) else x.contiguous() for x in (q_NHD, k_NHD, v_NHD)]
        out_NHD = torch.empty_like(q_NHD, memory_format=torch.contiguous_format)
        tensors = (*inputs, out_NHD)
        self._run(
            self._attend,
            *(x.data_ptr() for x in tensors),
            *(x.stride(0) for x in tensors),
            cu_seqlens.data_ptr(),
            len(cu_seqlens) - 1,
            num_heads,
            head_size,
            scale,
        )
        return out_NHD

    def rotate_(self, qkv_N3HD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotates q and k in place; cos and sin are float32 [N, D / 2]."""
        num_patches, _, num_heads, head_size = qkv_N3HD.shape
        cos, sin = cos.contiguous(), sin.contiguous()
        assert qkv_N3HD.is_contiguous()
        self._run(
            "rotate",
            qkv_N3HD.data_ptr(),
            qkv_N3HD.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            num_patches,
            2 * num_heads,
            head_size,
        )

    def gate_(self, x: torch.Tensor, slope: float) -> None:
        """``x · sigmoid(slope · x)`` in place."""
        assert x.is_contiguous()
        self._run("gate", x.data_ptr(), x.numel(), slope)

    def rms_norm(self, x_NC: torch.Tensor, weight_C: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm of each row."""
        return self._normed("rms_norm", x_NC, weight_C, eps=eps)

    def layer_norm(self, x_NC: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor, eps: float) -> torch.Tensor:
        """LayerNorm of each row."""
        return self._normed("layer_norm", x_NC, weight_C, bias_C, eps=eps)

    def norm_to_blocks(
        self, x_NC: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor | None, eps: float, out: torch.Tensor
    ) -> None:
        """LayerNorm, or RMSNorm without a bias, of each row to blocks (``cpu_vectors.h``)."""
        name, parameters = ("rms_norm", (weight_C,)) if bias_C is None else ("layer_norm", (weight_C, bias_C))
        self._norm(name, x_NC, *parameters, eps=eps, out=out, in_blocks=True)

    def _normed(self, name: str, x_NC: torch.Tensor, *parameters: torch.Tensor, eps: float) -> torch.Tensor:
        out_NC = torch.empty_like(x_NC, memory_format=torch.contiguous_format)
        self._norm(name, x_NC, *parameters, eps=eps, out=out_NC, in_blocks=False)
        return out_NC

    def _norm(
        self,
        name: str,
        x_NC: torch.Tensor,
        *parameters: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        in_blocks: bool,
    ) -> None:
        x_NC = x_NC.contiguous()
        self._run(name, *(x.data_ptr() for x in (x_NC, out, *parameters)), eps, *x_NC.shape, in_blocks)

    def _run(self, name: str, *arguments: float) -> None:
        with torch.profiler.record_function(f"cpu_kernels::{name}"):
            getattr(self._library, name)(*arguments, torch.get_num_threads())


def has_avx512_bf16() -> bool:
    """Whether this machine runs the kernels."""
    return torch.cpu._is_avx512_bf16_supported()


@cache
def has_amx() -> bool:
    """Whether this machine multiplies bfloat16 in tiles and its kernel lets this process do so."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


@cache
def cpu_kernels() -> CpuKernels | None:
    """The kernels, or None where they are made for another CPU, or cannot be compiled: then a warning says why."""
    if sys.platform != "linux" or not has_avx512_bf16():
        return None
    try:
        return CpuKernels("amx_bf16" if has_amx() else "avx512_bf16")
    except (OSError, subprocess.SubprocessError) as error:
        why = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("CPU kernels: not compiled, slower operations of torch take their place: %s", why)
        return None
