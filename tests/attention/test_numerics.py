"""Backends that run on a CPU, against TORCH_NAIVE; TORCH_NAIVE against the formula in float64; and Triton's kernel in
Triton's interpreter, where that is asked for (TRITON_INTERPRET=1)."""

from __future__ import annotations

import math
import os

import pytest
import torch

from encoder_svc.attention import PackedSequences
from encoder_svc.attention.torch_naive import TorchNaive
from encoder_svc.attention.triton_attn import split_head, tiles_for
from encoder_svc.platforms import platform_for_device
from encoder_svc.platforms.cuda import CudaPlatform
from encoder_svc.platforms.facts import Facts
from tests.attention.numerics import BATCHES, CASE_IDS, CASES, worst_error


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_sdpa(case: tuple[int, str, bool], dtype: str) -> None:
    worst_error(platform_for_device("cpu"), "cpu", dtype, case, backend="TORCH_SDPA")


@pytest.mark.parametrize("causal", [False, True])
def test_naive_is_the_formula(causal: bool) -> None:
    """softmax(q kᵀ · scale) v of Vaswani et al. (2017), one row at a time in float64."""
    sequences = PackedSequences.of((1, 5, 3))
    q, k, v = (torch.randn(9, heads, 8, generator=torch.Generator().manual_seed(0)) for heads in (4, 2, 2))
    naive = TorchNaive(num_heads=4, head_size=8, scale=0.3, num_kv_heads=2, causal=causal)
    out = naive.forward(q, k, v, *sequences)
    for start, stop in ((0, 1), (1, 6), (6, 9)):
        for row in range(start, stop):
            seen = range(start, row + 1 if causal else stop)
            for head in range(4):
                weights = [math.exp(0.3 * float(q[row, head].double() @ k[i, head // 2].double())) for i in seen]
                wanted = sum(w * v[i, head // 2].double() for w, i in zip(weights, seen, strict=True)) / sum(weights)
                torch.testing.assert_close(out[row, head].double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_backend_sees_no_other_sequence() -> None:
    """What stands in one sequence changes no other's rows, not by a bit."""
    naive = TorchNaive(num_heads=1, head_size=8, scale=1.0, num_kv_heads=1, causal=False)
    sequences = PackedSequences.of((3, 4))
    q, k, v = (torch.randn(7, 1, 8) for _ in range(3))
    before = naive.forward(q, k, v, *sequences)
    k[3:], v[3:] = 100.0, torch.nan
    assert torch.equal(naive.forward(q, k, v, *sequences)[:3], before[:3])


PARTS = {8: (16, 0), 16: (16, 0), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 100: (128, 0), 128: (128, 0)}
PARTS |= {160: (128, 32), 192: (128, 64), 256: (256, 0)}


@pytest.mark.parametrize(("head_size", "parts"), PARTS.items())
def test_a_head_is_padded_no_more_than_two_powers_of_two_need(head_size: int, parts: tuple[int, int]) -> None:
    assert split_head(head_size) == parts


@pytest.mark.parametrize("shared_kib", [227, 163, 99, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_fit_into_the_devices_shared_memory(dtype: torch.dtype, shared_kib: int) -> None:
    for head_size in (8, 64, 72, 80, 96, 128, 160, 256):
        for longest in (64, 5184):
            tiles = tiles_for(head_size, dtype, longest, shared_kib * 1024)
            row_bytes = sum(split_head(head_size)) * dtype.itemsize
            assert row_bytes * (tiles.block_m + 2 * tiles.num_stages * tiles.block_n) <= shared_kib * 1024
            assert min(tiles.block_m, tiles.block_n) >= 16


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter alone")
# The interpreter does not compute in bfloat16.
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", [*CASES, (100, "MHA", True), (48, "GQA", False), (8, "MHA", False)], ids=str)
def test_triton_in_its_interpreter(case: tuple[int, str, bool], dtype: str) -> None:
    platform = CudaPlatform(Facts(platform="cuda", capability=(9, 0), packages={"triton": "3"}, torch="2"))
    few = [lengths for lengths in BATCHES if sum(lengths) < 200]
    worst_error(platform, "cpu", dtype, case, backend="TRITON_ATTN", batches=few)
