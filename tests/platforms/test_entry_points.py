"""Third parties bring a platform or a backend by an entry point, and nothing else."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch

from encoder_svc.attention import MMEncoderAttention, PackedSequences
from encoder_svc.errors import AttentionBackendError, ConfigError
from encoder_svc.platforms.backends import known_backends
from encoder_svc.platforms.cpu import CpuPlatform
from encoder_svc.platforms.interface import platform_class, platform_for_device

if TYPE_CHECKING:
    from pathlib import Path

MODULE = """
from encoder_svc.attention.torch_naive import TorchNaive
from encoder_svc.platforms import BackendSpec, Facts, Fit, Implementation, Platform, Rule

class Theirs(TorchNaive):
    name = "THEIRS"

SPEC = BackendSpec(
    name="THEIRS",
    cls="theirs:Theirs",
    platforms=("cpu", "npu"),
    implementations=(Implementation(name="only", package="torch", fits=(Fit(head_max=64),)),),
)
UNNAMED = object()

class Npu(Platform):
    name = "npu"

    @classmethod
    def probe(cls, index, environment):
        return Facts(platform="npu", torch="2.11", device_name=f"npu {index}")

    def rule(self):
        return Rule(order=("THEIRS",), because="it has but one")

    def default_dtype(self):
        return "float16"
"""


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution with the module above, as pip lays one out."""
    (tmp_path / "theirs.py").write_text(MODULE)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield info / "entry_points.txt"
    sys.modules.pop("theirs", None)


def test_a_backend(distribution: Path) -> None:
    distribution.write_text("[encoder_svc.attention_backends]\ntheirs = theirs:SPEC\n")
    platform = CpuPlatform()
    assert "THEIRS" in platform.supported_vit_attn_backends()
    attend = MMEncoderAttention(2, 16, attn_backend="theirs", platform=platform, dtype="float32")
    assert (attend.selection.backend, attend.selection.source) == ("THEIRS", "override")
    sequences = PackedSequences.of((3, 2))
    q, k, v = (torch.randn(5, 2, 16) for _ in range(3))
    naive = MMEncoderAttention(2, 16, attn_backend="torch_naive", platform=platform, dtype="float32")
    assert torch.equal(attend(q, k, v, *sequences), naive(q, k, v, *sequences))
    with pytest.raises(AttentionBackendError, match="THEIRS takes no head size 80 on this device, only those up to 64"):
        platform.get_vit_attn_backend(80, "float32", "theirs")
    # It is there for those who ask, and changes no automatic choice.
    assert platform.get_vit_attn_backend(16, "float32").backend == "TORCH_SDPA"


@pytest.mark.parametrize("target", ["theirs:UNNAMED", "encoder_svc.platforms.backends:_FLASH_ATTN"])
def test_what_is_no_backend_is_refused(distribution: Path, target: str) -> None:
    distribution.write_text(f"[encoder_svc.attention_backends]\nwrong = {target}\n")
    with pytest.raises(AttentionBackendError, match=r"entry point 'wrong' of group encoder_svc\.attention_backends"):
        known_backends()


def test_a_platform(distribution: Path) -> None:
    distribution.write_text(
        "[encoder_svc.attention_backends]\ntheirs = theirs:SPEC\n[encoder_svc.platforms]\nnpu = theirs:Npu\n"
    )
    platform = platform_for_device("npu:1")
    assert (platform.name, platform.device_name(), platform.default_dtype()) == ("npu", "npu 1", "float16")
    selection = platform.get_vit_attn_backend(16, "float16")
    assert (selection.backend, selection.source) == ("THEIRS", "platform")
    assert platform.supported_vit_attn_backends() == ("THEIRS",)
    with pytest.raises(ConfigError, match="Known: cpu, cuda, rocm, npu"):
        platform_class("tpu")
