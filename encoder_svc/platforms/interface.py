"""The platform interface: the one place that decides which attention backend an encoder runs on."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal

from encoder_svc.errors import AttentionBackendError, ConfigError

SelectionSource = Literal["override", "platform"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which attention backend was chosen, by whom and why. Logged once and returned by GetModelInfo.

    Attributes:
        backend: such as ``"TORCH_SDPA"``.
        implementation: what carries the backend out, such as ``"torch"``.
        source: ``"override"`` if the operator named it, ``"platform"`` if the platform's rule did.
        reason: one sentence.
    """

    backend: str
    implementation: str
    source: SelectionSource
    reason: str


class Platform(abc.ABC):
    """What one kind of device can run. Subclasses state facts and a preference; the rule for overrides is here."""

    name: str

    @abc.abstractmethod
    def supported_vit_attn_backends(self) -> tuple[str, ...]:
        """Every backend that this platform can run at all, the preferred one first."""

    @abc.abstractmethod
    def default_dtype(self) -> str:
        """The dtype that ``--dtype auto`` means here."""

    @abc.abstractmethod
    def device_name(self) -> str:
        """The device, as a person would name it."""

    def get_vit_attn_backend(self, head_size: int, dtype: str, override: str | None = None) -> Selection:
        """Chooses the attention backend. An override is taken as it is or refused; nothing replaces it.

        Args:
            head_size: values in one head.
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
            override: the operator's ``--mm-encoder-attn-backend``, in any case; None for the automatic choice.

        Raises:
            AttentionBackendError: the override is unknown or not for this platform.
        """
        supported = self.supported_vit_attn_backends()
        if override is None:
            return Selection(
                backend=supported[0],
                implementation="torch",
                source="platform",
                reason=f"{supported[0]} is the default on {self.name} (head size {head_size}, {dtype}).",
            )
        backend = override.upper()
        if backend not in supported:
            raise AttentionBackendError(
                f"--mm-encoder-attn-backend {override}: not a backend of platform {self.name}. "
                f"Valid here: {', '.join(supported)}."
            )
        return Selection(
            backend=backend,
            implementation="torch",
            source="override",
            reason=f"{backend} was asked for with --mm-encoder-attn-backend.",
        )


def platform_for_device(device: str) -> Platform:
    """The platform that runs ``device``: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Raises:
        ConfigError: no such device here.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu" and not index:
        from encoder_svc.platforms.cpu import CpuPlatform

        return CpuPlatform()
    if kind == "cuda" and (index.isdecimal() or not index):
        from encoder_svc.platforms.cuda import CudaPlatform

        return CudaPlatform(int(index or 0))
    raise ConfigError(f"--device {device}: not a device that is known here. Valid: auto, cpu, cuda, cuda:N.")
