"""Each way to refuse an override has a sentence of its own, which says what is valid here; and what is not refused is
taken as it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoder_svc.errors import AttentionBackendError
from encoder_svc.platforms import Facts, Platform
from encoder_svc.platforms.backends import known_backends
from encoder_svc.platforms.cpu import CpuPlatform
from encoder_svc.platforms.cuda import CudaPlatform
from encoder_svc.platforms.facts import PACKAGES, SWITCHES, TRITON_AMD
from encoder_svc.platforms.rocm import RocmPlatform
from tests.platforms.machines import TRITON_BUILD, cpu, cuda, rocm

# machine, dtype, head size, override, what the sentence says
REFUSALS = {
    "unknown": (cuda((9, 0)), "bfloat16", 80, "FLASHY", "not a backend of platform cuda or any"),
    "unknown on a CPU": (cpu(), "float32", 80, "", "not a backend of platform cpu or any"),
    "another platform's": (cuda((9, 0)), "bfloat16", 80, "rocm_aiter_fa", "not a backend of platform cuda; it runs on"),
    "a GPU's on a CPU": (cpu(), "float32", 80, "Flash_Attn", "it runs on cuda and rocm"),
    "not installed": (cuda((9, 0)), "bfloat16", 80, "xformers", "needs the package xformers, which is not installed"),
    "how to install": (cuda((9, 0)), "bfloat16", 80, "FLASHINFER", "pip install flashinfer-python"),
    "aiter not installed": (rocm("gfx942"), "bfloat16", 80, "ROCM_AITER_FA", "needs the package aiter"),
    "flash-attn not installed": (rocm("gfx942"), "float16", 80, "FLASH_ATTN", "needs the package flash_attn_2"),
    "dtype": (cuda((9, 0)), "float32", 80, "FLASH_ATTN", "takes float16 and bfloat16 on this device, not float32"),
    "dtype of aiter": (rocm("gfx942", "aiter"), "float32", 80, "ROCM_AITER_FA", "not float32"),
    "dtype on an old device": (cuda((7, 5), "xformers"), "bfloat16", 80, "XFORMERS", "takes float16 and float32"),
    "head size": (
        cuda((9, 0)),
        "bfloat16",
        84,
        "FLASH_ATTN",
        "takes no head size 84 on this device, only multiples of 8",
    ),
    "too large a head": (cuda((9, 0)), "bfloat16", 264, "FLASH_ATTN", "only multiples of 8 up to 256"),
    "too large for Triton": (cuda((9, 0)), "float32", 320, "TRITON_ATTN", "only those up to 256"),
    "capability": (
        cuda((7, 5)),
        "float16",
        80,
        "FLASH_ATTN",
        "needs compute capability 8.0 or newer; this device has 7.5",
    ),
    "capability of Triton": (cuda((7, 0)), "float16", 80, "TRITON_ATTN", "needs compute capability 8.0 or newer"),
    "architecture": (rocm("gfx90a", "aiter"), "float16", 80, "ROCM_AITER_FA", "gfx94…/gfx95…; this device has gfx90a"),
    "architecture of flash-attn": (rocm("gfx1030", "flash_attn_2"), "float16", 80, "FLASH_ATTN", "has gfx1030"),
    "a switch": (rocm("gfx1100", "flash_attn_2"), "float16", 80, "FLASH_ATTN", f"needs {TRITON_AMD}=TRUE"),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS.keys())
def test_refusal(refusal: tuple[Platform, str, int, str, str]) -> None:
    platform, dtype, head_size, override, said = refusal
    with pytest.raises(AttentionBackendError) as caught:
        platform.get_vit_attn_backend(head_size, dtype, override)
    text = str(caught.value)
    assert text.startswith(f"--mm-encoder-attn-backend {override}: ")
    assert said in text
    valid = text.partition("Valid here")[2].partition(": ")[2].rstrip(".").split(", ")
    assert valid
    for name in valid:
        assert platform.get_vit_attn_backend(head_size, dtype, name).backend == name
    for name in set(platform.supported_vit_attn_backends()) - set(valid):
        with pytest.raises(AttentionBackendError):
            platform.get_vit_attn_backend(head_size, dtype, name)


def test_an_unknown_pin_is_refused() -> None:
    with pytest.raises(AttentionBackendError, match=r"fa5: not an implementation. Valid: fa4, fa3, fa2, torch"):
        cuda((9, 0)).get_vit_attn_backend(80, "bfloat16", flash_attn_implementation="fa5")


def test_an_override_with_a_pin_that_cannot_run_is_refused() -> None:
    with pytest.raises(
        AttentionBackendError, match="FLASH_ATTN with --mm-encoder-flash-attn-implementation fa3: FLASH"
    ):
        cuda((9, 0), "flash_attn_4").get_vit_attn_backend(80, "bfloat16", "FLASH_ATTN", flash_attn_implementation="fa3")


def test_some_refusals_need_no_head_size() -> None:
    for platform, override in ((cpu(), "FLASHY"), (cpu(), "XFORMERS"), (cuda((9, 0)), "XFORMERS")):
        with pytest.raises(AttentionBackendError):
            platform.refuse_early(override, None)
    for platform, override in ((cpu(), None), (cuda((9, 0)), "flash_attn"), (rocm("gfx942"), "torch_sdpa")):
        platform.refuse_early(override, None)


def test_an_override_needs_no_switch() -> None:
    """aiter's switches are for the automatic choice."""
    selection = rocm("gfx942", "aiter").get_vit_attn_backend(80, "bfloat16", "rocm_aiter_fa")
    assert (selection.backend, selection.source) == ("ROCM_AITER_FA", "override")


