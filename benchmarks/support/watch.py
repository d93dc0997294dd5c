"""What a server's own metrics say of a run: how busy its device was, and where an image's time went."""

from __future__ import annotations

import threading
import time
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from types import TracebackType

# A scrape takes Python's lock from whoever serves, for some milliseconds.
_INTERVAL_S: Final = 1.0
# After the first image, and before the last: callers start and end.
_EDGE_S: Final = 1.0
_CPU_STAGES: Final = ("admission", "decode", "resize", "build", "collect", "send")


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    busy_s: float
    num_images: float
    stages_s: dict[str, float]


class Watch:
    """Reads ``/metrics`` while it is entered; :meth:`summary` is of the time in which all callers were busy."""

    def __init__(self, metrics_url: str) -> None:
        self._url = f"{metrics_url.rstrip('/')}/metrics"
        self._samples: list[_Sample] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def summary(self) -> dict[str, Any]:
        """``device_busy``, 0 to 1, how many threads each stage kept busy, and its milliseconds of an image.

        Nothing where the run was too short.
        """
        moving = [
            later
            for earlier, later in zip(self._samples, self._samples[1:], strict=False)
            if later.num_images > earlier.num_images
        ]
        inside = [sample for sample in moving if moving[0].at_s + _EDGE_S <= sample.at_s <= moving[-1].at_s - _EDGE_S]
        if len(inside) < 2:
            return {}
        first, last = inside[0], inside[-1]
        num_images = last.num_images - first.num_images
        stages = {
            name: (last.stages_s[name] - first.stages_s.get(name, 0.0)) / num_images * 1e3 for name in last.stages_s
        }
        return {
            "device_busy": (last.busy_s - first.busy_s) / (last.at_s - first.at_s),
            "stages_ms": {name: round(ms, 2) for name, ms in stages.items() if ms >= 0.005},
            "cores": {
                name: round(stages[name] * num_images / 1e3 / (last.at_s - first.at_s), 2)
                for name in _CPU_STAGES
                if name in stages
            },
        }

    def _watch(self) -> None:
        while not self._over.wait(_INTERVAL_S):
            self._samples.append(self._read())

    def _read(self) -> _Sample:
        with urllib.request.urlopen(self._url, timeout=10) as answer:
            text, at_s = answer.read().decode(), time.monotonic()
        busy_s = num_images = 0.0
        stages: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "encoder_device_busy_seconds_total":
                    busy_s = sample.value
                elif sample.name == "encoder_stage_duration_seconds_sum":
                    stages[sample.labels["stage"]] = sample.value
                elif sample.name == "encoder_stage_duration_seconds_count" and sample.labels["stage"] == "send":
                    num_images = sample.value
        return _Sample(at_s, busy_s, num_images, stages)
