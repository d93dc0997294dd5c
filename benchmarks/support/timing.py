"""Timing that compares: sides take turns, so that a machine that drifts drifts for all of them; there and back, for a
GPU at its power limit is faster after a side that took less power."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_MIN_ROUNDS = 4
_MATRIX_SIDE = {"cpu": 4096, "cuda": 8192}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_s(run: Callable[[], object], device: torch.device) -> float:
    """One call by the host's clock, until the device is through: what a caller waits for."""
    synchronize(device)
    started_s = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started_s


def interleave(
    sides: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, budget_s: float
) -> dict[str, list[float]]:
    """Seconds of every call of each side, turn by turn after one warm-up round (three on a GPU); every other turn is in
    reverse.

    Stops after ``rounds`` turns, or once ``budget_s`` is spent and there were four, or a larger even number.
    """
    for _ in range(3 if device.type == "cuda" else 1):
        for run in sides.values():
            time_s(run, device)
    times_s: dict[str, list[float]] = {name: [] for name in sides}
    started_s = time.perf_counter()
    for turn in range(rounds):
        if turn >= _MIN_ROUNDS and turn % 2 == 0 and time.perf_counter() - started_s > budget_s:
            break
        for name in sides if turn % 2 == 0 else reversed(sides):
            times_s[name].append(time_s(sides[name], device))
    return times_s


def matrix_product_rate(dtype: torch.dtype, device: torch.device, calls: int = 7) -> float:
    """FLOP/s of a large square matrix product, the median of some calls: what the floor is counted against."""
    side = _MATRIX_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    time_s(lambda: a @ b, device)
    return 2 * side**3 / statistics.median(time_s(lambda: a @ b, device) for _ in range(calls))
