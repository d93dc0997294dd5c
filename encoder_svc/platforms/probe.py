"""Gathers :class:`Facts` on this machine. The one place that looks; imports no optional package to do so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform as host
from pathlib import Path
from typing import TYPE_CHECKING

from encoder_svc.errors import ConfigError
from encoder_svc.platforms.facts import BFLOAT16_FLAGS, PACKAGES, SWITCHES, Facts, parse_gfx

if TYPE_CHECKING:
    from collections.abc import Mapping

    from encoder_svc.platforms.facts import Package

_NO_VERSION = "unknown"
_CPUINFO = Path("/proc/cpuinfo")


def probe_cpu(environment: Mapping[str, str]) -> Facts:
    """The CPU. Does not import torch."""
    return Facts(
        platform="cpu",
        packages=installed_packages(),
        environment=_switches(environment),
        torch=_version(("torch",)),
        device_name=_processor(),
        cpu_flags=cpu_flags(_CPUINFO) & BFLOAT16_FLAGS,
    )


def probe_gpu(index: int, environment: Mapping[str, str]) -> Facts:
    """GPU ``index`` of this process: platform ``"rocm"`` where torch is a ROCm build, else ``"cuda"``.

    Raises:
        ConfigError: there is no such device.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise ConfigError(f"--device cuda:{index}: this process sees {count} CUDA devices.")
    rocm = torch.version.hip is not None
    return Facts(
        platform="rocm" if rocm else "cuda",
        capability=None if rocm else torch.cuda.get_device_capability(index),
        gfx=parse_gfx(torch.cuda.get_device_properties(index).gcnArchName) if rocm else None,
        packages=installed_packages(),
        environment=_switches(environment),
        torch=torch.__version__,
        device_name=torch.cuda.get_device_name(index),
    )


def cpu_flags(cpuinfo: Path) -> frozenset[str]:
    """The instructions that every core has, by Linux's names; none where there is no such file."""
    if not cpuinfo.exists():
        return frozenset()
    lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines())
    cores = [frozenset(flags.split()) for key, _, flags in lines if key.strip() == "flags"]
    return frozenset.intersection(*cores) if cores else frozenset()


def installed_packages() -> dict[str, str]:
    """Every optional package that can be found, with its version."""
    return {name: _version(package.distributions) for name, package in PACKAGES.items() if _is_there(package)}


def _is_there(package: Package) -> bool:
    try:
        spec = importlib.util.find_spec(package.module)
    except (ImportError, ValueError):  # ValueError: a module put into sys.modules by hand
        return False
    if spec is None or not package.inside:
        return spec is not None
    return any(Path(folder, package.inside).exists() for folder in spec.submodule_search_locations or ())


def _version(distributions: tuple[str, ...]) -> str:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return _NO_VERSION


def _switches(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: environment[name] for name in SWITCHES if name in environment}


def _processor() -> str:
    return host.processor() or host.machine()
