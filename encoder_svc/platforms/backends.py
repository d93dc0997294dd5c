"""What each attention backend needs, and where its class is. Adding a backend is one file and one entry here.

Third parties add theirs by an entry point of group ``encoder_svc.attention_backends`` whose object is a
:class:`BackendSpec`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from encoder_svc.errors import AttentionBackendError
from encoder_svc.platforms.facts import PACKAGES, TRITON_AMD, Capability, Facts

if TYPE_CHECKING:
    from collections.abc import Mapping

ENTRY_POINTS: Final = "encoder_svc.attention_backends"
FLASH_ATTN: Final = "FLASH_ATTN"
UPSTREAM_FLASH_ATTN: Final = ("fa4", "fa3", "fa2")

_HALF = ("float16", "bfloat16")
_ALL = (*_HALF, "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A range of devices, and what runs on them. With neither capability nor gfx it is every device.

    Attributes:
        capability: from the first, included, to below the second; None is no upper end.
        gfx: architectures, each by how its name begins.
        head_multiple, head_max: head sizes.
        environment: variables that must have exactly these values.
    """

    capability: tuple[Capability, Capability | None] | None = None
    gfx: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = _ALL
    head_multiple: int = 1
    head_max: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def is_for_kind_of(self, facts: Facts) -> bool:
        """Whether it speaks of this kind of device at all, in range or not."""
        if self.capability is None and not self.gfx:
            return True
        return (facts.capability is not None and self.capability is not None) or bool(facts.gfx and self.gfx)

    def in_range(self, facts: Facts) -> bool:
        if self.capability is not None and facts.capability is not None:
            low, high = self.capability
            return low <= facts.capability and (high is None or facts.capability < high)
        if self.gfx and facts.gfx is not None:
            return facts.gfx.startswith(self.gfx)
        return self.capability is None and not self.gfx

    def why_not_this(self, head_size: int | None, dtype: str | None) -> str | None:
        """Why it does not take a head size or a dtype."""
        if dtype is not None and dtype not in self.dtypes:
            return f"takes {' and '.join(self.dtypes)} on this device, not {dtype}"
        if head_size is not None and (head_size % self.head_multiple or head_size > (self.head_max or head_size)):
            multiples = f"multiples of {self.head_multiple}" if self.head_multiple > 1 else "those"
            return f"takes no head size {head_size} on this device, only {multiples} up to {self.head_max}"
        return None

    def devices(self, facts: Facts) -> str:
        """The range, for a person, in the terms of this kind of device."""
        if self.capability is None or facts.capability is None:
            return "/".join(f"{gfx}…" for gfx in self.gfx)
        (low, low_minor), high = self.capability
        if high is None:
            return f"{low}.{low_minor} or newer"
        return f"{low}.{low_minor} to below {high[0]}.{high[1]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Implementation:
    """One way to carry a backend out.

    Attributes:
        package: of :data:`PACKAGES`, or ``"torch"``; its version is the implementation's.
    """

    name: str
    package: str
    fits: tuple[Fit, ...]

    def why_not(self, facts: Facts, head_size: int | None, dtype: str | None) -> str | None:
        """Why it cannot run, as the end of a sentence that begins with its name; None if it can.

        A head size or dtype of None is not yet known, and is not held against it.
        """
        fits = [fit for fit in self.fits if fit.is_for_kind_of(facts)]
        fit = next((fit for fit in fits if fit.in_range(facts)), None)
        if not fits:
            return f"does not run on platform {facts.platform}"
        if fit is None:
            what = "compute capability" if facts.capability else "an architecture of"
            here = f"{facts.capability[0]}.{facts.capability[1]}" if facts.capability else facts.gfx
            return f"needs {what} {' or '.join(f.devices(facts) for f in fits)}; this device has {here}"
        return fit.why_not_this(head_size, dtype) or self._missing(fit, facts)

    def _missing(self, fit: Fit, facts: Facts) -> str | None:
        if facts.version(self.package) is None:
            known = PACKAGES.get(self.package)
            install = f" ({known.install})" if known else ""
            return f"needs the package {self.package}, which is not installed{install}"
        for variable, value in fit.environment.items():
            if facts.environment.get(variable) != value:
                return f"needs {variable}={value} in the environment on {facts.gfx}"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendSpec:
    """An attention backend.

    Attributes:
        name: in capitals.
        cls: ``"module:class"`` of its :class:`~encoder_svc.attention.base.AttentionBackend`; imported when used.
        platforms: where it can run at all.
        implementations: the best first and the one that takes the most last: if none fits, the last says why.
        override_only: no platform chooses it by itself.
    """

    name: str
    cls: str
    platforms: tuple[str, ...]
    implementations: tuple[Implementation, ...]
    override_only: bool = False


