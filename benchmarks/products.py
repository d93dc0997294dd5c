"""An encoder's matrix products on this CPU in bfloat16, TFLOP/s: oneDNN's by rows at a time, ours where there is AMX.

    OMP_NUM_THREADS=2 python benchmarks/products.py [--rows 1024,784] [--rounds 9]

Each row of the table is one layer of an encoder. Several weights of its size are taken in turn, so that they come from
memory, as an encoder's do; so do the sides. Figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.support.arguments import PATCHES, ROUNDS, listed  # noqa: E402
from encoder_svc.attention.cpu_kernels import has_amx  # noqa: E402
from encoder_svc.models.amx_products import AmxProducts  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

# Inputs, outputs and what is done with them, of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.
LAYERS = (
    (1280, 3840, "stored"),
    (1280, 5120, "activated"),
    (5120, 1280, "added"),
    (1280, 3420, "activated"),
    (3420, 1280, "added"),
    (1152, 4304, "activated"),
    (4304, 1152, "added"),
)
ROWS_AT_A_TIME = (128, 256, 512, 1024)
ACT = "gelu_pytorch_tanh"
_WEIGHTS_BYTES = 80_000_000


def main() -> int:
    arguments = _arguments()
    products = AmxProducts() if has_amx() else None
    print(f"torch {torch.__version__}, threads {torch.get_num_threads()}, AMX {has_amx()}")
    for rows in arguments.rows:
        for num_in, num_out, how in LAYERS:
            measured = measure(rows, num_in, num_out, how, arguments.rounds, products)
            print(f"{rows} × {num_in} → {num_out} {how}: ", end="")
            print(", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in measured.items()), flush=True)
    return 0


def measure(
    rows: int, num_in: int, num_out: int, how: str, rounds: int, products: AmxProducts | None
) -> dict[str, float]:
    """FLOP/s of each side."""
    number = max(2, _WEIGHTS_BYTES // (2 * num_in * num_out))
    weights = [torch.randn(num_out, num_in).mul_(num_in**-0.5).bfloat16() for _ in range(number)]
    x, bias, hidden = (torch.randn(*shape).bfloat16() for shape in ((rows, num_in), (num_out,), (rows, num_out)))
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in weights]
    sides: dict[str, Callable[[int], object]] = {"repacked in every call": lambda i: F.linear(x, weights[i], bias)}
    for some in ROWS_AT_A_TIME:
        stretches = list(zip(x.split(some), hidden.split(some), strict=True))
        sides[f"oneDNN {some}"] = lambda i, stretches=stretches: [
            _onednn(part, packed[i], bias, residual, how) for part, residual in stretches
        ]
    if products is not None:
        sides["ours"] = _ours(products, x, weights, bias, hidden, how)
    times_s: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            started_s = time.perf_counter()
            run(turn % number)
            times_s[name].append(time.perf_counter() - started_s)
    return {name: 2 * rows * num_in * num_out / statistics.median(times[1:]) for name, times in times_s.items()}


def _onednn(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, how: str
) -> torch.Tensor:
    if how == "added":
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, "add")
    act = ("gelu", [], "tanh") if how == "activated" else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, *act)


def _ours(
    products: AmxProducts,
    x: torch.Tensor,
    weights: list[torch.Tensor],
    bias: torch.Tensor,
    hidden: torch.Tensor,
    how: str,
) -> Callable[[int], None]:
    panels, blocks = [products.panels(weight) for weight in weights], products.blocks(x)
    is_activated = how == "activated"
    out = products.empty_blocks(*hidden.shape) if is_activated else hidden
    return lambda i: products.multiply(
        blocks,
        panels[i],
        bias,
        out,
        len(x),
        act=ACT if is_activated else None,
        add=how == "added",
        in_blocks=is_activated,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=listed(PATCHES), default="1024,784", help="patches of a batch")
    parser.add_argument("--rounds", type=ROUNDS, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
