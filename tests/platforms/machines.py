"""Machines as values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from encoder_svc.platforms import Facts, Platform
from encoder_svc.platforms.cpu import CpuPlatform
from encoder_svc.platforms.cuda import CudaPlatform
from encoder_svc.platforms.facts import PACKAGES, TRITON_AMD, USE_AITER, USE_AITER_MHA
from encoder_svc.platforms.rocm import RocmPlatform

if TYPE_CHECKING:
    from encoder_svc.platforms.backends import BackendSpec

AITER_ON = {USE_AITER: "1", USE_AITER_MHA: "1"}
TRITON_BUILD = {TRITON_AMD: "TRUE"}


def packages(*names: str) -> dict[str, str]:
    """Installed packages, each with a version that names it."""
    assert set(names) <= set(PACKAGES)
    return {name: f"{name}-1.0" for name in names}


def cuda(capability: tuple[int, int], *installed: str, backends: dict[str, BackendSpec] | None = None) -> Platform:
    facts = Facts(platform="cuda", capability=capability, packages=packages("triton", *installed), torch="2.11")
    return CudaPlatform(facts, backends=backends)


def rocm(gfx: str, *installed: str, environment: dict[str, str] | None = None) -> Platform:
    facts = Facts(
        platform="rocm",
        gfx=gfx,
        packages=packages("triton", *installed),
        environment=environment or {},
        torch="2.11+rocm",
    )
    return RocmPlatform(facts)


def cpu(**facts: Any) -> Platform:
    return CpuPlatform(Facts(platform="cpu", torch="2.11", **facts))
