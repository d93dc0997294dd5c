"""What a metric's definition says, and the buckets and label values that definitions share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from encoder_svc.errors import CODE_NUMBERS, Reason
from encoder_svc.observability.stages import STAGES
from encoder_svc.observability.start import PHASES

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind = Literal["counter", "gauge", "histogram"]

METHODS: Final = ("EncodeImages", "FetchEmbeddings", "ReleaseEmbeddings", "GetModelInfo")
IMAGE_OUTCOMES: Final = ("encoded", "cached", "shared", "fetched", "failed", "cancelled")
BATCH_OUTCOMES: Final = ("encoded", "failed", "out_of_memory", "hung")
TRANSPORTS: Final = ("stream",)

LATENCY_BUCKETS_S: Final = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Half a millisecond to a minute, finer below 100 ms."""
LAG_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
PATCHES_BUCKETS: Final = (64, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536, 131_072)
IMAGES_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
RATIO_BUCKETS: Final = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75)

LABEL_VALUES: Final[Mapping[str, tuple[str, ...]]] = {
    "method": METHODS,
    "code": ("OK", *CODE_NUMBERS),
    "reason": ("", *(str(reason) for reason in Reason)),
    "stage": STAGES,
    "phase": PHASES,
    "transport": TRANSPORTS,
}
"""All that a label may hold, for labels of more than one metric. Nothing that a caller sends is ever among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricDefinition:
    """One metric.

    Attributes:
        name: as Prometheus knows it; a counter ends in ``_total``.
        unit: the base unit, spelled out.
        labels: each label, and the values it may have; none for labels that describe this replica (``build_info``),
            which have one value each.
        meaning: one sentence, also the metric's HELP.
        when_it_moves: what an operator does about it.
        buckets: a histogram's upper bounds.
    """

    name: str
    kind: Kind
    unit: str
    meaning: str
    when_it_moves: str
    labels: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricGroup:
    """Metrics that answer one of an operator's questions."""

    title: str
    metrics: tuple[MetricDefinition, ...]
