"""quack-kernels' operations against the torch expressions: their weights' layout everywhere, the kernels with
``-m cuda`` on a GPU of compute capability 9.0."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from encoder_svc.models.ops import NormWeights, Ops
from encoder_svc.models.ops_quack import _pairs_side_by_side, _turns
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
    by_row, by_column = (turns[0, ::2].double() for turns in _turns(frequencies, HEADS, head_size))
    angles = 2 * math.pi * (where[:, :1] * by_row + where[:, 1:] * by_column)
    first, second = (x @ weight.t() + bias).unflatten(-1, (-1, 2)).unbind(-1)
    turned = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    got = torch.stack(turned, dim=-1).view(8, 3, HEADS, head_size)
    for value, right in zip(scores_and_values(got), scores_and_values(wanted), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def ops() -> QuackOps:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("quack's operations are for compute capability 9.0")
    pytest.importorskip("quack")
    from encoder_svc.models.ops_quack import QuackOps

    return QuackOps(torch.device("cuda"))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("head_size", [16, 72, 80, 128])
@pytest.mark.parametrize("rows", [4, 132, 1000, 9_000])
def test_q_and_k_leave_the_product_rotated(ops: QuackOps, rows: int, head_size: int, dtype: torch.dtype) -> None:
    layer = qkv_layer(head_size, dtype, "cuda")
    frequencies = inverse_frequencies(head_size, 1e4, torch.device("cuda"))
    x, norm = (
        torch.randn(rows, HIDDEN, device="cuda", dtype=dtype),
        NormWeights(torch.ones(HIDDEN, device="cuda", dtype=dtype), None, 1e-6),
    )
    where = positions(rows, "cuda")
    weights = ops.lay_out_qkv(layer, HEADS, frequencies)
    got = ops.rotated_qkv(x, norm, weights, ops.rotary(where, frequencies, head_size))
    exact = NormWeights(norm.weight.float(), None, 1e-6)
    wanted = Ops().rotated_qkv(
        x.float(),
        exact,
        Ops().lay_out_qkv(layer.float(), HEADS, frequencies),
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
def test_an_mlp_is_added_to_what_was_there(ops: QuackOps, rows: int, act: str, gated: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(HIDDEN, 200) for _ in range(1 + gated)] + [nn.Linear(200, HIDDEN)]
    layers = [layer.to("cuda", dtype).requires_grad_(False) for layer in layers]
    norm = NormWeights(torch.ones(HIDDEN, device="cuda", dtype=dtype), None, 1e-6)
    got = torch.randn(rows, HIDDEN, device="cuda", dtype=dtype)
    wanted = got.float()
    ops.add_mlp_(got, norm, ops.lay_out_mlp(layers[:-1], layers[-1], act))
    exact = [layer.float() for layer in layers]
    Ops().add_mlp_(wanted, norm._replace(weight=norm.weight.float()), Ops().lay_out_mlp(exact[:-1], exact[-1], act))
    error = (got.float() + exact[-1].bias - wanted).norm() / wanted.norm()
    assert float(error) <= TOLERANCES[dtype]
