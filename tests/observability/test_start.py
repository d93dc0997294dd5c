"""The phases of a start: that they are the whole of it, in the log and in the metrics."""

from __future__ import annotations

import re
import time
from datetime import datetime
from typing import TYPE_CHECKING

import psutil
import pytest

from encoder_svc.observability.start import PHASES, StartPhases, process_age_s
from tests.observability.scraping import Scrape
from tests.serving import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# What a CPU has nothing to do for.
_GPU_ALONE = {"graphs", "memory"}


def test_each_phase_begins_where_the_one_before_it_ended() -> None:
    now_s = 100.0
    phases = StartPhases(4.0, clock=lambda: now_s)
    phases.end("imports")
    now_s += 2.5
    phases.end("attention")
    now_s += 0.5
    phases.end("attention")
    assert phases.seconds() == {**dict.fromkeys(PHASES, 0.0), "imports": 4.0, "attention": 3.0}
    assert phases.describe() == "7.0 s: imports 4.0, attention 3.0"


@pytest.mark.alone
def test_the_age_of_a_process_counts_from_its_start() -> None:
    assert process_age_s() == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.5)
    before_s = process_age_s()
    time.sleep(0.05)
    assert process_age_s() == pytest.approx(before_s + 0.05, abs=0.04)


def test_a_name_with_spaces_and_brackets_hides_nothing(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    started = round((time.clock_gettime(time.CLOCK_BOOTTIME) - 3) * 100)
    stat.write_text(f"17 (a) S b) S {' '.join('0' for _ in range(18))} {started} 0 0")
    assert process_age_s(stat) == pytest.approx(3, abs=0.5)


def test_without_proc_a_process_has_no_age(tmp_path: Path) -> None:
    assert process_age_s(tmp_path / "none") == 0


@pytest.mark.alone
def test_the_phases_add_up_to_the_time_from_the_process_to_serving(
    tiny_checkpoint: Callable[[str], Path], port: int
) -> None:
    """Within 5 %, seen from outside: from before the fork until the log says so."""
    options = ("--model", tiny_checkpoint("qwen2_vl"), "--device", "cpu", "--metrics-port", str(port))
    began_s = time.time()
    with ServerProcess(*options) as serving:
        said = serving.wait_for_log(r"(\S+ \S+) INFO \S+: started in ([\d.]+) s: (.+)")
        scrape = Scrape.of(port)
    by_phase = {s.labels["phase"]: s.value for s in scrape.samples if s.name == "encoder_start_seconds"}
    whole_s = datetime.strptime(said[1], "%Y-%m-%d %H:%M:%S,%f").timestamp() - began_s
    assert sum(by_phase.values()) == pytest.approx(whole_s, rel=0.05)
    assert float(said[2]) == pytest.approx(sum(by_phase.values()), abs=0.06)
    assert tuple(by_phase) == PHASES
    assert {phase for phase, seconds in by_phase.items() if seconds == 0} == _GPU_ALONE
    logged = dict(re.findall(r"([a-z ]+) ([\d.]+)(?:, |$)", said[3]))
    assert list(logged) == [phase.replace("_", " ") for phase in PHASES if phase not in _GPU_ALONE]
