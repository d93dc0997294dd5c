"""What a machine would choose, without serving: this one, or one that ``encoder-svc backends`` is told of by flags.

A described machine needs no GPU, none of the packages and no torch: torch is taken as installed there, and Triton too
on CUDA and ROCm, where it comes with torch.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from encoder_svc.config import platform_switches
from encoder_svc.errors import ConfigError
from encoder_svc.platforms.facts import Facts, parse_capability, parse_gfx, parse_package
from encoder_svc.platforms.interface import Platform, platform_class, platform_for_device, resolve_device

if TYPE_CHECKING:
    from collections.abc import Mapping

    from encoder_svc.config import Config
    from encoder_svc.platforms.selection import Selection

_DESCRIBED = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A machine as flags describe it; None where a flag was not given. Without a platform it is this one."""

    platform: str | None = None
    capability: str | None = None
    gfx: str | None = None
    installed: str | None = None
    environment: tuple[str, ...] = ()


class OnThisCpu(Protocol):
    """See :func:`encoder_svc.models.on_this_cpu.choose_on_this_cpu`."""

    def __call__(self, platform: Platform, config: Config, *, head_size: int, dtype: str) -> tuple[Selection, str]: ...


def decide(machine: Machine, config: Config, on_this_cpu: OnThisCpu, *, head_size: int, as_json: bool) -> str:
    """What ``serve`` would choose there under ``config``, for a person or as one JSON object.

    Args:
        on_this_cpu: asked where that is this machine's CPU, of which facts do not say what it can compile.

    Raises:
        ConfigError: the flags contradict each other, or one is malformed.
        AttentionBackendError: ``serve`` would refuse the override or the pin, with the same text.
    """
    if head_size < 1:
        raise ConfigError(f"--head-size {head_size}: less than 1.")
    platform = _this_machine(machine, config) if machine.platform is None else _described(machine, machine.platform)
    dtype = platform.default_dtype() if config.dtype == "auto" else config.dtype
    selection = platform.get_vit_attn_backend(
        head_size,
        dtype,
        config.mm_encoder_attn_backend,
        flash_attn_implementation=config.mm_encoder_flash_attn_implementation,
    )
    operations = None
    if machine.platform is None and platform.name == "cpu":
        selection, operations = on_this_cpu(platform, config, head_size=head_size, dtype=dtype)
    return _describe(platform, selection, operations, head_size=head_size, dtype=dtype, as_json=as_json)


def refuse_early(config: Config) -> None:
    """Refuses an override that cannot run on this machine with any checkpoint, before anything heavy is imported.

    Raises:
        ConfigError: there is no such device.
        AttentionBackendError: as at start-up, where head size and dtype are held against it as well.
    """
    if config.mm_encoder_attn_backend is not None:
        platform = _this_machine(Machine(), config)
        platform.refuse_early(config.mm_encoder_attn_backend, config.mm_encoder_flash_attn_implementation)


def _this_machine(machine: Machine, config: Config) -> Platform:
    if machine != Machine():
        raise ConfigError("--capability, --gfx, --installed and --env describe another machine: give its --platform.")
    return platform_for_device(resolve_device(config.device), platform_switches(config))


def _described(machine: Machine, name: str) -> Platform:
    name = name.strip().lower()
    needed = {"cuda": "capability", "rocm": "gfx"}.get(name)
    for flag in ("capability", "gfx"):
        given = getattr(machine, flag) is not None
        if flag == needed and not given:
            raise ConfigError(
                f"--platform {name} needs --{flag}, such as {'9.0' if flag == 'capability' else 'gfx942'}."
            )
        if given and name in ("cuda", "rocm", "cpu") and flag != needed:
            raise ConfigError(f"--{flag} says nothing of --platform {name}.")
    packages = {parse_package(text): _DESCRIBED for text in (machine.installed or "").split(",") if text.strip()}
    if name in ("cuda", "rocm"):
        packages.setdefault("triton", _DESCRIBED)
    facts = Facts(
        platform=name,
        capability=parse_capability(machine.capability) if machine.capability is not None else None,
        gfx=parse_gfx(machine.gfx) if machine.gfx is not None else None,
        packages=packages,
        environment=dict(_variable(text) for text in machine.environment),
        torch=_torch_version(),
        device_name="a described machine",
    )
    return platform_class(name)(facts)


def _describe(
    platform: Platform, selection: Selection, operations: str | None, *, head_size: int, dtype: str, as_json: bool
) -> str:
    values: dict[str, Any] = {
        "backend": selection.backend,
        "implementation": selection.implementation,
        "implementation_version": selection.implementation_version,
        "source": selection.source,
        "reason": selection.reason,
        "rejected": [{"backend": rejection.backend, "why": rejection.why} for rejection in selection.rejected],
        "operations": operations,
        "platform": platform.name,
        "device": _device(platform.facts),
        "dtype": dtype,
        "head_size": head_size,
        "supported": list(platform.supported_vit_attn_backends()),
    }
    if as_json:
        return json.dumps(values, indent=2)
    shown: Mapping[str, Any] = {
        "platform": f"{platform.name} {values['device']}".strip(),
        "input": f"{dtype}, head size {head_size}",
        "backend": selection.backend,
        "implementation": f"{selection.implementation} {selection.implementation_version}".strip(),
        "source": selection.source,
        "reason": selection.reason,
        **({} if operations is None else {"operations": operations}),
    }
    lines = [f"{key:<14}  {value}" for key, value in shown.items()]
    return "\n".join(lines + [f"not {r.backend:<14}  {r.why}" for r in selection.rejected])


def _device(facts: Facts) -> str:
    if facts.capability is not None:
        return f"{facts.capability[0]}.{facts.capability[1]}"
    return facts.gfx or ""


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigError(f"--env {text!r} is not NAME=VALUE.")
    return name, value


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return _DESCRIBED
