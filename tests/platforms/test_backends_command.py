"""``encoder-svc backends``, as an operator runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from encoder_svc.cli import main
from tests.serving import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KEYS = {"backend", "implementation", "source", "reason", "rejected"}


def described(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    assert main(["backends", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["backends", *flags]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err


def test_the_example_of_the_manual(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--platform cuda --capability 9.0 --dtype bfloat16 --head-size 80 --installed flash_attn_4,xformers"
    decision = described(capsys, *flags.split())
    assert decision.keys() >= KEYS
    assert (decision["backend"], decision["implementation"], decision["source"]) == ("FLASH_ATTN", "fa4", "platform")
    why = {rejection["backend"]: rejection["why"] for rejection in decision["rejected"]}
    assert why["TRITON_ATTN"] == "comes after FLASH_ATTN"
    assert "not installed" in why["FLASHINFER"]
    assert "--mm-encoder-attn-backend names it" in why["TORCH_NAIVE"]


def test_an_amd_machine_with_its_environment(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--platform", "rocm", "--gfx", "gfx942:sramecc+", "--installed", "aiter,flash-attn"]
    assert described(capsys, *flags)["backend"] == "FLASH_ATTN"
    switches = ["--env", "ENCODER_ROCM_USE_AITER=1", "--env", "ENCODER_ROCM_USE_AITER_MHA=1"]
    assert described(capsys, *flags, *switches)["backend"] == "ROCM_AITER_FA"


def test_torch_and_triton_are_taken_as_installed(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--platform", "cuda", "--capability", "8.6"]
    assert described(capsys, *flags)["implementation"] == "torch"
    assert described(capsys, *flags, "--dtype", "float32")["backend"] == "TRITON_ATTN"
    assert described(capsys, "--platform", "cpu")["backend"] == "TORCH_SDPA"


def test_a_pin(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--platform cuda --capability 9.0 --installed fa4,fa2 --mm-encoder-flash-attn-implementation fa2"
    assert described(capsys, *flags.split())["implementation"] == "fa2"


def test_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends", "--platform", "cuda", "--capability", "9.0"]) == 0
    out = capsys.readouterr().out
    assert "FLASH_ATTN" in out
    assert "not XFORMERS" in out


def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENCODER_DEVICE", "cpu")
    assert described(capsys)["source"] == "platform"
    monkeypatch.setenv("ENCODER_MM_ENCODER_ATTN_BACKEND", "torch_naive")
    decision = described(capsys)
    assert (decision["backend"], decision["source"]) == ("TORCH_NAIVE", "override")
    # The environment of this machine says nothing of another.
    assert described(capsys, "--platform", "cpu")["source"] == "platform"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_this_cpus_kernels_are_those_of_a_server(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Callable[[str], Path],
    dtype: str,
) -> None:
    monkeypatch.setenv("ENCODER_DEVICE", "cpu")
    decision = described(capsys, "--dtype", dtype, "--head-size", "16")
    with ServerProcess("--model", tiny_checkpoint("qwen2_5_vl"), "--device", "cpu", "--dtype", dtype) as server:
        assert server.wait_for_log(r"operations: (.*)")[1] == decision["operations"]
        assert server.wait_for_log(r"attention: TORCH_SDPA \((\S+) ")[1] == decision["implementation"]
    assert described(capsys, "--platform", "cpu", "--dtype", dtype)["operations"] is None


def test_a_refused_override_has_the_text_of_serve(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--mm-encoder-attn-backend", "flash_attn"]
    described_text = refused(capsys, "--platform", "cpu", "--head-size", "80", *flags)
    assert main(["serve", "--device", "cpu", "--port", "0", *flags]) == 2
    served_text = capsys.readouterr().err.splitlines()[-1]
    sentence = (
        "--mm-encoder-attn-backend flash_attn: not a backend of platform cpu; it runs on cuda and rocm. Valid here"
    )
    assert described_text.startswith(f"encoder-svc backends: {sentence}")
    assert served_text.startswith(f"encoder-svc serve: {sentence}")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--platform cuda", "needs --capability"),
        ("--platform rocm", "needs --gfx"),
        ("--platform cpu --gfx gfx942", "says nothing of --platform cpu"),
        ("--platform cuda --capability 9.0 --gfx gfx942", "says nothing of --platform cuda"),
        ("--platform tpu", "platform tpu: not known. Known: cpu, cuda, rocm"),
        ("--platform cpu --installed flashy", "'flashy' is no package that a backend needs"),
        ("--platform cpu --env FOO", "is not NAME=VALUE"),
        ("--platform cpu --dtype int8", "not one of auto, float32"),
        ("--platform cpu --head-size 0", "less than 1"),
        ("--capability 9.0", "describe another machine"),
        ("--platform cuda --capability 9.0 --mm-encoder-flash-attn-implementation fa5", "not one of fa4, fa3, fa2"),
    ],
)
def test_contradictions(capsys: pytest.CaptureFixture[str], flags: str, said: str) -> None:
    assert said in refused(capsys, *flags.split())


def test_a_described_machine_needs_no_torch_and_no_grpc() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['grpc'] = None; from encoder_svc.cli import main;"
        "sys.exit(main(['backends', '--platform', 'rocm', '--gfx', 'gfx1100', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["backend"] == "TORCH_SDPA"
