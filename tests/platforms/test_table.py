"""The decision table of the design, a test for each row, and promotion."""

from __future__ import annotations

import pytest

from encoder_svc.errors import AttentionBackendError
from encoder_svc.platforms import Platform, Rule
from encoder_svc.platforms.cpu import CpuPlatform
from encoder_svc.platforms.facts import TRITON_AMD, USE_AITER, USE_AITER_MHA, Facts
from tests.platforms.machines import AITER_ON, TRITON_BUILD, cpu, cuda, rocm

FA = ("flash_attn_4", "flash_attn_3", "flash_attn_2")

# machine, dtype, head size, backend, implementation
ROWS = {
    # CUDA ≥ 8.0, fp16/bf16, head size % 8 == 0 and ≤ 256
    "9.0 with all": (cuda((9, 0), *FA), "bfloat16", 80, "FLASH_ATTN", "fa4"),
    "9.0 without 4": (cuda((9, 0), *FA[1:]), "bfloat16", 80, "FLASH_ATTN", "fa3"),
    "9.0 with 2": (cuda((9, 0), *FA[2:]), "float16", 72, "FLASH_ATTN", "fa2"),
    "9.0 bare": (cuda((9, 0)), "bfloat16", 80, "FLASH_ATTN", "torch"),
    "10.0 with all": (cuda((10, 0), *FA), "bfloat16", 128, "FLASH_ATTN", "fa4"),
    "10.3 with all": (cuda((10, 3), *FA), "bfloat16", 128, "FLASH_ATTN", "fa4"),
    "10.0 without 4": (cuda((10, 0), *FA[1:]), "bfloat16", 128, "FLASH_ATTN", "fa2"),
    "10.0, a head that 4 does not take there": (cuda((10, 0), *FA), "bfloat16", 160, "FLASH_ATTN", "fa2"),
    "8.0 with all": (cuda((8, 0), *FA), "bfloat16", 80, "FLASH_ATTN", "fa2"),
    "8.9 with 4 and 3": (cuda((8, 9), *FA[:2]), "float16", 64, "FLASH_ATTN", "torch"),
    "12.0 with all": (cuda((12, 0), *FA), "bfloat16", 80, "FLASH_ATTN", "fa2"),
    "9.0, the largest head": (cuda((9, 0), *FA), "bfloat16", 256, "FLASH_ATTN", "fa4"),
    "9.0, other packages change nothing": (
        cuda((9, 0), "xformers", "flashinfer"),
        "float16",
        80,
        "FLASH_ATTN",
        "torch",
    ),
    # CUDA ≥ 8.0, otherwise
    "9.0 in float32": (cuda((9, 0), *FA), "float32", 80, "TRITON_ATTN", "triton"),
    "8.0, an odd head": (cuda((8, 0), *FA), "bfloat16", 84, "TRITON_ATTN", "triton"),
    "9.0, too large a head for Triton": (cuda((9, 0), *FA), "float32", 320, "TORCH_SDPA", "torch"),
    # CUDA < 8.0
    "7.5 with xformers": (cuda((7, 5), "xformers", *FA), "float16", 80, "XFORMERS", "xformers"),
    "7.0 in float32": (cuda((7, 0), "xformers"), "float32", 80, "XFORMERS", "xformers"),
    "7.5 bare": (cuda((7, 5)), "float16", 80, "TORCH_SDPA", "torch"),
    "7.5 in bfloat16, which it cannot multiply": (cuda((7, 5), "xformers"), "bfloat16", 80, "TORCH_SDPA", "torch"),
    # ROCm
    "gfx942 with aiter on": (rocm("gfx942", "aiter", environment=AITER_ON), "bfloat16", 80, "ROCM_AITER_FA", "aiter"),
    "gfx950 with aiter on": (rocm("gfx950", "aiter", environment=AITER_ON), "float16", 128, "ROCM_AITER_FA", "aiter"),
    "gfx942 with aiter on and flash-attn": (
        rocm("gfx942", "aiter", "flash_attn_2", environment=AITER_ON),
        "bfloat16",
        80,
        "ROCM_AITER_FA",
        "aiter",
    ),
    "gfx942 with aiter, not on": (rocm("gfx942", "aiter", "flash_attn_2"), "bfloat16", 80, "FLASH_ATTN", "fa2"),
    "gfx942 with aiter's attention not on": (
        rocm("gfx942", "aiter", "flash_attn_2", environment={USE_AITER: "1", USE_AITER_MHA: "0"}),
        "bfloat16",
        80,
        "FLASH_ATTN",
        "fa2",
    ),
    "gfx942 with aiter as a whole not on": (
        rocm("gfx942", "aiter", "flash_attn_2", environment={USE_AITER_MHA: "1"}),
        "bfloat16",
        80,
        "FLASH_ATTN",
        "fa2",
    ),
    "gfx942 with aiter on but not there": (rocm("gfx942", environment=AITER_ON), "bfloat16", 80, "TORCH_SDPA", "torch"),
    "gfx90a, older than aiter takes": (
        rocm("gfx90a", "aiter", "flash_attn_2", environment=AITER_ON),
        "bfloat16",
        80,
        "FLASH_ATTN",
        "fa2",
    ),
    "gfx942 in float32": (
        rocm("gfx942", "aiter", "flash_attn_2", environment=AITER_ON),
        "float32",
        80,
        "TORCH_SDPA",
        "torch",
    ),
    "gfx90a with flash-attn": (rocm("gfx90a", "flash_attn_2"), "float16", 72, "FLASH_ATTN", "fa2"),
    "gfx90a bare": (rocm("gfx90a"), "bfloat16", 80, "TORCH_SDPA", "torch"),
    "gfx1100 bare": (rocm("gfx1100"), "bfloat16", 80, "TORCH_SDPA", "torch"),
    "gfx1100, flash-attn without its Triton build": (
        rocm("gfx1100", "flash_attn_2"),
        "bfloat16",
        80,
        "TORCH_SDPA",
        "torch",
    ),
    "gfx1100, its Triton build in float32": (
        rocm("gfx1100", "flash_attn_2", environment=TRITON_BUILD),
        "float32",
        80,
        "TORCH_SDPA",
        "torch",
    ),
    "gfx1030": (
        rocm("gfx1030", "flash_attn_2", "aiter", environment=TRITON_BUILD | AITER_ON),
        "float16",
        80,
        "TORCH_SDPA",
        "torch",
    ),
    # CPU
    "CPU": (cpu(), "float32", 80, "TORCH_SDPA", "torch"),
    "CPU in bfloat16": (cpu(), "bfloat16", 77, "TORCH_SDPA", "torch"),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_the_platforms_choice(row: tuple[Platform, str, int, str, str]) -> None:
    platform, dtype, head_size, backend, implementation = row
    selection = platform.get_vit_attn_backend(head_size, dtype)
    assert (selection.backend, selection.implementation, selection.source) == (backend, implementation, "platform")
    package = next(i.package for i in platform.backends[backend].implementations if i.name == implementation)
    assert selection.implementation_version == platform.facts.version(package)
    # Every other backend of the platform is passed over, each with a reason, and the chosen one is not.
    others = set(platform.supported_vit_attn_backends()) - {backend}
    assert {rejection.backend for rejection in selection.rejected} == others
    assert all(rejection.why for rejection in selection.rejected)


@pytest.mark.parametrize("gfx", ["gfx1100", "gfx1151", "gfx1201"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_promotion_on_rdna(gfx: str, dtype: str) -> None:
    selection = rocm(gfx, "flash_attn_2", environment=TRITON_BUILD).get_vit_attn_backend(80, dtype)
    assert (selection.backend, selection.implementation, selection.source) == ("FLASH_ATTN", "fa2", "promoted")
    assert "TORCH_SDPA" in [rejection.backend for rejection in selection.rejected]


@pytest.mark.parametrize("value", ["1", "true", "True", "FALSE", ""])
def test_only_the_value_that_flash_attn_itself_looks_for_promotes(value: str) -> None:
    selection = rocm("gfx1100", "flash_attn_2", environment={TRITON_AMD: value}).get_vit_attn_backend(80, "float16")
    assert (selection.backend, selection.source) == ("TORCH_SDPA", "platform")
    assert f"{TRITON_AMD}=TRUE" in {r.backend: r.why for r in selection.rejected}["FLASH_ATTN"]


def test_no_override_is_promoted() -> None:
    platform = rocm("gfx1100", "flash_attn_2", environment=TRITON_BUILD)
    for override in ("TORCH_SDPA", "TORCH_NAIVE", "TRITON_ATTN"):
        selection = platform.get_vit_attn_backend(80, "bfloat16", override)
        assert (selection.backend, selection.source) == (override, "override")


def test_a_third_partys_choice_is_promoted_too() -> None:
    """Its rule chooses something else, upstream flash-attn is there and takes the device: FLASH_ATTN is taken."""

    class Theirs(type(cuda((9, 0)))):  # type: ignore[misc]
        def rule(self) -> Rule:
            return Rule(order=("TORCH_SDPA",), because="as the third party likes it")

    facts = cuda((9, 0), "flash_attn_4").facts
    selection = Theirs(facts).get_vit_attn_backend(80, "bfloat16")
    assert (selection.backend, selection.implementation, selection.source) == ("FLASH_ATTN", "fa4", "promoted")
    # torch's own kernel is not upstream flash-attn; nor is flash-attn promoted to what it cannot take.
    assert Theirs(cuda((9, 0)).facts).get_vit_attn_backend(80, "bfloat16").backend == "TORCH_SDPA"
    assert Theirs(facts).get_vit_attn_backend(80, "float32").backend == "TORCH_SDPA"
    assert Theirs(facts).get_vit_attn_backend(84, "bfloat16").backend == "TORCH_SDPA"


def test_a_pin_is_obeyed_inside_flash_attn() -> None:
    platform = cuda((9, 0), *FA)
    for pin in ("fa4", "FA3", "fa2", "torch"):
        for override in (None, "flash_attn"):
            selection = platform.get_vit_attn_backend(80, "bfloat16", override, flash_attn_implementation=pin)
            assert (selection.backend, selection.implementation) == ("FLASH_ATTN", pin.lower())


def test_a_pin_that_cannot_run_is_refused_and_not_passed_over() -> None:
    with pytest.raises(AttentionBackendError, match=r"fa4 needs the package flash_attn_4.* Valid here: fa2, torch\."):
        cuda((9, 0), "flash_attn_2").get_vit_attn_backend(80, "bfloat16", flash_attn_implementation="fa4")
    with pytest.raises(AttentionBackendError, match=r"fa3 needs compute capability 9\.0 to below 10\.0; .* has 8\.0"):
        cuda((8, 0), *FA).get_vit_attn_backend(80, "bfloat16", flash_attn_implementation="fa3")


def test_a_pin_changes_nothing_where_flash_attn_is_not_the_choice() -> None:
    for platform, dtype in ((cpu(), "bfloat16"), (cuda((9, 0), *FA), "float32"), (cuda((7, 5)), "float16")):
        pinned = platform.get_vit_attn_backend(80, dtype, flash_attn_implementation="fa4")
        assert pinned.backend == platform.get_vit_attn_backend(80, dtype).backend
        assert "--mm-encoder-flash-attn-implementation fa4 has no effect on it" in pinned.reason


def test_what_each_platform_supports() -> None:
    everywhere = {"TORCH_SDPA", "TORCH_NAIVE"}
    assert set(cpu().supported_vit_attn_backends()) == everywhere
    assert set(cuda((9, 0)).supported_vit_attn_backends()) == everywhere | {
        "FLASH_ATTN",
        "FLASHINFER",
        "TRITON_ATTN",
        "XFORMERS",
    }
    assert set(rocm("gfx942").supported_vit_attn_backends()) == everywhere | {
        "FLASH_ATTN",
        "ROCM_AITER_FA",
        "TRITON_ATTN",
    }
    assert cuda((9, 0)).supported_vit_attn_backends()[0] == "FLASH_ATTN"
    assert cuda((7, 5)).supported_vit_attn_backends()[0] == "XFORMERS"


def test_auto_dtype() -> None:
    assert cuda((9, 0)).default_dtype() == cuda((8, 0)).default_dtype() == rocm("gfx942").default_dtype() == "bfloat16"
    assert cuda((7, 5)).default_dtype() == "float16"
    assert cpu().default_dtype() == "float32"
    assert CpuPlatform(Facts(platform="cpu", cpu_flags=frozenset({"avx512_bf16"}))).default_dtype() == "bfloat16"
