"""Triton's operations against the torch expressions. On a GPU (``-m cuda``), or in Triton's interpreter where that is
installed: ``TRITON_INTERPRET=1 pytest tests/models/test_ops_triton.py -m ''``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from encoder_svc.attention.base import PackedSequences
from encoder_svc.attention.torch_naive import TorchNaive
from encoder_svc.models.ops import ACTIVATIONS, NormWeights, Ops

if TYPE_CHECKING:
    from encoder_svc.models.ops_triton import TritonOps

pytestmark = pytest.mark.cuda

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
WIDTHS = (72, 128, 1152) if INTERPRETED else (72, 128, 1152, 1280, 4608)
ROWS = 37

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def ops() -> TritonOps:
    from encoder_svc.models.ops_triton import TritonOps

    return TritonOps(DEVICE)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def off_by(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖; NaN is not small."""
    assert got.shape == wanted.shape
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@EVERY_DTYPE
@pytest.mark.parametrize("values", [588, 768])
def test_centre_is_exact_and_pads_with_zeros(ops: TritonOps, values: int, dtype: torch.dtype) -> None:
    patches = torch.randint(0, 256, (ROWS, values), dtype=torch.uint8).to(DEVICE)
    got = ops.centre(patches, dtype)
    assert torch.equal(got[:, :values], Ops().centre(patches, dtype))
    assert got.shape[1] % 8 == 0
    assert not got[:, values:].any()


@EVERY_DTYPE
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("has_bias", [True, False], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("has_shift", [True, False], ids=["shifted", "plain"])
def test_norm(ops: TritonOps, width: int, has_bias: bool, has_shift: bool, dtype: torch.dtype) -> None:
    weights = NormWeights(
        random(width, dtype=dtype, seed=1),
        random(width, dtype=dtype, seed=2) if has_bias else None,
        1e-6,
        random(width, seed=3) if has_shift else None,
    )
    x = random(ROWS, width, dtype=dtype) * 3 + 1
    exact = Ops().norm(x.float(), weights._replace(weight=weights.weight.float()))
    assert off_by(ops.norm(x, weights), exact) <= TOLERANCES[dtype]


@EVERY_DTYPE
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("has_bias", [True, False], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("has_shift", [True, False], ids=["shifted", "plain"])
def test_what_a_norm_scales_rows_by(
    ops: TritonOps, width: int, has_bias: bool, has_shift: bool, dtype: torch.dtype
) -> None:
    ones = torch.ones(width, device=DEVICE)
    weights = NormWeights(ones, ones * 0 if has_bias else None, 1e-6, random(width, seed=3) if has_shift else None)
    x = random(ROWS, width, dtype=dtype) * 3 + 1
    shifted = x.float() if weights.shift is None else x + weights.shift
    if has_bias:
        shifted = shifted - shifted.mean(dim=1, keepdim=True)
    wanted = Ops().norm(x.float(), weights)
    assert off_by(shifted * ops.row_scales(x, weights).t(), wanted) <= TOLERANCES[torch.float32]


@EVERY_DTYPE
@pytest.mark.parametrize("head_size", [16, 64, 72, 80])
def test_rotation_in_place(ops: TritonOps, head_size: int, dtype: torch.dtype) -> None:
    qkv = random(ROWS, 3, 4, head_size, dtype=dtype)
    angles = random(ROWS, head_size // 2, seed=1) * 10
    rotary = (angles.cos(), angles.sin())
    wanted = qkv.clone()
    Ops().rotate_(wanted, rotary)
    v_before = qkv[:, 2].clone()
    ops.rotate_(qkv, rotary)
    assert off_by(qkv[:, :2], wanted[:, :2]) <= TOLERANCES[dtype]
    assert torch.equal(qkv[:, 2], v_before)


@EVERY_DTYPE
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_mlp_is_added_to_what_was_there(ops: TritonOps, act: str, gated: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(72, 100) for _ in range(1 + gated)] + [nn.Linear(100, 72)]
    layers = [layer.to(DEVICE, dtype).requires_grad_(False) for layer in layers]
    norm = NormWeights(random(72, dtype=dtype, seed=1), None, 1e-6)
    got, wanted = random(ROWS, 72, dtype=dtype), random(ROWS, 72, dtype=dtype).float()
    ops.add_mlp_(got, ops.lay_out_mlp(norm, layers[:-1], layers[-1], act))
    exact = [layer.float() for layer in layers]
    exact_norm = norm._replace(weight=norm.weight.float())
    Ops().add_mlp_(wanted, Ops().lay_out_mlp(exact_norm, exact[:-1], exact[-1], act))
    assert off_by(got.float() + exact[-1].bias, wanted) <= TOLERANCES[dtype]


@EVERY_DTYPE
def test_interpolated_rows_are_added(ops: TritonOps, dtype: torch.dtype) -> None:
    hidden, table = random(ROWS, 72, dtype=dtype), random(50, 72, dtype=dtype, seed=1)
    indices = torch.randint(0, 50, (ROWS, 4)).to(DEVICE)
    weights = random(ROWS, 4, seed=2)
    wanted = hidden.float()
    Ops().add_interpolated_(wanted, table.float(), indices, weights)
    ops.add_interpolated_(hidden, table, indices, weights)
    assert off_by(hidden, wanted) <= TOLERANCES[dtype]


@EVERY_DTYPE
@pytest.mark.parametrize("head_size", [8, 16, 64, 72, 80, 128])
@pytest.mark.parametrize("lengths", [(64,) * 5, (64, 16, 8, 64, 4), (1, 63), (64, 0, 0, 32, 0)], ids=str)
def test_windows_are_naive_attention(head_size: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    from encoder_svc.attention.triton_windows import WindowAttention

    heads, scale = 2, 72**-0.5
    qkv = random(sum(lengths), 3, heads, head_size, dtype=dtype)
    got = WindowAttention(heads, head_size, scale)(qkv, PackedSequences.of(lengths).to(DEVICE))
    naive = TorchNaive(num_heads=heads, head_size=head_size, scale=scale, num_kv_heads=heads, causal=False)
    real = PackedSequences.of([length for length in lengths if length]).to(DEVICE)
    assert off_by(got, naive.forward(*qkv.float().unbind(1), *real)) <= TOLERANCES[dtype]
