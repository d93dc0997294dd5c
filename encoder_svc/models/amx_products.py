"""Matrix products with AMX, in C: ``amx_products.c``, compiled where it runs.

oneDNN multiplies with AMX too, but what surrounds a product is then copied: rows into its layout and out of it, sums
into the residual. Here norms and activations write what the next product reads, and residuals are added in place.

Shapes: N rows, I inputs, O outputs; blocks are those of ``cpu_vectors.h``, panels those of ``amx_products.c``.
"""

from __future__ import annotations

import ctypes
import math
from typing import Final

import torch
import torch.nn.functional as F

from encoder_svc.attention.cpu_compiler import load_compiled

_BLOCK: Final = 32
_TILE: Final = 16
_MAX_GROUP: Final = 9
_STEPS: Final = 54
# What becomes of a product.
_ACTIVATED, _ADDED, _IN_BLOCKS = 1, 2, 4

SIGMOIDS: Final = {
    "quick_gelu": (1.702, 0.0),
    "silu": (1.0, 0.0),
    "gelu_pytorch_tanh": (2 * (2 / torch.pi) ** 0.5, 0.044715),
}
"""Activations that are ``x · sigmoid(slope · (x + cubic · x³))``, with slope and cubic."""

_POINTER, _INT, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


class AmxProducts:
    """The compiled products, of bfloat16, on torch's threads.

    Args:
        definitions: macros to compile with.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, or it failed.
    """

    def __init__(self, *definitions: str) -> None:
        library = load_compiled(("models/amx_products.c",), *definitions)
        self._multiply, self._lay_out_rows = library.multiply_amx, library.lay_out_rows
        self._multiply_rotated = library.multiply_rotated_amx
        self._multiply.argtypes = (*[_POINTER] * 6, *[_INT] * 4, _FLOAT, _FLOAT, _INT)
        self._lay_out_rows.argtypes = (_POINTER, _POINTER, _COUNT, _INT, _INT)
        self._multiply_rotated.argtypes = (*[_POINTER] * 7, *[_INT] * 5)
        self._multiply.restype = self._lay_out_rows.restype = self._multiply_rotated.restype = None

    @staticmethod
    def empty_blocks(num_rows: int, size: int) -> torch.Tensor:
        """Room for blocks of ``num_rows`` rows."""
        return torch.empty(-(-num_rows // _BLOCK), -(-size // _BLOCK), _BLOCK, _BLOCK, dtype=torch.bfloat16)

    def blocks(self, x_NI: torch.Tensor) -> torch.Tensor:
        """``x`` in blocks."""
        x_NI = x_NI.contiguous()
        blocks = self.empty_blocks(*x_NI.shape)
        with torch.profiler.record_function("amx_products::copy_to_blocks"):
            self._lay_out_rows(x_NI.data_ptr(), blocks.data_ptr(), *x_NI.shape, torch.get_num_threads())
        return blocks

    @staticmethod
    def panels(weight_OI: torch.Tensor) -> torch.Tensor:
        """Weights as panels."""
        padded = F.pad(weight_OI, (0, -weight_OI.shape[1] % _BLOCK, 0, -weight_OI.shape[0] % _BLOCK))
        tiles = padded.unflatten(1, (-1, _TILE, 2)).unflatten(0, (-1, 2, _TILE))
        panels: torch.Tensor = tiles.permute(0, 3, 1, 4, 2, 5).contiguous()
        return panels

    def multiply(
        self,
        blocks: torch.Tensor,
        panels: torch.Tensor,
        bias_O: torch.Tensor,
        out: torch.Tensor,
        num_rows: int,
        *,
        gate_bias_O: torch.Tensor | None = None,
        act: str | None = None,
        add: bool = False,
        in_blocks: bool = False,
    ) -> None:
        """``act(x Wᵀ + b)`` to ``out``.

        Args:
            panels: with ``gate_bias``, gate's and up's by turns, and it is ``act(gate) · up``.
            out: contiguous [N, O], or ``in_blocks``.
            act: one of :data:`SIGMOIDS`.
            add: to what is in ``out``.
        """
        assert out.is_contiguous()
        how = (act is not None) * _ACTIVATED + add * _ADDED + in_blocks * _IN_BLOCKS
        pointers = [x.data_ptr() for x in (blocks, panels, bias_O)]
        pointers += [0 if gate_bias_O is None else gate_bias_O.data_ptr(), out.data_ptr()]
        sums = self._room_for_sums(blocks, panels)
        pointers.append(sums.data_ptr())
        sizes = (num_rows, blocks.shape[1], len(bias_O))
        slope, cubic = SIGMOIDS[act] if act else (0.0, 0.0)
        with torch.profiler.record_function("amx_products::gemm"):
            self._multiply(*pointers, *sizes, how, slope, cubic, torch.get_num_threads())

    @staticmethod
    def _room_for_sums(blocks: torch.Tensor, panels: torch.Tensor) -> torch.Tensor:
        """Of all panels and blocks, where rows are too long to be multiplied at once."""
        num_blocks, num_steps = blocks.shape[:2]
        num_panels = panels.numel() // (num_steps * _BLOCK**2) if num_steps > _STEPS else 0
        return torch.empty(num_panels, num_blocks, _BLOCK, _BLOCK)

    @staticmethod
    def rotates(head_size: int) -> bool:
        """Whether :meth:`multiply_rotated` takes heads of this size."""
        return head_size % 2 == 0 and math.lcm(head_size, _BLOCK) <= _MAX_GROUP * _BLOCK

    def multiply_rotated(
        self,
        blocks: torch.Tensor,
        panels: torch.Tensor,
        bias_O: torch.Tensor,
        out_N3HD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> None:
        """q, k and v to ``out``, q and k rotated before anything is rounded. cos and sin are float32 [N, D / 2]."""
        assert out_N3HD.is_contiguous()
        num_rows, _, _, head_size = out_N3HD.shape
        cos, sin = cos.contiguous(), sin.contiguous()
        sums = self._room_for_sums(blocks, panels)
        pointers = [x.data_ptr() for x in (blocks, panels, bias_O, out_N3HD, sums, cos, sin)]
        sizes = (num_rows, blocks.shape[1], len(bias_O), head_size)
        with torch.profiler.record_function("amx_products::gemm_rotated"):
            self._multiply_rotated(*pointers, *sizes, torch.get_num_threads())
