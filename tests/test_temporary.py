"""Temporary folders are private, and none is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from encoder_svc.temporary import make_folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_it_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    with ExitStack() as temporary:
        folder = make_folder(temporary, "ours-")
        assert folder.parent == tmp_path
        assert folder.name.startswith("ours-")
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "inside").mkdir()
    assert list(tmp_path.iterdir()) == []


def test_it_goes_also_where_the_end_comes_just_when_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, temporary = Path.mkdir, ExitStack()

    def make_and_end(folder: Path, mode: int) -> None:
        mkdir(folder, mode)
        assert folder.exists()
        temporary.close()

    monkeypatch.setattr(Path, "mkdir", make_and_end)
    assert not make_folder(temporary, "ours-").exists()
    assert list(tmp_path.iterdir()) == []


def test_where_none_can_be_made_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with ExitStack() as temporary, pytest.raises(FileNotFoundError):
        make_folder(temporary, "ours-")


MAKE_ONE_AND_WAIT = """
import sys, tempfile
from contextlib import ExitStack
from encoder_svc.temporary import make_folder

tempfile.tempdir = sys.argv[1]
with ExitStack() as temporary:
    (make_folder(temporary, "ours-") / "inside").mkdir()
    print(flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_with_the_next_and_what_one_holds_stays(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MAKE_ONE_AND_WAIT, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline()
        [theirs] = tmp_path.iterdir()
        long_ago_s = time.time() - 3600
        os.utime(theirs, (long_ago_s, long_ago_s))
        with ExitStack() as temporary:
            make_folder(temporary, "ours-")
            assert theirs.exists()
        other.kill()
    assert theirs.exists()
    with ExitStack() as temporary:
        make_folder(temporary, "ours-")
        assert not theirs.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "age_s"), [("ours-0123456789abcdef", 0), ("ours-else", 3600), ("theirs-0123456789abcdef", 3600)]
)
def test_what_is_young_or_has_another_name_stays(tmp_path: Path, name: str, age_s: float) -> None:
    (tmp_path / name).mkdir()
    os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    with ExitStack() as temporary:
        make_folder(temporary, "ours-")
        assert (tmp_path / name).exists()
