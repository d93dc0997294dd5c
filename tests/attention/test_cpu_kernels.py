"""Kernels for CPUs with AVX512-BF16, AMX too, against float64; and what happens where they cannot be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F

from encoder_svc.attention import PackedSequences, cpu_kernels
from encoder_svc.attention.cpu_compiler import load_compiled
from encoder_svc.attention.cpu_kernels import CpuKernels, has_amx, has_avx512_bf16
from tests.tools import require

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

# More than rounding to bfloat16 once (1.7e-3) and the weights of attention once more.
TOLERANCE = 3e-3
LENGTHS = [(1, 7, 64, 65), (513,), (64,) * 9, (1100, 0, 81, 320, 321)]


# AMX's tiles are emulated where there are none: the rest of the kernel is the one that runs on them.
FORMS = {"avx512_bf16": ("avx512_bf16",), "amx_bf16": ("amx_bf16",), "amx_emulated": ("amx_bf16", "AMX_EMULATED")}


@pytest.fixture(params=FORMS)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    if not has_avx512_bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    if request.param == "amx_bf16" and not has_amx():
        pytest.skip("this CPU has no AMX, or its kernel refuses it")
    require("gcc")
    return made(*FORMS[request.param])


@pytest.fixture
def operations() -> CpuKernels:
    if not has_avx512_bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    require("gcc")
    return made("avx512_bf16")


made = cache(CpuKernels)


def test_what_a_start_that_was_ended_meanwhile_left_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("gcc")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "encoder-svc-gcc-0123456789abcdef"
    left.mkdir()
    os.utime(left, (0, 0))
    load_compiled(("attention/cpu_operations.c",))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def _compile_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu_kernels, "has_avx512_bf16", lambda: True)
    cpu_kernels.cpu_kernels.cache_clear()
    yield
    cpu_kernels.cpu_kernels.cache_clear()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def exact_attention(qkv_N3HD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    attended = [F.scaled_dot_product_attention(*qkv.permute(1, 2, 0, 3)) for qkv in qkv_N3HD.double().split(lengths)]
    return torch.cat(attended, dim=1).transpose(0, 1)


@pytest.mark.parametrize("spread", [1.0, 4.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("head_size", [16, 36, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention(kernels: CpuKernels, lengths: tuple[int, ...], head_size: int, spread: float) -> None:
    if not kernels.takes(head_size):
        pytest.skip("its sums do not fit into the tiles")
    qkv_N3HD = random(sum(lengths), 3, 3, head_size)
    qkv_N3HD[:, 0] *= spread
    boundaries = PackedSequences.of(lengths).cu_seqlens
    out_NHD = kernels.attend(*qkv_N3HD.unbind(1), boundaries, head_size**-0.5)
    assert error(out_NHD, exact_attention(qkv_N3HD, lengths)) < TOLERANCE


def test_attention_reads_heads_wherever_they_lie(kernels: CpuKernels) -> None:
    q, k, v = random(100, 3, 4, 80).unbind(1)
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    boundaries = PackedSequences.of((60, 40)).cu_seqlens
    assert torch.equal(kernels.attend(q, k, v, boundaries, 0.1), kernels.attend(*apart, boundaries, 0.1))


def test_scores_that_float32_cannot_raise_e_to_do_no_harm(kernels: CpuKernels) -> None:
    qkv_N3HD = random(90, 3, 2, 64)
    qkv_N3HD[:, :2] *= 60
    out_NHD = kernels.attend(*qkv_N3HD.unbind(1), PackedSequences.of((90,)).cu_seqlens, 64**-0.5)
    assert error(out_NHD, exact_attention(qkv_N3HD, (90,))) < TOLERANCE


@pytest.mark.parametrize(("form", "largest"), [("avx512_bf16", 128), ("amx_bf16", 80)])
def test_the_largest_head_of_each_form(form: str, largest: int) -> None:
    if not has_avx512_bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    require("gcc")
    kernels = made(form)
    assert [kernels.takes(size) for size in (16, 81, largest, largest + 2)] == [True, False, True, False]


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_how_many_threads_there_are_changes_nothing(kernels: CpuKernels, threads: int) -> None:
    qkv_N3HD = random(1500, 3, 2, 64)
    boundaries = PackedSequences.of((1100, 400)).cu_seqlens
    usual_NHD, usual_threads = kernels.attend(*qkv_N3HD.unbind(1), boundaries, 0.125), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(kernels.attend(*qkv_N3HD.unbind(1), boundaries, 0.125), usual_NHD)
    finally:
        torch.set_num_threads(usual_threads)


@pytest.mark.parametrize("form", ["avx512_bf16", "amx_bf16"])
def test_threads_may_have_little_stack(form: str) -> None:
    if not has_avx512_bf16() or (form == "amx_bf16" and not has_amx()):
        pytest.skip("this CPU does not run it")
    require("gcc")
    code = f"""
