"""quack-kernels' operations on e4m3: their bound everywhere, the kernels with ``-m cuda`` on a GPU of compute
capability 9.0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from encoder_svc.models.ops import NormWeights, Ops
from encoder_svc.models.ops_choice import FP8_TOLERANCE, ops_for
from encoder_svc.models.ops_fp8_quack import largest_output

if TYPE_CHECKING:
    from encoder_svc.models.ops_fp8_quack import QuackFp8Ops

HIDDEN = 128
NORMS = pytest.mark.parametrize("has_bias", [True, False], ids=["LayerNorm", "RMSNorm"])


def norm_weights(*, has_bias: bool, dtype: torch.dtype = torch.float32, device: str = "cpu") -> NormWeights:
    torch.manual_seed(0)
    weight, bias = (torch.rand(HIDDEN) + 0.5).to(device, dtype), torch.randn(HIDDEN).to(device, dtype)
    return NormWeights(weight, bias if has_bias else None, 1e-6, torch.randn(HIDDEN).to(device))


@NORMS
def test_no_row_makes_more_than_the_bound_and_one_comes_near(has_bias: bool) -> None:
    norm = norm_weights(has_bias=has_bias)
    linear = nn.Linear(HIDDEN, 64).requires_grad_(False)
    assert norm.shift is not None
    centred = linear.weight * norm.weight
    worst = torch.cat([centred, -centred]) - norm.shift
    largest = float(linear(Ops().norm(torch.cat([worst, torch.randn(1000, HIDDEN)]), norm)).abs().max())
    bound = largest_output(norm, linear)
    assert 0.95 * bound <= largest <= bound


@pytest.fixture(scope="module")
def ops() -> QuackFp8Ops:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("quack's operations are for compute capability 9.0")
    pytest.importorskip("quack")
    from encoder_svc.models.ops_fp8_quack import QuackFp8Ops

    return QuackFp8Ops(torch.device("cuda"), Ops())


@pytest.mark.cuda
@NORMS
@pytest.mark.parametrize(("act", "gated"), [("quick_gelu", False), ("gelu_pytorch_tanh", False), ("silu", True)])
@pytest.mark.parametrize("rows", [4, 1000, 9_000])
def test_an_mlp_is_added_to_what_was_there(ops: QuackFp8Ops, rows: int, act: str, gated: bool, has_bias: bool) -> None:
    norm = norm_weights(has_bias=has_bias, dtype=torch.bfloat16, device="cuda")
    layers = [nn.Linear(HIDDEN, 208) for _ in range(1 + gated)] + [nn.Linear(208, HIDDEN)]
    layers = [layer.to("cuda", torch.bfloat16).requires_grad_(False) for layer in layers]
    before = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
    got, wanted = before.clone(), before.float()
    ops.add_mlp_(got, ops.lay_out_mlp(norm, layers[:-1], layers[-1], act))
    exact = [layer.float() for layer in layers]
    exact_norm = norm._replace(weight=norm.weight.float(), bias=None if norm.bias is None else norm.bias.float())
    Ops().add_mlp_(wanted, Ops().lay_out_mlp(exact_norm, exact[:-1], exact[-1], act))
    added = wanted - before
    assert float((got.float() + exact[-1].bias - before - added).norm() / added.norm()) <= FP8_TOLERANCE


@pytest.mark.cuda
@pytest.mark.parametrize(("act", "gated"), [("quick_gelu", False), ("gelu_pytorch_tanh", False), ("silu", True)])
def test_a_hopper_gpu_runs_on_them(ops: QuackFp8Ops, act: str, gated: bool) -> None:
    assert ops_for(torch.device("cuda"), torch.bfloat16, act, gated=gated, quantisation="fp8").name == ops.name
