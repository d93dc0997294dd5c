"""A CPU's operations against the plain expressions."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from encoder_svc.attention import cpu_kernels as cpu_kernels_module
from encoder_svc.attention.cpu_kernels import cpu_kernels, has_amx
from encoder_svc.models import amx_products as amx_products_module
from encoder_svc.models.amx_products import SIGMOIDS, AmxProducts
from encoder_svc.models.ops import ACTIVATIONS, MlpWeights, NormWeights, Ops
from encoder_svc.models.ops_choice import describe, ops_for
from encoder_svc.models.ops_cpu import CpuOps, takes
from encoder_svc.models.ops_cpu_amx import AmxOps
from encoder_svc.models.ops_cpu_kernels import CpuKernelOps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# More patches than one stretch holds, and no multiple of it.
NUM_PATCHES = 1_100
HIDDEN, INTERMEDIATE = 48, 84

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16"]
)


@pytest.fixture(autouse=True)
def _needs_onednn() -> None:
    if not takes(torch.float32):
        pytest.skip("torch was built without oneDNN")


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(num_in: int, num_out: int, dtype: torch.dtype, seed: int) -> nn.Linear:
    layer = nn.Linear(num_in, num_out, device="meta")
    layer.weight = nn.Parameter(random(num_out, num_in, dtype=dtype, seed=seed) * num_in**-0.5, requires_grad=False)
    layer.bias = nn.Parameter(random(num_out, dtype=dtype, seed=seed + 1), requires_grad=False)
    return layer


def mlp(ops: Ops, act: str, dtype: torch.dtype, *, num_ups: int) -> MlpWeights:
    norm = NormWeights(random(HIDDEN, dtype=dtype, seed=1), None, 1e-6)
    ups = [linear(HIDDEN, INTERMEDIATE, dtype, seed) for seed in range(10, 10 + num_ups)]
    return ops.lay_out_mlp(norm, ups, linear(INTERMEDIATE, HIDDEN, dtype, 20), act)


def assert_close(
    run: Callable[[Ops, torch.dtype], torch.Tensor],
    dtype: torch.dtype,
    tolerance: float,
    chosen: Callable[[Ops], bool] = lambda ops: True,
) -> None:
    """A CPU's operations in ``dtype``, its inputs rounded to it, against the plain ones in float32."""
    wanted = run(Ops(), torch.float32)
    for ops in filter(chosen, operations(dtype)):
        got = run(ops, dtype).float()
        assert got.shape == wanted.shape
        assert ((got - wanted).norm() / wanted.norm()).item() < tolerance


def operations(dtype: torch.dtype) -> list[Ops]:
    """Those that this machine can run."""
    kernels = cpu_kernels() if dtype == torch.bfloat16 else None
    if kernels is None:
        return [CpuOps()]
    return [CpuOps(), CpuKernelOps(kernels), AmxOps(kernels, amx_products())]


@cache
def amx_products() -> AmxProducts:
    """Their tiles emulated where there are none: the rest of the kernel is the one that runs on them."""
    return AmxProducts() if has_amx() else AmxProducts("AMX_EMULATED")


def test_the_log_and_the_config_hash_tell_them_from_the_plain_ones() -> None:
    assert describe(CpuOps()) == "onednn"
    assert describe(Ops()) == "torch"
    names = [describe(ops) for ops in operations(torch.bfloat16)]
    assert names == ["onednn", "onednn and avx512_bf16", "amx_bf16"][: len(names)]


def test_they_are_chosen_where_the_cpu_runs_them() -> None:
    cpu = torch.device("cpu")
    assert describe(ops_for(cpu, torch.float32)) == "onednn"
    if takes(torch.bfloat16):
        last = -1 if has_amx() else min(1, len(operations(torch.bfloat16)) - 1)
        assert describe(ops_for(cpu, torch.bfloat16)) == describe(operations(torch.bfloat16)[last])


def test_products_with_amx_come_first_where_there_is_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    if len(operations(torch.bfloat16)) < 2:
        pytest.skip("this CPU has no AVX512-BF16, or gcc is missing")
    monkeypatch.setattr(cpu_kernels_module, "has_amx", lambda: True)
    monkeypatch.setattr(amx_products_module, "AmxProducts", amx_products)
    cpu = torch.device("cpu")
    assert describe(ops_for(cpu, torch.bfloat16, "silu", gated=True)) == "amx_bf16"
    assert describe(ops_for(cpu, torch.bfloat16, "gelu")) == "onednn and avx512_bf16"


@DTYPES
def test_a_linear_layer(dtype: torch.dtype, tolerance: float) -> None:
    def run(ops: Ops, dtype: torch.dtype) -> torch.Tensor:
        weights = ops.lay_out_linear(linear(HIDDEN, INTERMEDIATE, dtype, 3))
        return ops.linear(random(NUM_PATCHES, HIDDEN, dtype=dtype), weights)

    assert_close(run, dtype, tolerance)


