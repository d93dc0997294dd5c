"""Where the time of a start goes: phases that follow each other, from the start of the process until it serves."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PHASES: Final = (
    *("imports", "device", "checkpoint", "attention", "operations", "weights", "graphs", "memory", "first_image"),
)
"""In the order in which a start meets them: the values of the label ``phase``. Weights are read from the beginning of
attention on: theirs is what is left to do when the kernels are ready."""

_STAT: Final = Path("/proc/self/stat")


class StartPhases:
    """Seconds in each phase. Each begins where the one before it ended, so that together they are the whole.

    Args:
        age_s: how long the process had run when this was made: the first phase has it.
    """

    def __init__(self, age_s: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._ended_s = clock() - age_s
        self._seconds: dict[str, float] = {}

    def end(self, phase: str) -> None:
        """All time since the last phase ended was this one's."""
        assert phase in PHASES
        now_s = self._clock()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now_s - self._ended_s
        self._ended_s = now_s

    def seconds(self) -> Mapping[str, float]:
        """Every phase's; 0 where there was nothing to do."""
        return {phase: self._seconds.get(phase, 0.0) for phase in PHASES}

    def describe(self) -> str:
        """Such as ``17.1 s: imports 4.0, attention 6.1, …``, of the phases that there were."""
        parts = (f"{phase.replace('_', ' ')} {seconds:.1f}" for phase, seconds in self._seconds.items())
        return f"{sum(self._seconds.values()):.1f} s: {', '.join(parts)}"


def process_age_s(stat: Path = _STAT) -> float:
    """How long this process has run, to a hundredth of a second; 0 where there is no /proc to say so.

    Source: proc_pid_stat(5), field 22, in ticks since the machine started. What libraries offer adds the time of that
    start, in whole seconds.
    """
    if not stat.exists():
        return 0.0
    fields_from_the_third = stat.read_text().rpartition(")")[2].split()
    started_s = int(fields_from_the_third[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
