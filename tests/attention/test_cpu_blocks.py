"""Attention in blocks, against plain attention in float64 and torch's fused kernel in bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from encoder_svc.attention import cpu_blocks


@pytest.fixture(autouse=True)
def _needs_onednn() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")


def random_qkv(groups: int, length: int, head_size: int, *, spread: float) -> list[torch.Tensor]:
    """``spread`` is the scores' standard deviation."""
    q, k, v = torch.randn(3, groups, length, head_size, generator=torch.Generator().manual_seed(0))
    return [x.bfloat16() for x in (q * spread, k, v)]


def error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    return ((out.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize(("groups", "length", "head_size"), [(4, 1, 72), (48, 64, 80), (3, 333, 80), (16, 784, 72)])
def test_it_is_as_exact_as_the_fused_kernel(groups: int, length: int, head_size: int, spread: float) -> None:
    q, k, v = random_qkv(groups, length, head_size, spread=spread)
    fused = F.scaled_dot_product_attention(q, k, v)
    blocks = cpu_blocks.attend(q, k, v, head_size**-0.5)
    assert error(blocks, q, k, v) < max(1.5 * error(fused, q, k, v), 3e-3)


@pytest.mark.parametrize("max_scores", [1, 50_000, 2**23])
def test_blocks_of_every_size_give_the_same(monkeypatch: pytest.MonkeyPatch, max_scores: int) -> None:
    q, k, v = random_qkv(5, 200, 40, spread=1.0)
    monkeypatch.setattr(cpu_blocks, "_MAX_SCORES", max_scores)
    assert error(cpu_blocks.attend(q, k, v, 40**-0.5), q, k, v) < 3e-3


def test_the_precision_of_other_products_stays() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    cpu_blocks.attend(*random_qkv(1, 8, 16, spread=1.0), 0.25)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
