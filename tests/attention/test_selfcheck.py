"""The start-up check: what it finds, and who may take the place of what fails it."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from encoder_svc.attention import AttentionBackend, MMEncoderAttention
from encoder_svc.attention.selfcheck import check, checked_attention
from encoder_svc.errors import AttentionBackendError, AttentionKernelError
from encoder_svc.platforms import BackendSpec, Facts, Fit, Implementation, Rule
from encoder_svc.platforms.backends import known_backends
from encoder_svc.platforms.cpu import CpuPlatform
from encoder_svc.platforms.cuda import CudaPlatform


class Broken(AttentionBackend):
    name = "BROKEN"

    def forward(self, q, k, v, cu_seqlens, max_seqlen, lengths):
        raise RuntimeError("no kernel image")


class Nan(Broken):
    def forward(self, q, k, v, cu_seqlens, max_seqlen, lengths):
        return torch.full_like(q, torch.nan)


class CrossesSequences(Broken):
    """Right on a batch of one sequence, wrong on a ragged one."""

    def forward(self, q, k, v, cu_seqlens, max_seqlen, lengths):
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)))
        return out.transpose(0, 1).contiguous()


class WrongShape(Broken):
    def forward(self, q, k, v, cu_seqlens, max_seqlen, lengths):
        return q[:-1]


class DoesNotLoad(Broken):
    def __init__(self, **options):
        raise ImportError("undefined symbol")


FAULTS = [Broken, Nan, CrossesSequences, WrongShape, DoesNotLoad]


class Machine(CpuPlatform):
    """A CPU whose rule puts BROKEN first."""

    def rule(self) -> Rule:
        return Rule(order=("BROKEN", "TORCH_SDPA"), because="in this test")


def machine(fault: type[AttentionBackend]) -> Machine:
    spec = BackendSpec(
        name="BROKEN",
        cls=f"{__name__}:{fault.__name__}",
        platforms=("cpu",),
        implementations=(Implementation(name="only", package="torch", fits=(Fit(),)),),
    )
    return Machine(backends=known_backends() | {"BROKEN": spec})


def build(platform: CpuPlatform, override: str | None = None):
    return lambda failed: MMEncoderAttention(
        2, 16, platform=platform, dtype="float32", attn_backend=override, failed=failed
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_an_automatic_choice_that_fails_gives_way_to_the_next_with_a_warning(
    fault: type[AttentionBackend], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        selection = checked_attention(build(machine(fault)), "cpu").selection
    assert (selection.backend, selection.source) == ("TORCH_SDPA", "platform")
    assert next(r.backend for r in selection.rejected) == "BROKEN"
    assert "failed its start-up check" in selection.rejected[0].why
    assert "BROKEN (only) failed its start-up check" in caplog.text


@pytest.mark.parametrize("fault", FAULTS)
def test_an_override_that_fails_is_not_served(fault: type[AttentionBackend]) -> None:
    with pytest.raises(AttentionBackendError, match=r"BROKEN \(only\) failed its start-up check"):
        checked_attention(build(machine(fault), "broken"), "cpu")


def test_what_is_right_passes() -> None:
    for override in (None, "TORCH_NAIVE"):
        for dtype in ("float32", "float16", "bfloat16"):
            check(
                MMEncoderAttention(2, 16, platform=CpuPlatform(), dtype=dtype, attn_backend=override, num_kv_heads=1),
                "cpu",
            )


def test_nothing_passes() -> None:
    platform = machine(Broken)
    platform.rule = lambda: Rule(order=("BROKEN",), because="in this test")  # type: ignore[method-assign]
    with pytest.raises(AttentionBackendError, match="no attention backend can run on cpu, in this test: BROKEN"):
        checked_attention(build(platform), "cpu")


def test_an_implementation_that_does_not_load_gives_way_to_the_next_of_its_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """flash-attn 4 is found but does not import: torch's own kernel is next in the table, not another backend."""
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)
    facts = Facts(platform="cuda", capability=(9, 0), packages={"flash_attn_4": "4.0.0"}, torch="2.11")
    platform = CudaPlatform(facts)
    with pytest.raises(AttentionKernelError) as caught:
        MMEncoderAttention(16, 80, platform=platform, dtype="bfloat16")
    assert (caught.value.backend, caught.value.implementation) == ("FLASH_ATTN", "fa4")
    failed = {("FLASH_ATTN", "fa4"): "failed its start-up check: it does not load"}
    selection = platform.get_vit_attn_backend(80, "bfloat16", failed=failed)
    assert (selection.backend, selection.implementation, selection.source) == ("FLASH_ATTN", "torch", "platform")
    assert "fa4 failed its start-up check" in selection.reason


def test_a_pinned_implementation_that_fails_is_refused() -> None:
    facts = Facts(platform="cuda", capability=(9, 0), packages={"flash_attn_4": "4.0.0"}, torch="2.11")
    failed = {("FLASH_ATTN", "fa4"): "failed its start-up check: it does not load"}
    with pytest.raises(AttentionBackendError, match="fa4 failed its start-up check: it does not load"):
        CudaPlatform(facts).get_vit_attn_backend(80, "bfloat16", flash_attn_implementation="fa4", failed=failed)
