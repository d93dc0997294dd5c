"""Checkouts in turns: this one beside itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def checkouts(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/checkouts.py", "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_each_side_is_measured_in_each_cell() -> None:
    done = checkouts("--dimensions", "tiny", "--rounds", "2", "--cells", "60x1,56x3", "before=.", "after=.")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("qwen3_vl 64² × 1: before ")
    assert "; after " in first
    assert second.startswith("qwen3_vl 64² × 3: before ")


def test_a_side_that_ends_is_named_after_what_it_said() -> None:
    done = checkouts("--dimensions", "tiny", "--rounds", "2", "--cells", "56x1", "one=.:fp8")
    assert done.returncode == 1
    *_, said, named = done.stderr.splitlines()
    assert "--quantization fp8 needs an NVIDIA GPU" in said
    assert named == "one ended with 1: see what it said, above"


@pytest.mark.parametrize("side", ["one=docs", "..", "one=", "one=:fp8"])
def test_what_is_no_checkout_is_refused(side: str) -> None:
    done = checkouts(side)
    assert done.returncode == 2
    assert f"must be NAME=FOLDER or NAME=FOLDER:fp8 of a checkout, not {side!r}" in done.stderr


def test_another_quantization_is_refused() -> None:
    done = checkouts("one=.:int4")
    assert done.returncode == 2
    assert "can be quantised to fp8 alone, not 'int4'" in done.stderr


def test_two_sides_of_one_name_are_refused() -> None:
    done = checkouts("one=.", "one=.")
    assert done.returncode == 2
    assert "a name of its own" in done.stderr
