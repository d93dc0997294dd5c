"""The platform interface: the one place that decides which attention backend an encoder runs on.

Third parties add a platform by an entry point of group ``encoder_svc.platforms`` whose name is the device's
(``--device NAME`` or ``NAME:N``) and whose object is a :class:`Platform` class.
"""

from __future__ import annotations

import abc
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final

from encoder_svc.errors import AttentionBackendError, ConfigError
from encoder_svc.platforms.backends import FLASH_ATTN, known_backends
from encoder_svc.platforms.selection import (
    PIN_FLAG,
    Question,
    Rejection,
    Rule,
    Selection,
    SelectionSource,
    choose,
    obey,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from encoder_svc.platforms.backends import BackendSpec
    from encoder_svc.platforms.facts import Facts

__all__ = [
    "Platform",
    "Rejection",
    "Rule",
    "Selection",
    "SelectionSource",
    "platform_class",
    "platform_for_device",
    "resolve_device",
]

ENTRY_POINTS: Final = "encoder_svc.platforms"

_PLATFORMS = {
    "cpu": "encoder_svc.platforms.cpu:CpuPlatform",
    "cuda": "encoder_svc.platforms.cuda:CudaPlatform",
    "rocm": "encoder_svc.platforms.rocm:RocmPlatform",
}


class Platform(abc.ABC):
    """One device and what it can run. Subclasses state a rule on facts; what an override means is decided here.

    Args:
        facts: of the device; everything below is a function of them.
        backends: every known backend by name; by default ours and those of entry points.
    """

    name: ClassVar[str]

    def __init__(self, facts: Facts, *, backends: Mapping[str, BackendSpec] | None = None) -> None:
        self.facts = facts
        self.backends = known_backends() if backends is None else backends

    @classmethod
    @abc.abstractmethod
    def probe(cls, index: int, environment: Mapping[str, str]) -> Facts:
        """The facts of device ``index`` of this machine.

        Raises:
            ConfigError: there is no such device.
        """

    @abc.abstractmethod
    def rule(self) -> Rule:
        """The automatic choice, as an order to try. Dtype and head size are held against it for each backend."""

    @abc.abstractmethod
    def default_dtype(self) -> str:
        """The dtype that ``--dtype auto`` means here."""

    def device_name(self) -> str:
        """The device, as a person would name it."""
        return self.facts.device_name

    def supported_vit_attn_backends(self) -> tuple[str, ...]:
        """Every backend that this platform can run at all, the preferred one first."""
        here = [spec.name for spec in self.backends.values() if self.name in spec.platforms]
        first = [name for name in self.rule().order if name in here]
        return tuple(dict.fromkeys(first + here))

    def get_vit_attn_backend(
        self,
        head_size: int,
        dtype: str,
        override: str | None = None,
        *,
        flash_attn_implementation: str | None = None,
        failed: Mapping[tuple[str, str], str] | None = None,
    ) -> Selection:
        """Chooses the attention backend. An override is taken as it is or refused; nothing replaces it.

        Args:
            head_size: values in one head.
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
            override: the operator's ``--mm-encoder-attn-backend``, in any case; None for the automatic choice.
            flash_attn_implementation: the operator's pin inside FLASH_ATTN.
            failed: (backend, implementation) to why, of those that failed their start-up check.

        Raises:
            AttentionBackendError: the override or the pin cannot run here.
        """
        question = self._question(head_size, dtype, flash_attn_implementation)
        question = replace(question, failed=failed or {})
        return choose(question, self.rule()) if override is None else obey(question, override)

    def refuse_early(self, override: str | None, flash_attn_implementation: str | None) -> None:
        """Refuses what can be refused before the checkpoint's config, and with it head size and dtype, is known.

        Raises:
            AttentionBackendError: as :meth:`get_vit_attn_backend`.
        """
        question = self._question(None, None, flash_attn_implementation)
        if override is not None:
            obey(question, override)

    def _question(self, head_size: int | None, dtype: str | None, pin: str | None) -> Question:
        pinned = pin.strip().lower() if pin else None
        names = [implementation.name for implementation in self.backends[FLASH_ATTN].implementations]
        if pinned is not None and pinned not in names:
            raise AttentionBackendError(f"{PIN_FLAG} {pin}: not an implementation. Valid: {', '.join(names)}.")
        return Question(
            facts=self.facts,
            supported=self.supported_vit_attn_backends(),
            backends=self.backends,
            head_size=head_size,
            dtype=dtype,
            pinned=pinned,
        )


def platform_class(name: str) -> type[Platform]:
    """A platform's class by its name, ours or another package's.

    Raises:
        ConfigError: there is none of this name.
    """
    import importlib
    from importlib.metadata import entry_points

    if name in _PLATFORMS:
        module, _, attribute = _PLATFORMS[name].partition(":")
        found: type[Platform] = getattr(importlib.import_module(module), attribute)
        return found
    others = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name in others:
        found = others[name].load()
        return found
    raise ConfigError(f"platform {name}: not known. Known: {', '.join([*_PLATFORMS, *others])}.")


def resolve_device(device: str) -> str:
    """What ``--device auto`` means here: cuda where there is one. Another device stays, and torch is not imported."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def platform_for_device(device: str, environment: Mapping[str, str] | None = None) -> Platform:
    """The platform that runs ``device``: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or another package's.

    torch calls an AMD device cuda too; which of the two it is, is probed.

    Args:
        environment: the switches that rules read; see :func:`encoder_svc.config.platform_switches`.

    Raises:
        ConfigError: no such device here.
    """
    kind, _, index = device.partition(":")
    try:
        cls = platform_class(kind)
    except ConfigError:
        cls = None
    if cls is None or kind == "rocm" or (index and (kind == "cpu" or not index.isdecimal())):
        raise ConfigError(f"--device {device}: not a device that is known here. Valid: auto, cpu, cuda, cuda:N.")
    facts = cls.probe(int(index or 0), environment or {})
    return (cls if facts.platform == cls.name else platform_class(facts.platform))(facts)
