#!/usr/bin/env python3
"""The encoder of this checkout beside those of others, on one machine and in turns.

    git worktree add ../before COMMIT
    python benchmarks/checkouts.py --family qwen3_vl --cells 448x1,992x8 before=../before this=. fp8=.:fp8

Each side is a process of its own, in bfloat16; all have the same weights and images and wait for their turn, there and
back. fp8=.:fp8 is this checkout with its products quantised. Other checkouts are driven by their own
benchmarks/support, so they cannot be of any age. Prints medians and, in brackets, how many times as fast as the first
side, the fastest and the slowest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.support.arguments import DEPTH, ROUNDS, cells  # noqa: E402
from encoder_svc.models.registry import family_names  # noqa: E402
from encoder_svc.models.synthetic import make_checkpoint  # noqa: E402

READY = "ready "


class Side(NamedTuple):
    name: str
    folder: Path
    quantization: str


class Waiting:
    """A side's process, which runs a cell whenever it is told to.

    Raises:
        RuntimeError: it ended.
    """

    def __init__(self, side: Side, model: Path, arguments: argparse.Namespace) -> None:
        self.name = side.name
        options = [str(model), arguments.device, side.quantization, *(f"{s}x{n}" for s, n in arguments.cells)]
        # What this process finds on PYTHONPATH the others find too, but for a checkout of ours.
        beside = [str(side.folder), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self.cells: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks/support/waiting.py"), *options],
            cwd=side.folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(beside)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self) -> None:
        while not (line := self._line()).startswith(READY):
            pass
        self.cells = line.removeprefix(READY).split(",")

    def run(self, cell: int) -> float:
        """Milliseconds of a forward of ``cell``."""
        assert self._process.stdin is not None
        print(cell, file=self._process.stdin, flush=True)
        return float(self._line())

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}: see what it said, above")
        return line.strip()


def main() -> int | str:
    arguments = _arguments()
    sides = arguments.sides
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / arguments.family
        size = {"size": arguments.dimensions, "depth": arguments.depth, "dtype": "bfloat16"}
        make_checkpoint(model, family=arguments.family, vision_only=True, **size)
        waiting: list[Waiting] = []
        try:
            waiting += (Waiting(side, model, arguments) for side in sides)
            for one in waiting:
                one.wait_until_ready()
            for index, cell in enumerate(waiting[0].cells):
                print(f"{arguments.family} {cell}:", _measured(waiting, index, arguments.rounds), flush=True)
        except RuntimeError as error:
            return str(error)
        finally:
            for one in waiting:
                one.end()
    return 0


def _measured(waiting: list[Waiting], cell: int, rounds: int) -> str:
    times_ms: dict[str, list[float]] = {one.name: [] for one in waiting}
    for turn in range(rounds):
        for one in waiting if turn % 2 == 0 else reversed(waiting):
            times_ms[one.name].append(one.run(cell))
    medians_ms = {name: statistics.median(times) for name, times in times_ms.items()}
    first_ms = medians_ms[waiting[0].name]
    return "; ".join(
        f"{name} {ms:.2f} ms ({first_ms / ms:.3f}, {min(times_ms[name]):.2f} to {max(times_ms[name]):.2f})"
        for name, ms in medians_ms.items()
    )


def _side(text: str) -> Side:
    name, _, where = text.partition("=")
    folder, quantized, quantization = where.partition(":")
    if not name or not folder or not (Path(folder) / "encoder_svc").is_dir():
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER or NAME=FOLDER:fp8 of a checkout, not {text!r}")
    if quantized and quantization != "fp8":
        raise argparse.ArgumentTypeError(f"can be quantised to fp8 alone, not {quantization!r}")
    return Side(name, Path(folder).resolve(), quantization or "none")


def _arguments() -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", type=_side, nargs="+", metavar="NAME=FOLDER[:fp8]")
    parser.add_argument("--family", choices=family_names(), default="qwen3_vl", help="default: qwen3_vl")
    parser.add_argument(
        "--cells",
        type=cells,
        default="448x1,992x8",
        help="SIDExBATCH, separated by commas; sides are rounded to the family's multiple; default: 448x1,992x8",
    )
    parser.add_argument("--rounds", type=ROUNDS, default=8, help="turns of each side; default: 8")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one"
    )
    parser.add_argument("--dimensions", default="real", choices=["real", "tiny"], help="of the weights; default: real")
    parser.add_argument("--depth", type=DEPTH, help="layers, for a quick look; default: the checkpoints' own")
    arguments = parser.parse_args()
    if len({side.name for side in arguments.sides}) < len(arguments.sides):
        parser.error("each side needs a name of its own")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
