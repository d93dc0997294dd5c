"""Where a checkpoint's files come from: a local folder here, a hub in checkpoint_hub.py."""

from __future__ import annotations

import abc
import json
from typing import TYPE_CHECKING, Any

from encoder_svc.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


class CheckpointFiles(abc.ABC):
    """A checkpoint's files by their names.

    Attributes:
        name: the hub id, or the folder's name.
        commit: the hub's commit; None for a folder.
    """

    name: str
    commit: str | None = None

    @abc.abstractmethod
    def path(self, filename: str) -> Path | None:
        """The local path of a file; None if the checkpoint has no such file."""

    def read_json(self, filename: str) -> dict[str, Any] | None:
        """A file that is a JSON object; None if the checkpoint has no such file.

        Raises:
            CheckpointError: it cannot be read, or is something else.
        """
        path = self.path(filename)
        if path is None:
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise unreadable(path, error) from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.name}: {filename} is not readable JSON.") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.name}: {filename} is not a JSON object.")
        return values


class Folder(CheckpointFiles):
    """A checkpoint on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = folder.resolve().name

    def path(self, filename: str) -> Path | None:
        path = self._folder / filename
        try:
            return path if path.exists() else None
        except OSError as error:
            raise unreadable(path, error) from error


def is_folder(path: Path) -> bool:
    """Whether it is one.

    Raises:
        CheckpointError: it may not be looked at.
    """
    try:
        return path.is_dir()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """A file or folder that is there and cannot be read, and why."""
    return CheckpointError(f"{path}: cannot be read ({error.strerror}).")
