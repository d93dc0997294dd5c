"""Temporary folders that go also where a signal ends the process in the very moment in which they are made, and, when
the next one is made, those of processes that could not take theirs along."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from contextlib import ExitStack

_NUM_RANDOM_BYTES: Final = 8
# Between being made and being locked.
_YOUNG_S: Final = 60.0


def make_folder(temporary: ExitStack, prefix: str) -> Path:
    """Makes a folder for this user alone, which goes with ``temporary``. Folders of the same prefix whose processes
    ended without that go now.

    Raises:
        OSError: it cannot be made.
    """
    for other in Path(tempfile.gettempdir()).glob(prefix + "[0-9a-f]" * 2 * _NUM_RANDOM_BYTES):
        if _is_left_behind(other):
            shutil.rmtree(other, ignore_errors=True)
    # By a name of our own, since tempfile makes the folder first: a handler that closes ``temporary`` between that and
    # the callback would leave it behind.
    folder = Path(tempfile.gettempdir()) / f"{prefix}{secrets.token_hex(_NUM_RANDOM_BYTES)}"
    temporary.callback(shutil.rmtree, folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    lock = _locked(folder)
    if lock is not None:
        temporary.callback(os.close, lock)
    return folder


def _is_left_behind(folder: Path) -> bool:
    """Whether it is this user's, and no process holds it any more."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    if status.st_uid != os.geteuid() or time.time() - status.st_mtime < _YOUNG_S:
        return False
    lock = _locked(folder)
    if lock is not None:
        os.close(lock)
    return lock is not None


def _locked(folder: Path) -> int | None:
    """The descriptor of a folder that no other process holds, which holds it until it is closed; None if one does, or
    where folders cannot be held."""
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file
