"""The flags of ``encoder-svc bench serve``. Nothing heavy at import: every command's parser passes here."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

_MAX_CONCURRENCY = 4096
_MAX_OUTSTANDING = 65_536
_MAX_RATE = 100_000.0
_MAX_DURATION_S = 86_400.0
_MAX_IMAGES = 4096

DESCRIPTION = (
    "Sends requests to a running server and reports throughput, latency and errors. Closed loop (--concurrency): "
    "each client sends as soon as its last answer is complete. Open loop (--rate): requests arrive at random, "
    "whatever the answers do. Exit code 0: measured; 1: no image was encoded; 2: refused. "
    "Ctrl-C reports what was measured so far."
)


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every flag but ``--target`` and ``--timeout-s``, which other commands share."""
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument(
        "--concurrency", type=Count(_MAX_CONCURRENCY), default="8", metavar="N",  # a text: else 8, given, is not seen
        help="closed loop: clients (default: %(default)s)",
    )  # fmt: skip
    loop.add_argument("--rate", type=Number(_MAX_RATE), metavar="R", help="open loop: requests/s, Poisson arrivals")
    parser.add_argument(
        "--connections", type=Count(_MAX_CONCURRENCY), default=1, metavar="N",
        help="a request takes the one with the fewest under way; each is one front end's (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-outstanding", type=Count(_MAX_OUTSTANDING), default=1024, metavar="N",
        help="open loop: beyond so many running, a request is counted as not sent (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--duration", type=Number(_MAX_DURATION_S), default=10.0, metavar="SECONDS",
        help="what is measured, after the warm-up (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--warmup-s", type=Number(_MAX_DURATION_S, zero=True), default=2.0, metavar="SECONDS",
        help="load before that, not counted (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--mix", type=Path, metavar="FILE",
        help="which requests: JSON or YAML, see configs/bench-mix.yaml (default: JPEG noise of four sizes)",
    )  # fmt: skip
    parser.add_argument(
        "--images-per-request", type=_range, default=(1, 1), metavar="N|LEAST-MOST",
        help="for entries of the mix that say nothing of their own (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--unique", action=argparse.BooleanOptionalAction, default=True,
        help="make each image differ from every other, so that no cache answers (default: on)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=Count(2**32 - 1, least=0), default=0, metavar="K",
        help="of noise, mix and arrivals: same seed, same requests (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it there; needs matplotlib")


class Number:
    """An argparse type: a number above 0 (or from 0) up to ``most``."""

    def __init__(self, most: float, *, zero: bool = False) -> None:
        self._most = most
        self._zero = zero

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (0 < value <= self._most or (self._zero and value == 0)):
            least = "from 0" if self._zero else "above 0"
            raise argparse.ArgumentTypeError(f"must be a number {least} up to {self._most:g}, not {text!r}")
        return value


class Count:
    """An argparse type: a whole number from ``least`` to ``most``."""

    def __init__(self, most: int, *, least: int = 1) -> None:
        self._most = most
        self._least = least

    def __call__(self, text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or not self._least <= int(text) <= self._most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {self._least} to {self._most}, not {text!r}")
        return int(text)


def _range(text: str) -> tuple[int, int]:
    count = Count(_MAX_IMAGES)
    least, _, most = text.partition("-")
    pair = count(least), count(most or least)
    if pair[0] > pair[1]:
        raise argparse.ArgumentTypeError(f"must be a number, or the least and the most, such as 1-8, not {text!r}")
    return pair
