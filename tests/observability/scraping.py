"""Reading a server's metrics in tests."""

from __future__ import annotations

import time
import urllib.request
from typing import TYPE_CHECKING, Self

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client.metrics_core import Metric
    from prometheus_client.samples import Sample


class Scrape:
    """All samples of one answer of ``/metrics``."""

    def __init__(self, families: list[Metric]) -> None:
        self.families = families
        self.samples: list[Sample] = [sample for family in families for sample in family.samples]

    @classmethod
    def of(cls, port: int, *, openmetrics: bool = False) -> Self:
        accept = "application/openmetrics-text; version=1.0.0" if openmetrics else "text/plain"
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read().decode()
        return cls(list(parse_openmetrics(text) if openmetrics else parse_text(text)))

    @classmethod
    def until(cls, port: int, reached: Callable[[Self], bool], timeout_s: float = 20) -> Self:
        """Scrapes until ``reached``; what a server books after its last message may come a moment later."""
        deadline_s = time.monotonic() + timeout_s
        while not reached(scrape := cls.of(port)):
            assert time.monotonic() < deadline_s, "the metrics never said so"
            time.sleep(0.02)
        return scrape

    def value(self, name: str, **labels: str) -> float:
        """The sum over the samples of that name that carry these labels; at least one must."""
        found = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        assert found, f"no sample {name} {labels}"
        return sum(found)