def _of(name: str, cls: str, platforms: tuple[str, ...], *, package: str, fits: tuple[Fit, ...]) -> BackendSpec:
    """A backend with one implementation, that of ``package``."""
    only = Implementation(name=package, package=package, fits=fits)
    return BackendSpec(
        name=name,
        cls=f"encoder_svc.attention.{cls}",
        platforms=platforms,
        implementations=(only,),
        override_only=name in ("FLASHINFER", "TORCH_NAIVE"),
    )


_FLASH_ATTN = BackendSpec(
    name=FLASH_ATTN,
    cls="encoder_svc.attention.flash_attn:FlashAttn",
    platforms=("cuda", "rocm"),
    implementations=(
        Implementation(
            name="fa4",
            package="flash_attn_4",
            fits=(
                Fit(capability=((9, 0), (10, 0)), dtypes=_HALF, head_multiple=8, head_max=256),
                Fit(capability=((10, 0), (11, 0)), dtypes=_HALF, head_multiple=8, head_max=128),
            ),
        ),
        Implementation(
            name="fa3",
            package="flash_attn_3",
            fits=(Fit(capability=((9, 0), (10, 0)), dtypes=_HALF, head_multiple=8, head_max=256),),
        ),
        Implementation(
            name="fa2",
            package="flash_attn_2",
            fits=(
                Fit(capability=((8, 0), None), dtypes=_HALF, head_multiple=8, head_max=256),
                Fit(gfx=("gfx9",), dtypes=_HALF, head_multiple=8, head_max=256),
                # Only flash-attn's Triton build runs on RDNA, and it looks for exactly this value.
                Fit(
                    gfx=("gfx11", "gfx12"),
                    dtypes=_HALF,
                    head_multiple=8,
                    head_max=256,
                    environment={TRITON_AMD: "TRUE"},
                ),
            ),
        ),
        Implementation(
            name="torch",
            package="torch",
            fits=(Fit(capability=((8, 0), None), dtypes=_HALF, head_multiple=8, head_max=256),),
        ),
    ),
)

_ANY = (Fit(),)

_BUILT_IN = (
    _FLASH_ATTN,
    _of(
        "ROCM_AITER_FA",
        "rocm_aiter_fa:RocmAiterFa",
        ("rocm",),
        package="aiter",
        fits=(Fit(gfx=("gfx94", "gfx95"), dtypes=_HALF, head_multiple=8, head_max=256),),
    ),
    _of(
        "TRITON_ATTN",
        "triton_attn:TritonAttn",
        ("cuda", "rocm"),
        package="triton",
        fits=(Fit(capability=((8, 0), None), head_max=256), Fit(gfx=("gfx9", "gfx11", "gfx12"), head_max=256)),
    ),
    _of(
        "XFORMERS",
        "xformers:Xformers",
        ("cuda",),
        package="xformers",
        # Its kernels read 16 bytes at a time, and none below 8.0 multiplies bfloat16.
        fits=(
            Fit(capability=((8, 0), None), head_multiple=8, head_max=512),
            Fit(capability=((5, 0), (8, 0)), dtypes=("float16", "float32"), head_multiple=8, head_max=512),
        ),
    ),
    _of("TORCH_SDPA", "torch_sdpa:TorchSdpa", ("cuda", "rocm", "cpu"), package="torch", fits=_ANY),
    _of(
        "FLASHINFER",
        "flashinfer:FlashInfer",
        ("cuda",),
        package="flashinfer",
        fits=(
            Fit(capability=((9, 0), None), dtypes=_HALF, head_multiple=8, head_max=256),
            Fit(capability=((8, 0), (9, 0)), dtypes=_HALF, head_multiple=8, head_max=128),
        ),
    ),
    _of("TORCH_NAIVE", "torch_naive:TorchNaive", ("cuda", "rocm", "cpu"), package="torch", fits=_ANY),
)


def known_backends() -> dict[str, BackendSpec]:
    """Every backend by its name: ours, then those that other packages bring.

    Raises:
        AttentionBackendError: another package's entry point is not a :class:`BackendSpec`, or takes a name of ours.
    """
    from importlib.metadata import entry_points

    backends = {spec.name: spec for spec in _BUILT_IN}
    for entry in entry_points(group=ENTRY_POINTS):
        spec = entry.load()
        if not isinstance(spec, BackendSpec) or spec.name != spec.name.upper() or spec.name in backends:
            raise AttentionBackendError(
                f"entry point {entry.name!r} of group {ENTRY_POINTS} ({entry.value}) must be a BackendSpec with a "
                "name of its own in capitals."
            )
        backends[spec.name] = spec
    return backends
