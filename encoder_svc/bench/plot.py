"""A report as a picture: how latencies spread, and what came back when. matplotlib is imported here alone."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from encoder_svc.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from encoder_svc.bench.recorder import Recorder
    from encoder_svc.bench.report import Report
    from encoder_svc.bench.samples import Samples

_LATENCY, _FIRST, _ERRORS = "#1f5fa8", "#e08214", "#c0392b"


def check_plot() -> None:
    """Before a run, so that its figures are not lost for want of a package.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install matplotlib")


def save_plot(report: Report, recorder: Recorder, path: Path) -> None:
    """Draws a PNG of 1,500 by 600 pixels.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5), layout="constrained")
    spread, over_time = figure.subplots(1, 2)
    load = report.load
    loop = f"concurrency {load.concurrency}" if load.rate is None else f"{load.rate:g} requests/s"
    figure.suptitle(f"{report.target.model} {report.target.dtype}, {report.target.attn_backend}: {loop}")
    _draw_spread(spread, recorder)
    _draw_timeline(over_time, report)
    figure.savefig(path, dpi=120, format="png")


def _draw_spread(axes: Any, recorder: Recorder) -> None:
    _draw_steps(axes, recorder.latency_s, "whole answer", _LATENCY, "-")
    _draw_steps(axes, recorder.first_embedding_s, "first embedding", _FIRST, "--")
    _draw_steps(axes, recorder.failure_latency_s, "failed requests", _ERRORS, ":")
    axes.set(xlabel="latency (ms)", ylabel="share of requests", ylim=(0, 1.01), title="Latency, cumulative")
    if axes.lines and max(line.get_xdata()[-1] for line in axes.lines) > 20 * min(
        line.get_xdata()[1] for line in axes.lines
    ):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(visible=True, which="both", alpha=0.3)
    if axes.lines:
        axes.legend(loc="best")


def _draw_steps(axes: Any, samples: Samples, name: str, colour: str, style: str) -> None:
    if not samples.count:
        return
    values_ms = np.sort(samples.values()) * 1e3
    shares = np.arange(1, len(values_ms) + 1) / len(values_ms)
    axes.plot(
        np.concatenate((values_ms[:1], values_ms)),
        np.concatenate(([0.0], shares)),
        label=f"{name} ({samples.count:,})",
        color=colour,
        linestyle=style,
        drawstyle="steps-post",
    )


def _draw_timeline(axes: Any, report: Report) -> None:
    timeline = report.timeline
    edges_s = np.arange(len(timeline.images) + 1) * timeline.bin_s
    axes.stairs(np.array(timeline.images) / timeline.bin_s, edges_s, label="images/s", color=_LATENCY, linewidth=1.5)
    if any(timeline.errors):
        axes.stairs(np.array(timeline.errors) / timeline.bin_s, edges_s, label="errors/s", color=_ERRORS)
    if report.load.warmup_s:
        axes.axvspan(0, report.load.warmup_s, color="0.5", alpha=0.2, label="warm-up, not measured")
    axes.set(xlabel="time (s)", ylabel="per second", xlim=(0, edges_s[-1]), title="Throughput over time")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="best")
