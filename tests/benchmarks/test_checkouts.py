"""Checkouts in turns: this one beside itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def checkouts(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/checkouts.py", "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_each_side_is_measured_in_each_cell() -> None:
    done = checkouts("--dimensions", "tiny", "--rounds", "2", "--cells", "56x1,56x3", "before=.", "after=.")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("qwen3_vl 56² × 1: before ")
    assert "; after " in first
    assert second.startswith("qwen3_vl 56² × 3: before ")


def test_a_side_that_ends_is_named() -> None:
    done = checkouts("--dimensions", "tiny", "--rounds", "2", "--cells", "56x1", "one=.:fp8")
    assert done.returncode == 1
    assert "one ended with 1" in done.stderr


def test_what_is_no_checkout_is_refused() -> None:
    done = checkouts("one=docs")
    assert done.returncode == 2
    assert "must be NAME=FOLDER[:QUANTIZATION] of a checkout, not 'one=docs'" in done.stderr


def test_two_sides_of_one_name_are_refused() -> None:
    done = checkouts("one=.", "one=.")
    assert done.returncode == 2
    assert "a name of its own" in done.stderr
