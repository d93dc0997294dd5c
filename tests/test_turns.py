"""Who measures is alone, and does not wait for ever."""

from __future__ import annotations

import fcntl
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from tests.turns import turn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE_S = 30


class Worker:
    """Its test begins when it may, and ends when it is told to."""

    def __init__(self, folder: Path, *, alone: bool = False) -> None:
        self.runs, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(folder, alone))
        self._thread.start()

    def _run(self, folder: Path, alone: bool) -> None:
        with turn(folder, alone=alone):
            self.runs.set()
            assert self._end.wait(PATIENCE_S)

    def end(self) -> None:
        self._end.set()
        self._thread.join()


def until_held(lock: Path) -> None:
    with lock.open("w") as file, suppress(BlockingIOError):
        while True:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
            time.sleep(0.001)


@contextmanager
def running(folder: Path) -> Iterator[Worker]:
    worker = Worker(folder)
    assert worker.runs.wait(PATIENCE_S)
    yield worker
    worker.end()


def test_those_that_measure_nothing_run_side_by_side(tmp_path: Path) -> None:
    with running(tmp_path), running(tmp_path):
        pass


def test_one_that_measures_waits_for_those_that_run_and_goes_before_those_to_come(tmp_path: Path) -> None:
    with running(tmp_path):
        measuring = Worker(tmp_path, alone=True)
        until_held(tmp_path / "gate")
        assert not measuring.runs.wait(0.2)
        later = Worker(tmp_path)
        assert not later.runs.wait(0.2)
    assert measuring.runs.wait(PATIENCE_S)
    assert not later.runs.wait(0.2)
    measuring.end()
    assert later.runs.wait(PATIENCE_S)
    later.end()
