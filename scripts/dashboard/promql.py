"""PromQL over the replicas that the dashboard's variables choose."""

from __future__ import annotations

REPLICA = 'instance=~"$replica"'
WINDOW = "[$__rate_interval]"
CALLS = 'method="EncodeImages", code="OK"'
"""The calls that latency is about."""


def rate(metric: str, labels: str = "") -> str:
    """Per second, of the chosen replicas."""
    return f"rate({metric}{{{', '.join(filter(None, (labels, REPLICA)))}}}{WINDOW})"


def total(metric: str, labels: str = "", by: str = "") -> str:
    """Per second, over the chosen replicas."""
    return f"sum{f' by ({by})' if by else ''} ({rate(metric, labels)})"


def now(metric: str, aggregate: str = "sum", by: str = "") -> str:
    """What a gauge says, over the chosen replicas."""
    return f"{aggregate}{f' by ({by})' if by else ''} ({metric}{{{REPLICA}}})"


def quantile(q: float, histogram: str, labels: str = "", by: str = "") -> str:
    """Of the chosen replicas' histograms together."""
    return f"histogram_quantile({q}, {total(f'{histogram}_bucket', labels, by=', '.join(filter(None, (by, 'le'))))})"


def mean(histogram: str) -> str:
    """Of what a histogram was told."""
    return f"{total(f'{histogram}_sum')} / {total(f'{histogram}_count')}"


def ratio(part: str, *others: str) -> str:
    """Of two counters or more, the share of the first."""
    return f"{total(part)} / ({' + '.join(total(metric) for metric in (part, *others))})"
