"""One side of benchmarks/checkouts.py, a process: it loads the encoder of the checkout that it runs in, then runs the
cell whose number it reads, and prints how long that took.

    python waiting.py MODEL DEVICE QUANTIZATION SIDExBATCH …
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.support.encoders import Ours, photographs
from benchmarks.support.timing import time_s
from encoder_svc.config import Config

# Forwards of a turn, the first of which does not count.
_LONG, _SHORT = 2, 8
_LONG_S = 0.01


def main() -> None:
    model, device, quantization, *cells = sys.argv[1:]
    ours = Ours(
        Path(model),
        device=device,
        dtype="bfloat16",
        backend=None,
        graph_max_patches=Config().cuda_graph_max_patches,
        quantization=quantization,
    )
    settings = ours.tower.settings
    forwards, measured = [], []
    for cell in cells:
        side, _, number = cell.partition("x")
        rounded = round(int(side) / settings.factor) * settings.factor
        batch = ours.batch(photographs(Path("tests/photos"), rounded, int(number), settings))
        measured.append(f"{rounded}² × {number}")
        forwards.append(partial(time_s, partial(ours.rows, batch), ours.tower.device))
        forwards[-1]()
    calls = [_LONG if forward() > _LONG_S else _SHORT for forward in forwards]
    print("ready " + ",".join(measured), flush=True)
    for line in sys.stdin:
        cell = int(line)
        _, *times_s = (forwards[cell]() for _ in range(calls[cell]))
        print(statistics.median(times_s) * 1e3, flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
