"""Kernels for CPUs with AVX512-BF16 and no AMX: ``cpu_kernels.c``, compiled where it runs, as Triton compiles its own.

torch's products are fast on such a CPU (oneDNN), but its attention is not, and what lies between products takes it
several passes (docs/performance.md, "CPU"). Compiling takes about a second, once a process.

Shapes: N patches, H heads, D head_size, C values of a row.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Final

import torch

logger = logging.getLogger(__name__)

_FLAGS: Final = (
    *("-O3", "-fno-math-errno", "-fPIC", "-fopenmp", "-mprefer-vector-width=512"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"),
)
_COMPILE_LIMIT_S: Final = 60
_MAX_HEAD_SIZE: Final = 128

_POINTER, _STRIDE, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int
_ARGUMENTS: Final = {
    "attend": (*[_POINTER] * 4, *[_STRIDE] * 4, _POINTER, _INT, _INT, _INT, ctypes.c_float, _INT),
    "rotate": (_POINTER, _STRIDE, _POINTER, _POINTER, _COUNT, _INT, _INT, _INT),
    "gate": (_POINTER, _COUNT, ctypes.c_float, _INT),
    "rms_norm": (_POINTER, _POINTER, _POINTER, ctypes.c_float, _COUNT, _INT, _INT),
}


class CpuKernels:
    """The compiled kernels, for bfloat16 on the CPU. They run on torch's threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None

    @staticmethod
    def takes(head_size: int) -> bool:
        """Whether :meth:`attend` and :meth:`rotate_` take heads of this size."""
        return head_size % 2 == 0 and head_size <= _MAX_HEAD_SIZE

    def attend(
        self, q_NHD: torch.Tensor, k_NHD: torch.Tensor, v_NHD: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Bidirectional attention within each sequence: [N, H, D]. Heads of a patch lie side by side in each input."""
        num_heads, head_size = q_NHD.shape[1:]
        inputs = [x if x.stride()[1:] == (head_size, 1) else x.contiguous() for x in (q_NHD, k_NHD, v_NHD)]
        out_NHD = torch.empty_like(q_NHD, memory_format=torch.contiguous_format)
        tensors = (*inputs, out_NHD)
        self._run(
            "attend",
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
        assert qkv_N3HD.is_contiguous()
        self._run(
            "rotate",
            qkv_N3HD.data_ptr(),
            qkv_N3HD.stride(0),
            cos.contiguous().data_ptr(),
            sin.contiguous().data_ptr(),
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
        x_NC = x_NC.contiguous()
        out_NC = torch.empty_like(x_NC)
        pointers = (x.data_ptr() for x in (x_NC, out_NC, weight_C))
        self._run("rms_norm", *pointers, eps, *x_NC.shape)
        return out_NC

    def _run(self, name: str, *arguments: float) -> None:
        with torch.profiler.record_function(f"cpu_kernels::{name}"):
            getattr(self._library, name)(*arguments, torch.get_num_threads())


def are_made_for_this_cpu() -> bool:
    """Whether this machine multiplies bfloat16 by AVX-512 and not by AMX."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


@cache
def cpu_kernels() -> CpuKernels | None:
    """The kernels, or None where they are made for another CPU, or cannot be compiled: then a warning says why."""
    if sys.platform != "linux" or not are_made_for_this_cpu():
        return None
    try:
        return CpuKernels(_loaded(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        why = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("CPU kernels: not compiled, slower operations of torch take their place: %s", why)
        return None


def _compiled() -> bytes:
    """The shared library.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, or it failed.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler (gcc) on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        source, made, library = (Path(folder) / name for name in ("kernels.c", "kernels.o", "kernels.so"))
        source.write_text(files("encoder_svc.attention").joinpath("cpu_kernels.c").read_text())
        # Two steps: linked with -fopenmp it would bring a second OpenMP runtime, whose threads fight with torch's.
        for arguments in ((*_FLAGS, "-c", str(source), "-o", str(made)), ("-shared", str(made), "-o", str(library))):
            subprocess.run(  # noqa: S603 - the program is the compiler, the arguments our own
                [compiler, *arguments], check=True, capture_output=True, text=True, timeout=_COMPILE_LIMIT_S
            )
        return library.read_bytes()


def _loaded(library: bytes) -> ctypes.CDLL:
    """Loads it from memory: a container's /tmp may be mounted noexec."""
    file = os.memfd_create("encoder_svc_cpu_kernels")
    try:
        with os.fdopen(os.dup(file), "wb") as writer:
            writer.write(library)
        return ctypes.CDLL(f"/proc/self/fd/{file}")
    finally:
        os.close(file)
