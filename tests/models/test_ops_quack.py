"""quack-kernels' operations against the torch expressions: their weights' layout everywhere, the kernels with
``-m cuda`` on a GPU of compute capability 9.0."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from encoder_svc.models.ops import LinearWeights, NormWeights, Ops
from encoder_svc.models.ops_quack import _pairs_side_by_side, _sum_and_difference, _turns, norm_inside
from encoder_svc.models.positions import inverse_frequencies

if TYPE_CHECKING:
    from encoder_svc.models.ops_quack import QuackOps

HEADS, HIDDEN = 4, 96
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def qkv_layer(head_size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(HIDDEN, 3 * HEADS * head_size).to(device, dtype).requires_grad_(False)


def positions(rows: int, device: str = "cpu") -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 300, (rows, 2)).to(device)


def scores_and_values(qkv_N3HD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = qkv_N3HD.double().unbind(1)
    return torch.einsum("mhd,nhd->hmn", q, k), v


@pytest.mark.parametrize(("head_size", "rotated"), [(16, 16), (80, 80), (80, 72), (64, 64)], ids=str)
def test_neighbours_turned_by_their_positions_are_the_rotated_halves(head_size: int, rotated: int) -> None:
    """What the epilogue computes, in torch: on paired weights it makes the scores of the usual rotation."""
    layer, frequencies, where = (
        qkv_layer(head_size),
        inverse_frequencies(rotated, 1e4, torch.device("cpu")),
        positions(8),
    )
    x = torch.randn(8, HIDDEN)
    wanted = layer(x).view(8, 3, HEADS, head_size)
    Ops().rotate_(wanted, Ops().rotary(where, frequencies, head_size))
    weight, bias = (_pairs_side_by_side(values, HEADS) for values in (layer.weight, layer.bias))
    half_sum, half_difference = (half.t() for half in _sum_and_difference(where))
    turn = _turns(frequencies, HEADS, head_size)[:, ::2]
    angles = 2 * math.pi * (half_difference * turn + half_sum * turn.abs()).double()
    first, second = (x @ weight.t() + bias).unflatten(-1, (-1, 2)).unbind(-1)
    turned = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    got = torch.stack(turned, dim=-1).view(8, 3, HEADS, head_size)
    for value, right in zip(scores_and_values(got), scores_and_values(wanted), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-4)


NORMS = pytest.mark.parametrize("has_bias", [True, False], ids=["LayerNorm", "RMSNorm"])
SHIFTS = pytest.mark.parametrize("has_shift", [True, False], ids=["shifted", "plain"])


def norm_weights(*, has_bias: bool, has_shift: bool, dtype: torch.dtype, device: str = "cpu") -> NormWeights:
    torch.manual_seed(2)
    weight, bias, shift = torch.rand(HIDDEN) + 0.5, torch.randn(HIDDEN), torch.randn(HIDDEN)
    return NormWeights(
        weight.to(device, dtype),
        bias.to(device, dtype) if has_bias else None,
        1e-6,
        shift.to(device) if has_shift else None,
    )


def in_float32(norm: NormWeights) -> NormWeights:
    return norm._replace(weight=norm.weight.float(), bias=None if norm.bias is None else norm.bias.float())


@NORMS
@SHIFTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_is_as_good_inside_the_weights(has_bias: bool, has_shift: bool, dtype: torch.dtype) -> None:
    """What the epilogues compute, in torch, of rows whose mean is not zero."""
    norm = norm_weights(has_bias=has_bias, has_shift=has_shift, dtype=dtype)
    layer = qkv_layer(16, dtype)
    x = (torch.randn(64, HIDDEN) * 3 + 1).to(dtype)
    exact, linear = in_float32(norm), LinearWeights(layer.weight, layer.bias)
    wanted = Ops().norm_linear(x.float(), exact, LinearWeights(layer.weight.float(), layer.bias.float()))
    shifted = x.double() if norm.shift is None else x.double() + norm.shift
    spread = shifted.square().mean(dim=1) if norm.bias is None else shifted.var(dim=1, correction=0)
    inside = norm_inside(linear, norm)
    assert inside.shifts is not None
    product = x.double() @ inside.weight.double().t() + inside.shifts
    got = product * (spread + norm.eps).rsqrt()[:, None] + inside.bias
    usual = (Ops().norm(x, norm).double() @ layer.weight.double().t() + layer.bias - wanted).norm()
    assert float((got - wanted).norm()) <= 1.1 * float(usual) + 1e-6 * float(wanted.norm())


@pytest.fixture(scope="module")
def ops() -> QuackOps:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("quack's operations are for compute capability 9.0")
    pytest.importorskip("quack")
    from encoder_svc.models.ops_quack import QuackOps

    return QuackOps(torch.device("cuda"))


@pytest.mark.cuda
@NORMS
@SHIFTS
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("head_size", [16, 72, 80, 128])
@pytest.mark.parametrize("rows", [4, 132, 1000, 9_000])
def test_q_and_k_leave_the_product_rotated(
    ops: QuackOps, rows: int, head_size: int, dtype: torch.dtype, has_shift: bool, has_bias: bool
) -> None:
    layer = qkv_layer(head_size, dtype, "cuda")
    frequencies = inverse_frequencies(head_size, 1e4, torch.device("cuda"))
    x = torch.randn(rows, HIDDEN, device="cuda", dtype=dtype) + 0.5
    norm = norm_weights(has_bias=has_bias, has_shift=has_shift, dtype=dtype, device="cuda")
    where = positions(rows, "cuda")
    weights = ops.lay_out_qkv(norm, layer, HEADS, frequencies)
    got = ops.rotated_qkv(x, weights, ops.rotary(where, frequencies, head_size))
    wanted = Ops().rotated_qkv(
        x.float(),
        Ops().lay_out_qkv(in_float32(norm), layer.float(), HEADS, frequencies),
        Ops().rotary(where, frequencies, head_size),
    )
    few = slice(0, 512)  # of which every pair has a score
    for value, right in zip(scores_and_values(got[few]), scores_and_values(wanted[few]), strict=True):
        assert float((value - right).norm() / right.norm()) <= TOLERANCES[dtype]
    torch.testing.assert_close(got[-1].float().norm(), wanted[-1].norm(), rtol=2e-2, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", [4, 1000, 9_000])
def test_sums_are_added_to_what_was_there(ops: QuackOps, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(128, HIDDEN).to("cuda", dtype).requires_grad_(False)
    hidden, x = (
        torch.randn(rows, HIDDEN, device="cuda", dtype=dtype),
        torch.randn(rows, 128, device="cuda", dtype=dtype),
    )
    wanted = hidden.double() + x.double() @ layer.weight.double().t()
    ops.add_linear_(hidden, x, ops.lay_out_linear(layer))
    assert float((hidden.double() - wanted).norm() / wanted.norm()) <= TOLERANCES[dtype]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("act", "gated"),
    [
        ("quick_gelu", False),
        ("gelu", False),
        ("gelu_pytorch_tanh", False),
        ("silu", False),
        ("silu", True),
        ("gelu", True),
    ],
)
@pytest.mark.parametrize("rows", [4, 1000])
@NORMS
@SHIFTS
def test_an_mlp_is_added_to_what_was_there(
    ops: QuackOps, rows: int, act: str, gated: bool, dtype: torch.dtype, has_shift: bool, has_bias: bool
) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(HIDDEN, 200) for _ in range(1 + gated)] + [nn.Linear(200, HIDDEN)]
    layers = [layer.to("cuda", dtype).requires_grad_(False) for layer in layers]
    norm = norm_weights(has_bias=has_bias, has_shift=has_shift, dtype=dtype, device="cuda")
    got = torch.randn(rows, HIDDEN, device="cuda", dtype=dtype)
    wanted = got.float()
    ops.add_mlp_(got, ops.lay_out_mlp(norm, layers[:-1], layers[-1], act))
    exact = [layer.float() for layer in layers]
    Ops().add_mlp_(wanted, Ops().lay_out_mlp(in_float32(norm), exact[:-1], exact[-1], act))
    error = (got.float() + exact[-1].bias - wanted).norm() / wanted.norm()
    assert float(error) <= TOLERANCES[dtype]
