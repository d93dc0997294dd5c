"""Tests that measure time or memory, or take a port by its number, are alone: none runs beside them in another worker
of pytest-xdist."""

from __future__ import annotations

import fcntl
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """Waits until this test may run beside those that do.

    Args:
        folder: that all workers share.
    """
    with (folder / "gate").open("w") as gate, (folder / "running").open("w") as running:
        # Who waits to be alone holds the gate, so that nobody begins before it has been.
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
        yield
