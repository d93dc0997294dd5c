"""Which operations an encoder runs on. Like the attention kernel, they are checked once, on the device, before anything
is served; what fails gives way to the next, with a warning.
"""

from __future__ import annotations

import importlib.util
import logging
from copy import deepcopy
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from encoder_svc.attention.selfcheck import current
from encoder_svc.errors import ConfigError
from encoder_svc.models.ops import NormWeights, Ops
from encoder_svc.models.positions import inverse_frequencies

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc.attention.cpu_kernels import CpuKernels

logger = logging.getLogger(__name__)

TOLERANCES: Final = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Largest relative error of a block's MLP, of its attention's scores and of its values, by dtype."""
FP8_TOLERANCE: Final = 8e-2
"""The same with quantised weights: e4m3 rounds each value by up to 6 %."""

# Of the block that is checked.
_ROWS: Final = 72
_HIDDEN: Final = 128
_HEADS: Final = 2

_HOPPER: Final = (9, 0)
_FP8_CAPABILITY: Final = (8, 9)


def refuse_quantisation(quantisation: str, device: str, dtype: str) -> None:
    """Refuses, before a weight is read, a quantisation that this device cannot do.

    Raises:
        ConfigError: says what it needs.
    """
    if quantisation == "none":
        return
    needs = f"--quantization {quantisation} needs an NVIDIA GPU of compute capability 8.9 or more and bfloat16"
    if not device.startswith("cuda") or torch.version.hip is not None:
        raise ConfigError(f"{needs}; the device is {device}.")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _FP8_CAPABILITY:
        raise ConfigError(f"{needs}; this one's is {major}.{minor}.")
    if dtype != "bfloat16":
        raise ConfigError(f"{needs}; the dtype is {dtype}.")


def ops_for(
    device: torch.device, dtype: torch.dtype, act: str = "silu", *, gated: bool = False, quantisation: str = "none"
) -> Ops:
    """The fastest operations for ``device`` in ``dtype`` that pass their check.

    Args:
        act, gated: the MLP that they will run.
        quantisation: ``"none"`` or ``"fp8"``; see :func:`refuse_quantisation`.

    Raises:
        ConfigError: quantised operations fail their check; nothing takes their place.
    """
    if quantisation == "none":
        return _first_that_passes(_candidates(device, dtype), device, dtype, act, gated=gated)
    from encoder_svc.models.ops_fp8 import Fp8Ops

    edge = _first_that_passes(_candidates(device, dtype), device, dtype, act, gated=gated)
    if edge.name == "quack":
        candidates = {"fp8_quack": lambda: _quack_fp8(device, edge)}
        ops = _first_that_passes(candidates, device, dtype, act, gated=gated, tolerance=FP8_TOLERANCE)
        if ops.name == "fp8_quack":
            return ops
    candidates = _candidates(device, dtype, rotates_in_product=False)
    quantised = Fp8Ops(device, _first_that_passes(candidates, device, dtype, act, gated=gated))
    try:
        check(quantised, device, dtype, act, gated=gated, tolerance=FP8_TOLERANCE)
    except Exception as error:
        raise ConfigError(f"--quantization {quantisation}: {type(error).__name__}: {error}") from error
    return quantised


def _first_that_passes(
    candidates: dict[str, Callable[[], Ops]],
    device: torch.device,
    dtype: torch.dtype,
    act: str,
    *,
    gated: bool,
    tolerance: float | None = None,
) -> Ops:
    for name, make in candidates.items():
        try:
            candidate = make()
            check(candidate, device, dtype, act, gated=gated, tolerance=tolerance)
        except Exception as error:
            logger.warning("operations: %s passed over: %s: %s", name, type(error).__name__, error)
            continue
        return candidate
    return Ops()


def describe(ops: Ops) -> str:
    """Name and the versions of the packages that it runs on, then those of the first block's where these are others.

    Part of the config hash.
    """
    packages = {
        "triton": ("triton",),
        "quack": ("triton", "quack-kernels"),
        "fp8": ("triton",),
        "fp8_quack": ("triton", "quack-kernels"),
    }
    used = dict.fromkeys((ops, ops.of_block(0, 3)))
    return ", ".join(
        " ".join([some.name, *(f"{package} {version(package)}" for package in packages.get(some.name, ()))])
        for some in used
    )


def _candidates(
    device: torch.device, dtype: torch.dtype, *, rotates_in_product: bool = True
) -> dict[str, Callable[[], Ops]]:
    candidates: dict[str, Callable[[], Ops]] = {}
    if device.type == "cpu":
        return _cpu_candidates(dtype)
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return candidates
    is_hopper = torch.cuda.get_device_capability(device) == _HOPPER
    if is_hopper and dtype != torch.float32 and importlib.util.find_spec("quack") is not None:
        candidates["quack"] = lambda: _quack(device, rotates_in_product=rotates_in_product)
    candidates["triton"] = lambda: _triton(device)
    return candidates


def _cpu_candidates(dtype: torch.dtype) -> dict[str, Callable[[], Ops]]:
    from encoder_svc.attention.cpu_kernels import cpu_kernels, has_amx
    from encoder_svc.models.ops_cpu import CpuOps, takes
    from encoder_svc.models.ops_cpu_kernels import CpuKernelOps

    candidates: dict[str, Callable[[], Ops]] = {}
    if takes(dtype):
        kernels = cpu_kernels() if dtype == torch.bfloat16 else None
        if kernels is not None and has_amx():
            candidates["amx_bf16"] = lambda: _amx(kernels)
        if kernels is not None:
            candidates["avx512_bf16"] = lambda: CpuKernelOps(kernels)
        candidates["onednn"] = CpuOps
    return candidates


def _amx(kernels: CpuKernels) -> Ops:
    from encoder_svc.models.amx_products import AmxProducts
    from encoder_svc.models.ops_cpu_amx import AmxOps

    return AmxOps(kernels, AmxProducts())


def _quack(device: torch.device, *, rotates_in_product: bool) -> Ops:
    from encoder_svc.models.ops_quack import QuackOps

    return QuackOps(device, rotates_in_product=rotates_in_product)


def _quack_fp8(device: torch.device, edge: Ops) -> Ops:
    from encoder_svc.models.ops_fp8_quack import QuackFp8Ops

    return QuackFp8Ops(device, edge)


def _triton(device: torch.device) -> Ops:
    from encoder_svc.models.ops_triton import TritonOps

    return TritonOps(device)


@torch.inference_mode()
def check(
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    act: str,
    *,
    gated: bool,
    tolerance: float | None = None,
) -> None:
    """Runs a small block's MLP and its projection to q, k and v, norms included, against the same in float32.

    Raises:
        ValueError: one is off by more than ``tolerance``, by default of :data:`TOLERANCES`.
    """
    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    parts = _Parts(device, dtype)
    with current(device):
        errors = {f"its MLP with {act}": parts.mlp_error(ops, act, gated=gated)}
        errors |= {f"its {name}": error for name, error in parts.qkv_errors(ops).items()}
    for name, error in errors.items():
        if not error <= allowed:  # NaN is not <= anything
            raise ValueError(f"{name} is off by {error:.1e} of the same in float32")


class _Parts:
    """A small block with random weights on ``device``."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._device, self._dtype = device, dtype
        self._hidden = self._random(_ROWS, _HIDDEN)
        weight, bias = self._random(_HIDDEN), self._random(_HIDDEN)
        self._norm = NormWeights(weight, bias, 1e-6)
        self._exact_norm = NormWeights(weight.float(), bias.float(), 1e-6)

    def mlp_error(self, ops: Ops, act: str, *, gated: bool) -> float:
        """Relative error of what is left in the residual."""
        ups, down = [self._layer(_HIDDEN, 208) for _ in range(1 + gated)], self._layer(208, _HIDDEN)
        exact_ups, exact_down = [deepcopy(up).float() for up in ups], deepcopy(down).float()
        wanted, got = self._hidden.float(), self._hidden.clone()
        Ops().add_mlp_(wanted, Ops().lay_out_mlp(self._exact_norm, exact_ups, exact_down, act))
        bias = down.bias.clone()
        ops.add_mlp_(got, ops.lay_out_mlp(self._norm, ups, down, act))
        if ops.defers_bias:
            got += bias
        return _off_by(got, wanted)

    def qkv_errors(self, ops: Ops) -> dict[str, float]:
        """Of scores, for the values of a head may be in any order, and of v."""
        layer = self._layer(_HIDDEN, 3 * _HIDDEN)
        exact_layer = deepcopy(layer).float()
        positions = torch.stack([torch.arange(_ROWS), torch.arange(_ROWS).flip(0) * 3], dim=1).to(self._device)
        frequencies = inverse_frequencies(_HIDDEN // _HEADS, 10_000.0, self._device)

        def scores_and_v(which: Ops, norm: NormWeights, layer: nn.Linear, hidden: torch.Tensor) -> list[torch.Tensor]:
            weights = which.lay_out_qkv(norm, layer, _HEADS, frequencies)
            rotary = which.rotary(positions, frequencies, _HIDDEN // _HEADS)
            q_NHD, k_NHD, v_NHD = which.rotated_qkv(hidden, weights, rotary).float().unbind(1)
            return [torch.einsum("mhd,nhd->hmn", q_NHD, k_NHD), v_NHD]

        wanted = scores_and_v(Ops(), self._exact_norm, exact_layer, self._hidden.float())
        got = scores_and_v(ops, self._norm, layer, self._hidden)
        return {name: _off_by(*pair) for name, *pair in zip(("scores", "values"), got, wanted, strict=True)}

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, self._dtype)

    def _layer(self, inputs: int, outputs: int) -> nn.Linear:
        made = nn.Linear(inputs, outputs, device="meta")
        weight, bias = self._random(outputs, inputs) * inputs**-0.5, self._random(outputs)
        made.weight, made.bias = (nn.Parameter(values, requires_grad=False) for values in (weight, bias))
        return made


def _off_by(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())
