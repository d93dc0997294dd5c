"""Types of the benchmarks' flags that are numbers: one that makes no sense is refused before anything is measured."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from encoder_svc.bench.arguments import Count, Number

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = Count(10_000)
CLIENTS = Count(4_096)  # as many as `encoder-svc bench serve` takes
PROCESSES = Count(256)
IMAGES = Count(100_000)
DEPTH = Count(1_024)
PATCHES = Count(2**31 - 1)
GRAPH_PATCHES = Count(2**20, least=0)
SIDE = Count(8_192, least=28)  # one merged patch, the least that an encoder takes
SECONDS = Number(86_400.0)
SECONDS_OR_NONE = Number(86_400.0, zero=True)
MILLISECONDS = Number(60_000.0, zero=True)


def listed(one: Callable[[str], int]) -> Callable[[str], list[int]]:
    """An argparse type: several of ``one``, separated by commas."""
    return lambda text: [one(part) for part in text.split(",")]


def cells(text: str) -> list[tuple[int, int]]:
    """An argparse type: the (side, batch) of each cell in ``448x1,1008x8``."""
    found = [part.partition("x") for part in text.split(",")]
    if not all(number for _, _, number in found):
        raise argparse.ArgumentTypeError(f"must be SIDExBATCH, separated by commas, not {text!r}")
    return [(SIDE(side), IMAGES(number)) for side, _, number in found]
