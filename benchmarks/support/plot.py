"""Cost as images grow and as batches grow, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def plot(rows: Sequence[dict[str, Any]], file: Path, title: str) -> None:
    """Microseconds a patch over the image's side at batch 1, and over the batch at the side with most batches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    figure.suptitle(title)
    batches = {side: len({row["batch"] for row in rows if row["side"] == side}) for side in {r["side"] for r in rows}}
    batched = max(sorted(batches), key=lambda side: batches[side])
    panels = (
        ("side", "side of one image, pixels", [row for row in rows if row["batch"] == 1]),
        ("batch", f"images of {batched}² in a batch", [row for row in rows if row["side"] == batched]),
    )
    for axes, (key, label, chosen) in zip(figure.subplots(1, 2), panels, strict=True):
        for family, side in dict.fromkeys((row["family"], row["encoder"]) for row in chosen):
            line = sorted((r for r in chosen if (r["family"], r["encoder"]) == (family, side)), key=lambda r: r[key])
            style = "-o" if side == "ours" else "--x"
            spent_us = [1e3 * r["ms"] / r["patches"] for r in line]
            axes.plot([r[key] for r in line], spent_us, style, label=f"{family}, {side}")
        axes.set(xlabel=label, ylabel="µs a patch", yscale="log")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file)
