"""Where the time goes, by class of kernel."""

from __future__ import annotations

import re
import resource
from collections import Counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

# First match wins; names of CUDA kernels, of Triton kernels and of CPU operators.
CLASSES = (
    ("matrix products", r"gemm"),  # also those that rotate or activate before they store
    ("attention", r"attention|attend|flash|sdpa|fmha|_fwd|_attn|windows"),
    ("rotary", r"rotary|rotate\b"),
    ("norm", r"norm|row_scales"),
    ("activation", r"gelu|silu|sigmoid|activate|::gate"),
    ("quantise", r"quanti"),
    ("matrix products", r"gemm|mm\b|mm_|bmm|nvjet|cutlass|linear|convolution|conv3d|xmma"),
    ("copies", r"copy|cat|index|memcpy|memset|gather|contiguous"),
    ("elementwise", r""),
)


def kernel_class(name: str) -> str:
    return next(label for label, pattern in CLASSES if re.search(pattern, name.lower()))


def page_faults(run: Callable[[], object]) -> int:
    """Pages that one call touches for the first time: memory that it got from the system, free of a clock's noise."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def profile(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of one call by class: of kernels on a GPU, of operators' own time on a CPU."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    run()
    with torch.profiler.profile(activities=[activity]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    totals_ms: Counter[str] = Counter()
    for event in profiler.key_averages():
        spent_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        totals_ms[kernel_class(event.key)] += spent_us / 1e3
    return dict(totals_ms.most_common())
