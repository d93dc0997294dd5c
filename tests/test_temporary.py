"""Temporary folders are private, and none is left behind."""

from __future__ import annotations

import tempfile
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
