from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from encoder_svc.errors import ConfigError
from encoder_svc.models.ops import Ops
from encoder_svc.models.ops_choice import check, describe, ops_for, refuse_quantisation
from encoder_svc.models.ops_cpu import CpuOps
from tests.models.towers import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = torch.device("cpu")


class Wrong(Ops):
    def add_mlp_(self, hidden_NC, mlp):
        super().add_mlp_(hidden_NC, mlp)
        hidden_NC[0, 0] += 100


class Broken(Ops):
    def add_mlp_(self, hidden_NC, mlp):
        super().add_mlp_(hidden_NC, mlp)
        hidden_NC[0, 0] = float("nan")


class Unrotated(Ops):
    def rotate_(self, qkv_N3HD, rotary):
        pass


class Transposed(Ops):
    """Takes rows for columns."""

    def rotary(self, position_ids, inverse_frequencies, head_size):
        return super().rotary(position_ids.flip(1), inverse_frequencies, head_size)


class Reordered(Ops):
    """The values of each rotated head the other way round."""

    def rotated_qkv(self, x_NC, weights, rotary):
        q, k, v = super().rotated_qkv(x_NC, weights, rotary).unbind(1)
        return torch.stack([q.flip(-1), k.flip(-1), v], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_the_reference_passes_its_own_check(dtype: torch.dtype, gated: bool) -> None:
    check(Ops(), CPU, dtype, "silu", gated=gated)


def test_the_order_of_a_rotated_heads_values_is_free() -> None:
    check(Reordered(), CPU, torch.float32, "silu", gated=True)


@pytest.mark.parametrize("ops", [Wrong(), Broken(), Unrotated(), Transposed()])
def test_what_computes_something_else_fails_the_check(ops: Ops) -> None:
    with pytest.raises(ValueError, match="off by"):
        check(ops, CPU, torch.float32, "gelu", gated=False)


def test_fp8_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"capability 8\.9 or more and bfloat16; the device is cpu"):
        refuse_quantisation("fp8", "cpu", "bfloat16")


@pytest.mark.parametrize(("capability", "dtype", "said"), [((8, 0), "bfloat16", "8.0"), ((9, 0), "float32", "float32")])
def test_fp8_is_refused_where_the_gpu_or_the_dtype_cannot(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(ConfigError, match=said):
        refuse_quantisation("fp8", "cuda", dtype)


def test_no_quantisation_is_never_refused() -> None:
    refuse_quantisation("none", "cpu", "float32")


class OtherAtTheEdge(Ops):
    name = "other"

    def of_block(self, index, depth):
        return Ops() if index in (0, depth - 1) else self


def test_operations_are_told_apart_by_their_description() -> None:
    assert (describe(Ops()), describe(CpuOps()), describe(OtherAtTheEdge())) == ("torch", "onednn", "other, torch")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("act", "gated"), [("quick_gelu", False), ("silu", True), ("gelu_pytorch_tanh", False)])
def test_a_gpu_runs_on_kernels_that_pass(dtype: torch.dtype, act: str, gated: bool) -> None:
    ops = ops_for(torch.device("cuda"), dtype, act, gated=gated)
    assert ops.name in ("quack", "triton")
    assert describe(ops).startswith(ops.name)


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_fp8_rows_are_near_the_bfloat16_ones(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    from tests.models.towers import random_pixel_values, rows

    plain = load(tiny_checkpoint(family), device="cuda", dtype="bfloat16")
    quantised = load(tiny_checkpoint(family), device="cuda", dtype="bfloat16", quantisation="fp8")
    assert quantised.config_hash != plain.config_hash
    pixel_values = random_pixel_values(plain.encoder.config, [(1, 16, 16)])
    wanted = rows(plain, pixel_values, [(1, 16, 16)])
    got = rows(quantised, pixel_values, [(1, 16, 16)])
    assert 0 < (got - wanted).norm() <= 0.1 * wanted.norm()