_PACKAGES = st.dictionaries(st.sampled_from(sorted(PACKAGES)), st.just("1.0"))
_ENVIRONMENT = st.dictionaries(st.sampled_from(SWITCHES), st.sampled_from(["0", "1", "TRUE"]))
PLATFORMS = st.one_of(
    st.builds(
        lambda capability, packages, environment: CudaPlatform(
            Facts(platform="cuda", capability=capability, packages=packages, environment=environment, torch="2.11")
        ),
        st.tuples(st.integers(5, 13), st.integers(0, 9)),
        _PACKAGES,
        _ENVIRONMENT,
    ),
    st.builds(
        lambda gfx, packages, environment: RocmPlatform(
            Facts(platform="rocm", gfx=gfx, packages=packages, environment=environment, torch="2.11")
        ),
        st.sampled_from(["gfx906", "gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1201"]),
        _PACKAGES,
        _ENVIRONMENT,
    ),
    st.builds(lambda packages: CpuPlatform(Facts(platform="cpu", packages=packages, torch="2.11")), _PACKAGES),
)
DTYPES = st.sampled_from(["float32", "float16", "bfloat16"])
HEAD_SIZES = st.one_of(st.integers(1, 320), st.sampled_from([64, 72, 80, 96, 128, 256]))


@given(
    platform=PLATFORMS,
    head_size=HEAD_SIZES,
    dtype=DTYPES,
    override=st.sampled_from([case(name) for name in known_backends() for case in (str.upper, str.lower, str.title)]),
    pin=st.sampled_from([None, "fa4", "fa3", "fa2", "torch"]),
)
def test_an_accepted_override_comes_back_unchanged(
    platform: Platform, head_size: int, dtype: str, override: str, pin: str | None
) -> None:
    try:
        selection = platform.get_vit_attn_backend(head_size, dtype, override, flash_attn_implementation=pin)
    except AttentionBackendError:
        return
    assert (selection.backend, selection.source) == (override.upper(), "override")
    assert selection.rejected == ()
    if pin and selection.backend == "FLASH_ATTN":
        assert selection.implementation == pin


@given(platform=PLATFORMS, head_size=HEAD_SIZES, dtype=DTYPES)
def test_the_automatic_choice_could_have_been_asked_for(platform: Platform, head_size: int, dtype: str) -> None:
    """It always exists, and is never one that an override of the same name would be refused."""
    chosen = platform.get_vit_attn_backend(head_size, dtype)
    asked = platform.get_vit_attn_backend(head_size, dtype, chosen.backend)
    assert (asked.backend, asked.implementation) == (chosen.backend, chosen.implementation)
    assert chosen.source in ("platform", "promoted")
    assert not platform.backends[chosen.backend].override_only
    if TRITON_BUILD.items() - dict(platform.facts.environment).items():
        assert chosen.source == "platform"
