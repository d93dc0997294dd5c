"""What the probe finds on this machine, and what it does not import to find it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from encoder_svc.errors import ConfigError
from encoder_svc.platforms.facts import USE_AITER, parse_capability, parse_gfx, parse_package
from encoder_svc.platforms.interface import platform_for_device
from encoder_svc.platforms.probe import cpu_flags, installed_packages, probe_cpu

if TYPE_CHECKING:
    from pathlib import Path


def make_package(folder: Path, path: str) -> None:
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("raise ImportError('the probe must not import this')\n")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["flash_attn/cute/interface.py"], {"flash_attn_4"}),
        (["flash_attn/__init__.py", "flash_attn/flash_attn_interface.py"], {"flash_attn_2"}),
        (
            ["flash_attn/__init__.py", "flash_attn/flash_attn_interface.py", "flash_attn/cute/interface.py"],
            {"flash_attn_2", "flash_attn_4"},
        ),
        (["flash_attn_interface.py"], {"flash_attn_3"}),
        (["aiter/__init__.py", "xformers/__init__.py"], {"aiter", "xformers"}),
        (["flashinfer/__init__.py"], {"flashinfer"}),
    ],
)
def test_packages_are_found_without_importing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], found: set[str]
) -> None:
    for file in files:
        make_package(tmp_path, file)
    elsewhere = [entry for entry in sys.path if "site-packages" not in entry]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    assert set(installed_packages()) == found


def test_the_cpus_facts() -> None:
    import torch

    facts = probe_cpu({USE_AITER: "1", "HOME": "/"})
    assert facts.platform == "cpu"
    assert facts.torch == torch.__version__
    assert facts.environment == {USE_AITER: "1"}
    assert facts.device_name
    assert facts.capability is facts.gfx is None


def test_a_cpu_has_the_instructions_that_every_core_has(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t: fma avx512_bf16\n\nflags\t: fma amx_bf16 avx512_bf16\nbugs\t: amx_bf16\n")
    assert cpu_flags(cpuinfo) == {"fma", "avx512_bf16"}
    assert cpu_flags(tmp_path / "none") == set()


def test_choosing_for_the_cpu_imports_no_torch() -> None:
    code = (
        "import sys; from encoder_svc.platforms import platform_for_device as choose;"
        "print(choose('cpu').get_vit_attn_backend(80, 'float32').backend); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "TORCH_SDPA"


@pytest.mark.parametrize("device", ["tpu", "cpu:1", "cuda:x", "rocm", "", "cuda:99"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ConfigError, match="--device"):
        platform_for_device(device)


def test_forms() -> None:
    assert parse_capability("9.0") == parse_capability("9") == (9, 0)
    assert parse_gfx("gfx942:sramecc+:xnack-") == parse_gfx("GFX942") == "gfx942"
    assert parse_package("flash-attn-4") == parse_package(" FA4 ") == parse_package("flash_attn_4") == "flash_attn_4"
    assert parse_package("flash-attn") == parse_package("flash_attn") == "flash_attn_2"
    assert parse_package("flashinfer-python") == "flashinfer"
    for parse, wrong in ((parse_capability, "nine"), (parse_gfx, "rdna3"), (parse_package, "flash")):
        with pytest.raises(ConfigError, match=wrong):
            parse(wrong)
