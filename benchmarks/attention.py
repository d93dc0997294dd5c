"""Every attention backend that runs here, side by side in one run: milliseconds and TFLOP/s, forward.

    python benchmarks/attention.py [--dtype bfloat16] [--rounds 20] [--json FILE]

Each is selected as the server selects it, by an override, and must pass the server's start-up check. Backends take
turns, round by round, so that a clock that drifts drifts for all; the figures are medians. On a GPU it is the kernels
that are timed: the device sleeps while Python launches. TFLOP/s are nominal: 4·L²·H·D a sequence, half when causal.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from support.arguments import ROUNDS

from encoder_svc.attention import MMEncoderAttention, PackedSequences
from encoder_svc.attention.selfcheck import check
from encoder_svc.errors import AttentionBackendError, AttentionKernelError
from encoder_svc.platforms import Platform, platform_for_device
from encoder_svc.platforms.backends import FLASH_ATTN

if TYPE_CHECKING:
    from collections.abc import Callable

HEADS = 16
# name, head size, lengths: those of the performance page.
SHAPES = (
    ("80, 4 x 5184", 80, (5184,) * 4),
    ("80, 16 x 1024", 80, (1024,) * 16),
    ("80, eight mixed", 80, (256, 784, 1024, 1600, 2304, 3136, 4096, 5184)),
    ("72, 4 x 5184", 72, (5184,) * 4),
    ("64, 4 x 5184", 64, (5184,) * 4),
    ("80, 256 x 64", 80, (64,) * 256),
)
_WARM_UP_ROUNDS = 3
_SLEEP_CYCLES = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Row:
    """One backend on one shape."""

    shape: str
    backend: str
    implementation: str
    version: str
    ms: float
    tflops: float


def main() -> int:
    arguments = _arguments()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    platform = platform_for_device(device)
    print(
        f"{datetime.date.today()}, {platform.device_name()}, torch {torch.__version__}, {arguments.dtype}, "
        f"H = {HEADS}{', causal' if arguments.causal else ''}: {' '.join(sys.argv)}"
    )
    layers: dict[int, list[MMEncoderAttention]] = {}
    rows: list[Row] = []
    for name, head_size, lengths in SHAPES:
        if arguments.shape not in name:
            continue
        if head_size not in layers:
            layers[head_size] = usable_layers(platform, device, head_size, arguments)
        flop = sum(4 * length**2 for length in lengths) * HEADS * head_size / (2 if arguments.causal else 1)
        for layer, ms in zip(layers[head_size], measure(layers[head_size], lengths, device, arguments), strict=True):
            selection = layer.selection
            row = Row(
                shape=name,
                backend=selection.backend,
                implementation=selection.implementation,
                version=selection.implementation_version,
                ms=ms,
                tflops=flop / ms / 1e9,
            )
            print(f"{name:<17}{_label(layer):<26}{row.ms:9.3f} ms {row.tflops:7.1f} TFLOP/s")
            rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


def usable_layers(
    platform: Platform, device: str, head_size: int, arguments: argparse.Namespace
) -> list[MMEncoderAttention]:
    """A layer for each backend and implementation that passes the check. Prints why of the others."""
    layers = []
    wanted = [name for name in arguments.backends.upper().split(",") if name]
    for backend in platform.supported_vit_attn_backends():
        if backend not in wanted if wanted else backend == "TORCH_NAIVE":
            continue
        pins = [i.name for i in platform.backends[backend].implementations] if backend == FLASH_ATTN else [None]
        for pin in pins:
            try:
                layer = MMEncoderAttention(
                    HEADS,
                    head_size,
                    attn_backend=backend,
                    platform=platform,
                    dtype=arguments.dtype,
                    causal=arguments.causal,
                    flash_attn_implementation=pin,
                )
                check(layer, device)
                layers.append(layer)
            except (AttentionBackendError, AttentionKernelError) as error:
                why = getattr(error, "why", str(error)).partition(" Valid here")[0]
                print(f"not timed, head size {head_size}: {backend} {pin or ''}: {why[:300]}")
    return layers


def measure(
    layers: list[MMEncoderAttention], lengths: tuple[int, ...], device: str, arguments: argparse.Namespace
) -> list[float]:
    """Median milliseconds of each layer, taking turns."""
    sequences = PackedSequences.of(lengths).to(device)
    shape = (sum(lengths), HEADS, layers[0].backend.head_size) if layers else ()
    q, k, v = (torch.randn(shape, device=device, dtype=getattr(torch, arguments.dtype)) for _ in range(3))
    times_ms: list[list[float]] = [[] for _ in layers]
    for turn in range(_WARM_UP_ROUNDS + arguments.rounds):
        for layer, times in zip(layers, times_ms, strict=True):
            ms = _time_ms(lambda layer=layer: layer(q, k, v, *sequences), device)
            if turn >= _WARM_UP_ROUNDS:
                times.append(ms)
    return [statistics.median(times) for times in times_ms]


def _time_ms(run: Callable[[], object], device: str) -> float:
    """One call, by the device's own clock where it has one."""
    if device == "cpu":
        start_s = time.perf_counter()
        run()
        return (time.perf_counter() - start_s) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_SLEEP_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _label(layer: MMEncoderAttention) -> str:
    return f"{layer.selection.backend} ({layer.selection.implementation})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--backends", default="", help="only these, separated by commas; TORCH_NAIVE only if named")
    parser.add_argument("--shape", default="", help="only shapes whose name contains this")
    parser.add_argument("--rounds", type=ROUNDS, default=20)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    return parser.parse_args()


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
