"""Temporary folders that go also where a signal ends the process in the very moment in which they are made."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import ExitStack


def make_folder(temporary: ExitStack, prefix: str) -> Path:
    """Makes a folder for this user alone, which goes with ``temporary``.

    Raises:
        OSError: it cannot be made.
    """
    # By a name of our own, since tempfile makes the folder first: a handler that closes ``temporary`` between that and
    # the callback would leave it behind.
    folder = Path(tempfile.gettempdir()) / f"{prefix}{secrets.token_hex(8)}"
    temporary.callback(shutil.rmtree, folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder
