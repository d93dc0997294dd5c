"""Every backend that runs on this GPU, against TORCH_NAIVE in float32. Run it with ``-m cuda``.

With ``ATTENTION_RECORD=FILE`` each passing case is appended to FILE, one JSON object a line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from encoder_svc.attention import MMEncoderAttention, PackedSequences
from encoder_svc.attention.selfcheck import checked_attention
from encoder_svc.errors import AttentionBackendError
from encoder_svc.platforms import Platform, platform_for_device
from tests.attention.numerics import CASE_IDS, CASES, worst_error

pytestmark = pytest.mark.cuda

KERNELS = (
    ("FLASH_ATTN", "fa4"),
    ("FLASH_ATTN", "fa3"),
    ("FLASH_ATTN", "fa2"),
    ("FLASH_ATTN", "torch"),
    ("TRITON_ATTN", None),
    ("FLASHINFER", None),
    ("XFORMERS", None),
    ("TORCH_SDPA", None),
    ("TORCH_NAIVE", None),
)


@pytest.fixture(scope="module")
def platform() -> Platform:
    return platform_for_device("cuda")


@pytest.mark.parametrize(("backend", "implementation"), KERNELS, ids=lambda part: part or "")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_numerics(
    platform: Platform, case: tuple[int, str, bool], dtype: str, backend: str, implementation: str | None
) -> None:
    try:
        platform.get_vit_attn_backend(case[0], dtype, backend, flash_attn_implementation=implementation)
    except AttentionBackendError as error:
        pytest.skip(str(error))
    worst = worst_error(platform, "cuda", dtype, case, backend=backend, implementation=implementation)
    if record := os.environ.get("ATTENTION_RECORD"):
        row = {"backend": backend, "implementation": implementation, "dtype": dtype, "case": case, "error": worst}
        with Path(record).open("a") as file:
            file.write(json.dumps(row) + "\n")


def test_the_automatic_choice_passes_its_check(platform: Platform) -> None:
    for dtype in ("bfloat16", "float32"):
        layer = checked_attention(
            lambda failed, dtype=dtype: MMEncoderAttention(16, 80, platform=platform, dtype=dtype, failed=failed),
            "cuda",
        )
        assert layer.selection.source == "platform"
        assert layer.selection.backend == ("FLASH_ATTN" if dtype == "bfloat16" else "TRITON_ATTN")


@pytest.mark.parametrize(("backend", "implementation"), KERNELS, ids=lambda part: part or "")
def test_strided_input_is_taken_as_it_is(platform: Platform, backend: str, implementation: str | None) -> None:
    """q, k and v of one qkv projection, as the encoders pass them."""
    sequences = PackedSequences.of((65, 64, 7)).to("cuda")
    qkv = torch.randn(136, 3, 4, 80, device="cuda", dtype=torch.bfloat16)
    try:
        attend = MMEncoderAttention(
            4,
            80,
            attn_backend=backend,
            platform=platform,
            dtype="bfloat16",
            flash_attn_implementation=implementation,
        )
    except AttentionBackendError as error:
        pytest.skip(str(error))
    strided = attend(*qkv.unbind(1), *sequences)
    contiguous = attend(*(x.contiguous() for x in qkv.unbind(1)), *sequences)
    torch.testing.assert_close(strided, contiguous)