import torch
from encoder_svc.attention import PackedSequences, cpu_kernels
assert {form == "avx512_bf16"} or cpu_kernels.has_amx()
torch.set_num_threads(2)
qkv = torch.randn(2000, 3, 4, 80).bfloat16()
cpu_kernels.CpuKernels({form!r}).attend(*qkv.unbind(1), PackedSequences.of((2000,)).cu_seqlens, 0.1)
"""
    environment = os.environ | {"OMP_STACKSIZE": "256K"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.parametrize("rise", [100, 10_000])
@pytest.mark.parametrize("length", [90, 1100])
def test_scores_far_above_those_of_the_first_keys_do_no_harm(kernels: CpuKernels, length: int, rise: int) -> None:
    """Powers of two of what they are above the first ones would be up to 2^(rise · 1.44)."""
    qkv_N3HD = random(length, 3, 2, 64)
    qkv_N3HD[:, :2, :, 0] = 1
    qkv_N3HD[length // 2 :, 1, 0, 0] = rise * 8
    out_NHD = kernels.attend(*qkv_N3HD.unbind(1), PackedSequences.of((length,)).cu_seqlens, 64**-0.5)
    assert error(out_NHD, exact_attention(qkv_N3HD, (length,))) < TOLERANCE


def test_queries_whose_scores_rise_far_change_no_others(kernels: CpuKernels) -> None:
    qkv_N3HD = random(1100, 3, 2, 64)
    qkv_N3HD[550:, 1, :, 0] = 2_000
    qkv_N3HD[:, 0, :, 0] = 0
    boundaries = PackedSequences.of((1100,)).cu_seqlens
    alone_NHD = kernels.attend(*qkv_N3HD.unbind(1), boundaries, 64**-0.5)
    qkv_N3HD[700:716, 0, :, 0] = 1
    among_others_NHD = kernels.attend(*qkv_N3HD.unbind(1), boundaries, 64**-0.5)
    assert error(among_others_NHD, exact_attention(qkv_N3HD, (1100,))) < TOLERANCE
    assert torch.equal(among_others_NHD[:688], alone_NHD[:688])
    assert torch.equal(among_others_NHD[720:], alone_NHD[720:])


@pytest.mark.parametrize("head_size", [8, 36, 72, 80, 128])
def test_rotary_embeddings_turn_queries_and_keys_and_leave_values(operations: CpuKernels, head_size: int) -> None:
    qkv_N3HD = random(130, 3, 4, head_size)
    angles = random(130, head_size // 2, seed=1).float()
    cos, sin = angles.cos(), angles.sin()
    first, second = qkv_N3HD.double().chunk(2, dim=-1)
    c, s = (table.double()[:, None, None] for table in (cos, sin))
    wanted = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    wanted[:, 2] = qkv_N3HD[:, 2]
    operations.rotate_(qkv_N3HD, cos, sin)
    assert error(qkv_N3HD, wanted) < TOLERANCE
    assert torch.equal(qkv_N3HD[:, 2].double(), wanted[:, 2])


def test_a_gate(operations: CpuKernels) -> None:
    values = 20 * random(11, 13)
    exact = values.double()
    operations.gate_(values, 1.702)
    assert error(values, exact * torch.sigmoid(1.702 * exact)) < TOLERANCE


@pytest.mark.parametrize("size", [16, 100, 1280])
def test_an_rms_norm(operations: CpuKernels, size: int) -> None:
    x, weight = 30 * random(77, size) + 10, random(size, seed=1)
    wanted = F.rms_norm(x.double(), (size,), weight.double(), 1e-6)
    assert error(operations.rms_norm(x, weight, 1e-6), wanted) < TOLERANCE


@pytest.mark.parametrize("size", [16, 100, 1280])
def test_a_layer_norm(operations: CpuKernels, size: int) -> None:
    x, weight, bias = 30 * random(77, size) + 50, random(size, seed=1), random(size, seed=2)
    wanted = F.layer_norm(x.double(), (size,), weight.double(), bias.double(), 1e-6)
    assert error(operations.layer_norm(x, weight, bias, 1e-6), wanted) < TOLERANCE


def test_the_kernels_taken_multiply_with_amx_where_there_is_amx() -> None:
    if not has_avx512_bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    require("gcc")
    taken = cpu_kernels.cpu_kernels()
    assert taken is not None
    assert taken.form == ("amx_bf16" if has_amx() else "avx512_bf16")


@pytest.mark.usefixtures("_compile_anew")
def test_without_a_compiler_there_are_none_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu_kernels.cpu_kernels() is None
    assert "there is no C compiler (gcc) on the PATH" in caplog.text


@pytest.mark.usefixtures("_compile_anew")
def test_a_compiler_that_fails_is_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\necho unknown option -mavx512bf16 >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert cpu_kernels.cpu_kernels() is None
    assert "unknown option -mavx512bf16" in caplog.text
