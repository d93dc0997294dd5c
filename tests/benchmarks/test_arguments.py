"""Every benchmark refuses a number that makes no sense, as argparse words it, before it measures anything."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.support.arguments import SIDE, cells, listed

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

COUNTS = {
    "attention": ["--rounds"],
    "batching": ["--callers", "--depth", "--max-batch-images", "--rounds"],
    "encoder": ["--sizes", "--batches", "--cells", "--depth", "--rounds"],
    "fairness": ["--rounds"],
    "images": ["--rounds"],
    "memory": ["--number"],
    "observability": ["--rounds", "--concurrency"],
    "overload": ["--rounds", "--clients", "--max-queued-patches"],
    "products": ["--rows", "--rounds"],
    "served": [
        "--sides",
        "--clients",
        "--servers",
        "--client-processes",
        "--connections",
        "--rounds",
        "--batch-images",
    ],
}
SECONDS = {
    "batching": ["--duration"],
    "observability": ["--seconds"],
    "overload": ["--duration"],
    "served": ["--duration"],
}
FROM_ZERO = {
    "batching": ["--pack-ms", "--pack-image-ms", "--run-ms", "--run-image-ms", "--elsewhere-ms"],
    "encoder": ["--cuda-graph-max-patches", "--cell-s"],
}


def refused(name: str, flag: str, value: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the command ends as argparse ends it."""
    monkeypatch.setattr(sys, "argv", [name, flag, value])
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    return ended.value.code == 2


@pytest.mark.parametrize(
    ("name", "flag", "values"),
    [
        *((name, flag, ["0", "-1", "2.5", "many", "9" * 12]) for name, flags in COUNTS.items() for flag in flags),
        *((name, flag, ["0", "-1", "nan", "inf"]) for name, flags in SECONDS.items() for flag in flags),
        *((name, flag, ["-1", "nan", "inf"]) for name, flags in FROM_ZERO.items() for flag in flags),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_and_named(
    name: str, flag: str, values: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in values:
        assert refused(name, flag, value, monkeypatch)
        assert re.search(rf"error: argument {flag}: must be .*{re.escape(value)}", capsys.readouterr().err)


def test_no_benchmark_takes_a_number_unchecked() -> None:
    unchecked = [path.name for path in BENCHMARKS.glob("*.py") if re.search(r"type=(int|float)\b", path.read_text())]
    assert unchecked == []


def test_lists_and_cells_are_read() -> None:
    assert listed(SIDE)("448,1008") == [448, 1008]
    assert cells("448x1,1008x8") == [(448, 1), (1008, 8)]


@pytest.mark.parametrize("text", ["448", "448x", "x1", "448x1,", "448x0", "20x1", "448x1x2"])
def test_a_cell_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be"):
        cells(text)
