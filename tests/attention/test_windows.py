"""Who takes the layers of windows: the rule, with a stand-in for the kernel (see tests/models/test_ops_triton.py)."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from encoder_svc.attention import MMEncoderAttention, windows
from encoder_svc.attention.windows import choose_windows
from encoder_svc.platforms import platform_for_device

CUDA = SimpleNamespace(name="cuda")


class StandIn:
    def __init__(self, num_heads: int, head_size: int, scale: float) -> None:
        self.made_for = (num_heads, head_size, scale)


def find_triton(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    monkeypatch.setattr(windows, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: found)))


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find_triton(monkeypatch, object())
    monkeypatch.setattr(windows, "version", lambda _: "3.6.0")
    monkeypatch.setattr(windows, "WindowAttention", StandIn)
    monkeypatch.setattr(windows, "relative_error", lambda *_: 1e-3)


def attention(*, override: str | None = None, dtype: str = "bfloat16", causal: bool = False) -> MMEncoderAttention:
    platform = platform_for_device("cpu")
    return MMEncoderAttention(4, 80, 72**-0.5, attn_backend=override, platform=platform, dtype=dtype, causal=causal)


def test_a_kernel_of_their_own_and_the_selection_says_so() -> None:
    chosen = attention()
    choose_windows(chosen, 64, CUDA, "cuda", pinned=False)
    assert chosen.windows.made_for == (4, 80, 72**-0.5)
    assert chosen.selection.windows == "TRITON_ATTN (triton 3.6.0)"
    assert "windows of up to 64 patches run on TRITON_ATTN" in chosen.selection.reason


@pytest.mark.parametrize(
    ("options", "patches", "platform", "pinned"),
    [
        ({"override": "TORCH_SDPA"}, 64, CUDA, False),
        ({}, 64, CUDA, True),
        ({}, 100, CUDA, False),
        ({"dtype": "float32"}, 64, CUDA, False),
        ({"causal": True}, 64, CUDA, False),
        ({}, 64, SimpleNamespace(name="rocm"), False),
        ({}, 64, SimpleNamespace(name="cpu"), False),
    ],
    ids=["override", "pin", "larger windows", "float32", "causal", "ROCm", "CPU"],
)
def test_otherwise_the_backend_takes_them(
    options: dict[str, object], patches: int, platform: SimpleNamespace, pinned: bool
) -> None:
    chosen = attention(**options)
    before = chosen.selection
    choose_windows(chosen, patches, platform, "cuda", pinned=pinned)
    assert chosen.windows is None
    assert chosen.selection == before


def test_without_triton_the_backend_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    find_triton(monkeypatch, None)
    chosen = attention()
    choose_windows(chosen, 64, CUDA, "cuda", pinned=False)
    assert chosen.windows is None


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_kernel_that_fails_its_check_is_passed_over_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: float
) -> None:
    monkeypatch.setattr(windows, "relative_error", lambda *_: error)
    chosen = attention()
    with caplog.at_level(logging.WARNING):
        choose_windows(chosen, 64, CUDA, "cuda", pinned=False)
    assert chosen.windows is None
    assert not chosen.selection.windows
    assert "TRITON_ATTN for windows failed its start-up check" in caplog.text
