"""Backends whose device or package CI has not, on stand-ins that check each argument and compute the true result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from encoder_svc.attention import MMEncoderAttention, PackedSequences
from encoder_svc.attention.selfcheck import check
from tests.attention import stand_ins
from tests.attention.numerics import CASE_IDS, CASES, worst_error
from tests.platforms.machines import TRITON_BUILD, cuda, rocm

if TYPE_CHECKING:
    from encoder_svc.platforms import Platform

# backend, implementation, machine, stand-in modules, dtypes
BACKENDS = {
    "fa4": (
        "FLASH_ATTN",
        cuda((9, 0), "flash_attn_4"),
        {
            "flash_attn.cute": {
                "flash_attn_varlen_func": stand_ins.fa4_varlen,
                "flash_attn_func": stand_ins.fa4_dense,
            }
        },
    ),
    "fa3": (
        "FLASH_ATTN",
        cuda((9, 0), "flash_attn_3"),
        {"flash_attn_interface": {"flash_attn_varlen_func": stand_ins.fa3_varlen}},
    ),
    "fa2": (
        "FLASH_ATTN",
        cuda((8, 0), "flash_attn_2"),
        {"flash_attn": {"flash_attn_varlen_func": stand_ins.fa2_varlen}},
    ),
    "fa2 on CDNA": (
        "FLASH_ATTN",
        rocm("gfx90a", "flash_attn_2"),
        {"flash_attn": {"flash_attn_varlen_func": stand_ins.fa2_varlen}},
    ),
    "fa2 on RDNA": (
        "FLASH_ATTN",
        rocm("gfx1100", "flash_attn_2", environment=TRITON_BUILD),
        {"flash_attn": {"flash_attn_varlen_func": stand_ins.fa2_varlen}},
    ),
    "torch": ("FLASH_ATTN", cuda((8, 0)), {"torch.nn.attention.varlen": {"varlen_attn": stand_ins.torch_varlen}}),
    "aiter": ("ROCM_AITER_FA", rocm("gfx942", "aiter"), {"aiter": {"flash_attn_varlen_func": stand_ins.aiter_varlen}}),
    "flashinfer": (
        "FLASHINFER",
        cuda((9, 0), "flashinfer"),
        {"flashinfer.cudnn": {"cudnn_batch_prefill_with_kv_cache": stand_ins.cudnn_prefill}},
    ),
    "xformers": (
        "XFORMERS",
        cuda((7, 5), "xformers"),
        {
            "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": stand_ins.BlockDiagonalMask},
            "xformers.ops": {"memory_efficient_attention_forward": stand_ins.xformers_forward},
        },
    ),
}
FEW = ((1,), (65,), (1, 7, 64, 65, 64), (64,) * 9)


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS.keys())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Platform]:
    name, platform, modules = request.param
    if "torch.nn.attention.varlen" in modules:
        for attribute, value in modules["torch.nn.attention.varlen"].items():
            monkeypatch.setattr(f"torch.nn.attention.varlen.{attribute}", value)
    else:
        stand_ins.install(monkeypatch, modules)
    return name, platform


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_the_true_result_comes_through(backend: tuple[str, Platform], case: tuple[int, str, bool], dtype: str) -> None:
    name, platform = backend
    if dtype == "bfloat16" and platform.facts.capability == (7, 5):
        return
    if dtype == "float32" and name != "XFORMERS":
        return
    worst_error(platform, "cpu", dtype, case, backend=name, batches=FEW)


def test_it_passes_the_start_up_check(backend: tuple[str, Platform]) -> None:
    name, platform = backend
    for causal in (False, True):
        check(MMEncoderAttention(4, 80, attn_backend=name, platform=platform, dtype="float16", causal=causal), "cpu")


def test_scale_and_strided_input_come_through(backend: tuple[str, Platform]) -> None:
    name, platform = backend
    sequences = PackedSequences.of((5, 64, 3))
    qkv = torch.randn(72, 3, 4, 16, dtype=torch.float16, generator=torch.Generator().manual_seed(0))
    scaled = MMEncoderAttention(4, 16, 0.01, attn_backend=name, platform=platform, dtype="float16")
    naive = MMEncoderAttention(4, 16, 0.01, attn_backend="torch_naive", platform=platform, dtype="float16")
    out = scaled(*qkv.unbind(1), *sequences)
    torch.testing.assert_close(out, naive(*qkv.unbind(1), *sequences))


def test_flash_attn_4_takes_equal_windows_as_a_plain_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    name, platform, modules = BACKENDS["fa4"]
    called = []
    counted = {
        function: lambda *a, function=function, run=run, **o: (called.append(function), run(*a, **o))[1]
        for function, run in modules["flash_attn.cute"].items()
    }
    stand_ins.install(monkeypatch, {"flash_attn.cute": counted})
    attend = MMEncoderAttention(2, 16, attn_backend=name, platform=platform, dtype="float16")
    for lengths in ((64, 64, 64), (64, 64, 32)):
        q, k, v = (torch.randn(sum(lengths), 2, 16, dtype=torch.float16) for _ in range(3))
        attend(q, k, v, *PackedSequences.of(lengths))
    assert called == ["flash_attn_func", "flash_attn_varlen_func"]


def test_xformers_makes_one_mask_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    name, platform, modules = BACKENDS["xformers"]
    made = []

    class Counted(stand_ins.BlockDiagonalMask):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            made.append(self.lengths)

    stand_ins.install(monkeypatch, modules | {"xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": Counted}})
    attend = MMEncoderAttention(2, 16, attn_backend=name, platform=platform, dtype="float16")
    for lengths in ((3, 4), (3, 4), (5, 2), (3, 4)):
        sequences = PackedSequences.of(lengths)
        q, k, v = (torch.randn(7, 2, 16, dtype=torch.float16) for _ in range(3))
        attend(q, k, v, *sequences)
    assert made == [[3, 4], [5, 2], [3, 4]]