@DTYPES
def test_a_linear_layer_without_a_bias(dtype: torch.dtype, tolerance: float) -> None:
    def run(ops: Ops, dtype: torch.dtype) -> torch.Tensor:
        layer = linear(HIDDEN, INTERMEDIATE, dtype, 3)
        layer.bias = None
        return ops.linear(random(NUM_PATCHES, HIDDEN, dtype=dtype), ops.lay_out_linear(layer))

    assert_close(run, dtype, tolerance)


@DTYPES
def test_a_linear_layer_added_in_place(dtype: torch.dtype, tolerance: float) -> None:
    def run(ops: Ops, dtype: torch.dtype) -> torch.Tensor:
        hidden = random(NUM_PATCHES, HIDDEN, dtype=dtype, seed=5)
        weights = ops.lay_out_linear(linear(INTERMEDIATE, HIDDEN, dtype, 3))
        ops.add_linear_(hidden, random(NUM_PATCHES, INTERMEDIATE, dtype=dtype), weights)
        return hidden

    assert_close(run, dtype, tolerance)


@DTYPES
@pytest.mark.parametrize("bias", [True, False], ids=["LayerNorm", "RMSNorm"])
def test_a_norm(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    def run(ops: Ops, dtype: torch.dtype) -> torch.Tensor:
        weight, offset = (1 + 0.1 * random(HIDDEN, dtype=dtype, seed=seed) for seed in (1, 2))
        x = 30 * random(NUM_PATCHES, HIDDEN, dtype=dtype) + 10
        return ops.norm(x, NormWeights(weight, offset if bias else None, 1e-6))

    assert_close(run, dtype, tolerance)


@DTYPES
def test_rotary_embeddings_turn_queries_and_keys_and_leave_values(dtype: torch.dtype, tolerance: float) -> None:
    angles = random(NUM_PATCHES, 8, dtype=torch.float32, seed=7)

    def run(ops: Ops, dtype: torch.dtype) -> torch.Tensor:
        qkv = random(NUM_PATCHES, 3, 4, 16, dtype=dtype)
        ops.rotate_(qkv, (angles.cos(), angles.sin()))
        return qkv

    assert_close(run, dtype, tolerance)
    for ops in operations(dtype):
        assert torch.equal(run(ops, dtype)[:, 2], random(NUM_PATCHES, 3, 4, 16, dtype=dtype)[:, 2])


@DTYPES
@pytest.mark.parametrize(("num_patches", "head_size"), [(40, 16), (NUM_PATCHES, 16), (40, 88)])
def test_the_projection_to_rotated_queries_keys_and_values(
    dtype: torch.dtype, tolerance: float, num_patches: int, head_size: int
) -> None:
    angles = random(num_patches, head_size // 2, dtype=torch.float32, seed=7)

    def run(ops: Ops, dtype: torch.dtype) -> torch.Tensor:
        norm = NormWeights(random(HIDDEN, dtype=dtype, seed=1), random(HIDDEN, dtype=dtype, seed=2), 1e-6)
        weights = ops.lay_out_qkv(norm, linear(HIDDEN, 3 * 4 * head_size, dtype, 3), 4, torch.empty(0))
        hidden = random(num_patches, HIDDEN, dtype=dtype, seed=5)
        return ops.rotated_qkv(hidden, weights, (angles.cos(), angles.sin()))

    assert_close(run, dtype, tolerance)


@DTYPES
@pytest.mark.parametrize("num_ups", [1, 2], ids=["plain", "gated"])
@pytest.mark.parametrize("act", list(ACTIVATIONS))
def test_an_mlp(dtype: torch.dtype, tolerance: float, act: str, num_ups: int) -> None:
    def run(ops: Ops, dtype: torch.dtype) -> torch.Tensor:
        hidden = random(NUM_PATCHES, HIDDEN, dtype=dtype, seed=5)
        ops.add_mlp_(hidden, mlp(ops, act, dtype, num_ups=num_ups))
        return hidden

    assert_close(run, dtype, tolerance, lambda ops: not isinstance(ops, AmxOps) or act in SIGMOIDS)


def test_an_activation_that_amx_products_lack_is_refused() -> None:
    for ops in operations(torch.bfloat16)[2:]:
        with pytest.raises(ValueError, match="not gelu"):
            mlp(ops, "gelu", torch.bfloat16, num_ups=1)


def test_weights_are_not_kept_twice() -> None:
    layers: Sequence[nn.Linear] = [linear(HIDDEN, INTERMEDIATE, torch.float32, 3)]
    CpuOps().lay_out_linear(layers[0])
    assert layers[0].weight.numel() == 0


def test_float16_is_left_to_torch() -> None:
    assert not takes(torch.float16)
