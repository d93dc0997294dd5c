"""Fixtures that many tests share: photographs, tiny checkpoints, servers."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from encoder_svc.models.synthetic import make_checkpoint
from tests.serving import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """Real photographs; tests/photos/README.md says whose."""
    return sorted((Path(__file__).parent / "photos").glob("*.jpg"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a family's tiny checkpoint (seed 0), once a session."""

    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp("checkpoints") / family
        make_checkpoint(folder, family=family)
        return folder

    return make


@pytest.fixture(scope="session")
def server(tiny_checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., ServerProcess]]:
    """Starts a server for a family's tiny checkpoint with the given options, or gives the one that runs already.

    On the CPU unless an option says otherwise, so that results do not depend on the machine.
    """
    with ExitStack() as stack:

        @cache
        def start(family: str, *options: str) -> ServerProcess:
            device = () if "--device" in options else ("--device", "cpu")
            return stack.enter_context(ServerProcess("--model", tiny_checkpoint(family), *device, *options))

        yield start
