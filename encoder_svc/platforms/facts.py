"""What a rule may know of a machine: one frozen value. Probed on this machine, or written down for another.

No rule looks at anything else, so that each row of the decision table is a test on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from encoder_svc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

Capability = tuple[int, int]

USE_AITER = "ENCODER_ROCM_USE_AITER"
USE_AITER_MHA = "ENCODER_ROCM_USE_AITER_MHA"
TRITON_AMD = "FLASH_ATTENTION_TRITON_AMD_ENABLE"
SWITCHES = (USE_AITER, USE_AITER_MHA, TRITON_AMD)
"""The environment switches that rules read."""


BFLOAT16_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
"""Instructions that multiply bfloat16, as Linux names them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """One device and what is installed beside it.

    Attributes:
        platform: ``"cuda"``, ``"rocm"``, ``"cpu"`` or a third party's.
        capability: an NVIDIA device's compute capability, such as (9, 0).
        gfx: an AMD device's architecture, such as ``"gfx942"``.
        packages: importable packages by the names of :data:`PACKAGES`, with their versions.
        environment: those of :data:`SWITCHES` that are set.
        torch: torch's version.
        device_name: as a person would name the device.
        cpu_flags: those of :data:`BFLOAT16_FLAGS` that a CPU has.
    """

    platform: str
    capability: Capability | None = None
    gfx: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    torch: str = ""
    device_name: str = ""
    cpu_flags: frozenset[str] = frozenset()

    def switch(self, name: str) -> bool:
        """Whether one of our own switches is on."""
        return self.environment.get(name, "").strip().lower() in ("1", "true", "yes", "on")

    def version(self, package: str) -> str | None:
        """A package's version, or None if it is not installed."""
        return self.torch if package == "torch" else self.packages.get(package)


@dataclass(frozen=True, slots=True)
class Package:
    """An optional package and how to tell that it is there without importing it.

    Attributes:
        module: the top-level module.
        inside: a file under it, where the module is shared: flash-attn 2 and 4 both install into ``flash_attn``.
        distributions: what may have installed it; the first that is there states the version.
        install: how to get it, for a person.
    """

    module: str
    distributions: tuple[str, ...]
    install: str
    inside: str = ""


PACKAGES: dict[str, Package] = {
    "flash_attn_4": Package("flash_attn", ("flash-attn-4",), "pip install flash-attn-4", "cute/interface.py"),
    "flash_attn_3": Package(
        "flash_attn_interface", ("flash-attn-3",), "build it from the folder hopper of the flash-attention repository"
    ),
    "flash_attn_2": Package("flash_attn", ("flash-attn",), "pip install flash-attn", "flash_attn_interface.py"),
    "flashinfer": Package("flashinfer", ("flashinfer-python",), "pip install flashinfer-python"),
    "xformers": Package("xformers", ("xformers",), "pip install xformers"),
    "aiter": Package("aiter", ("amd-aiter", "aiter"), "pip install amd-aiter"),
    "triton": Package("triton", ("triton", "triton-rocm", "pytorch-triton-rocm"), "it comes with torch's GPU builds"),
}

_ALIASES = {"flash_attn": "flash_attn_2", "fa4": "flash_attn_4", "fa3": "flash_attn_3", "fa2": "flash_attn_2"}


def parse_package(text: str) -> str:
    """A package by its name here or by its distribution's, such as ``flash-attn-4``.

    Raises:
        ConfigError: not a package that any backend needs.
    """
    name = text.strip().lower().replace("-", "_")
    name = _ALIASES.get(name, name)
    by_distribution = {d.replace("-", "_"): key for key, package in PACKAGES.items() for d in package.distributions}
    if name in PACKAGES or name == "torch":
        return name
    if name in by_distribution:
        return by_distribution[name]
    raise ConfigError(f"{text.strip()!r} is no package that a backend needs. Known: {', '.join(PACKAGES)}.")


def parse_capability(text: str) -> Capability:
    """``"9.0"`` as (9, 0).

    Raises:
        ConfigError: not of that form.
    """
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and (minor or "0").isdecimal()):
        raise ConfigError(f"{text!r} is not a compute capability such as 9.0.")
    return int(major), int(minor or 0)


def parse_gfx(text: str) -> str:
    """``"gfx942:sramecc+:xnack-"``, as ROCm prints it, as ``"gfx942"``.

    Raises:
        ConfigError: not of that form.
    """
    gfx = text.strip().lower().partition(":")[0]
    if not gfx.startswith("gfx") or len(gfx) < 6:
        raise ConfigError(f"{text!r} is not an AMD architecture such as gfx942.")
    return gfx
