"""MMEncoderAttention: no shared state between layers, and a failing kernel by its name."""

from __future__ import annotations

import pytest
import torch

from encoder_svc.attention import MMEncoderAttention, PackedSequences, cpu_blocks, torch_sdpa
from encoder_svc.attention.selfcheck import checked_attention
from encoder_svc.errors import AttentionKernelError
from encoder_svc.platforms import platform_for_device
from encoder_svc.platforms.cpu import CpuPlatform


def layer(override: str | None, *, causal: bool = False) -> MMEncoderAttention:
    platform = platform_for_device("cpu")
    return MMEncoderAttention(2, 16, attn_backend=override, platform=platform, dtype="float32", causal=causal)


def test_two_layers_with_different_overrides_do_not_disturb_each_other() -> None:
    first, second, third = layer("torch_sdpa"), layer("TORCH_NAIVE"), layer(None, causal=True)
    assert [x.selection.backend for x in (first, second, third)] == ["TORCH_SDPA", "TORCH_NAIVE", "TORCH_SDPA"]
    assert [x.selection.source for x in (first, second, third)] == ["override", "override", "platform"]
    assert [x.backend.name for x in (first, second, third)] == ["TORCH_SDPA", "TORCH_NAIVE", "TORCH_SDPA"]
    sequences = PackedSequences.of((5, 3))
    q, k, v = (torch.randn(8, 2, 16) for _ in range(3))
    before = [x(q, k, v, *sequences) for x in (first, second, third)]
    torch.testing.assert_close(before[0], before[1])
    assert not torch.allclose(before[0], before[2])
    layer("TORCH_NAIVE", causal=True)(q, k, v, *sequences)
    after = [x(q, k, v, *sequences) for x in (first, second, third)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_lengths_may_be_left_out() -> None:
    sequences = PackedSequences.of((5, 3))
    q, k, v = (torch.randn(8, 2, 16) for _ in range(3))
    attend = layer("TORCH_NAIVE")
    assert torch.equal(attend(q, k, v, sequences.cu_seqlens, 5), attend(q, k, v, *sequences))


def test_a_kernel_that_fails_at_run_time_is_named_and_not_replaced() -> None:
    attend = layer("torch_sdpa")
    with pytest.raises(AttentionKernelError, match=r"^The attention kernel TORCH_SDPA \(torch\) failed\.$") as caught:
        attend(torch.randn(8, 2, 16), torch.randn(8, 2, 24), torch.randn(8, 2, 16), torch.tensor([0, 8]), 8, [8])
    assert caught.value.why
    assert attend.backend.name == "TORCH_SDPA"


@pytest.mark.parametrize(
    ("override", "dtype", "causal", "has_amx", "implementation"),
    [
        (None, "bfloat16", False, False, "blocks"),
        (None, "bfloat16", False, True, "torch"),
        ("TORCH_SDPA", "bfloat16", False, False, "torch"),
        (None, "bfloat16", True, False, "torch"),
        (None, "float32", False, False, "torch"),
    ],
)
def test_a_faster_form_is_named_and_never_taken_under_an_override(
    monkeypatch: pytest.MonkeyPatch, override: str | None, dtype: str, causal: bool, has_amx: bool, implementation: str
) -> None:
    monkeypatch.setattr(torch_sdpa, "cpu_kernels", lambda: None)
    monkeypatch.setattr(torch_sdpa, "has_avx512_bf16", lambda: True)
    monkeypatch.setattr(torch_sdpa, "has_amx", lambda: has_amx)
    in_blocks = []
    monkeypatch.setattr(cpu_blocks, "attend", lambda q, *_: in_blocks.append(1) or q)
    attend = MMEncoderAttention(2, 16, attn_backend=override, platform=CpuPlatform(), dtype=dtype, causal=causal)
    q, k, v = torch.randn(3, 8, 2, 16).to(getattr(torch, dtype))
    attend(q, k, v, *PackedSequences.of((4, 4)))
    assert attend.selection.implementation == implementation
    assert bool(in_blocks) == (implementation == "blocks")


@pytest.mark.parametrize(
    ("has_amx", "form", "next_form"), [(False, "avx512_bf16", "blocks"), (True, "amx_bf16", "torch")]
)
def test_a_form_that_failed_its_check_gives_way_to_the_next(
    monkeypatch: pytest.MonkeyPatch, has_amx: bool, form: str, next_form: str
) -> None:
    class Wrong:
        def __init__(self) -> None:
            self.form = form

        def takes(self, head_size: int) -> bool:
            return True

        def attend(self, q, *_):
            return q

    monkeypatch.setattr(torch_sdpa, "cpu_kernels", Wrong)
    monkeypatch.setattr(torch_sdpa, "has_avx512_bf16", lambda: True)
    monkeypatch.setattr(torch_sdpa, "has_amx", lambda: has_amx)

    def build(failed: dict[tuple[str, str], str]) -> MMEncoderAttention:
        return MMEncoderAttention(2, 16, platform=CpuPlatform(), dtype="bfloat16", failed=failed)

    assert build({}).selection.implementation == form
    assert checked_attention(build, "cpu").selection.implementation == next_form


@pytest.mark.parametrize(("has_amx", "implementation"), [(False, "blocks"), (True, "torch")])
def test_a_form_that_takes_no_heads_so_large_gives_way_to_the_next(
    monkeypatch: pytest.MonkeyPatch, has_amx: bool, implementation: str
) -> None:
    class ForSmallHeads:
        form = "amx_bf16"

        def takes(self, head_size: int) -> bool:
            return head_size <= 80

    monkeypatch.setattr(torch_sdpa, "cpu_kernels", ForSmallHeads)
    monkeypatch.setattr(torch_sdpa, "has_avx512_bf16", lambda: True)
    monkeypatch.setattr(torch_sdpa, "has_amx", lambda: has_amx)
    small, large = (MMEncoderAttention(2, size, platform=CpuPlatform(), dtype="bfloat16") for size in (80, 96))
    assert small.selection.implementation == "amx_bf16"
    assert large.selection.implementation == implementation
