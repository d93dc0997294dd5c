"""Fixtures that many tests share: photographs, tiny checkpoints, servers. And how tests run side by side."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from encoder_svc.models.synthetic import make_checkpoint
from encoder_svc.platforms.cores import usable_cores
from tests.serving import ServerProcess
from tests.turns import turn

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from xdist.workermanage import WorkerController

MAX_WORKERS = 4
MAX_SERVERS = 4
"""That are kept for tests to come, in each worker: of 300 MB each."""
_TURNS = pytest.StashKey[TemporaryDirectory]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For ``-n auto``: a container's share of time counts, the machine's cores do not."""
    return min(usable_cores(), MAX_WORKERS)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: WorkerController) -> None:
    """In the process that starts the workers."""
    if _TURNS not in node.config.stash:
        node.config.stash[_TURNS] = TemporaryDirectory(prefix="encoder-svc-turns-")
    node.workerinput["turns"] = node.config.stash[_TURNS].name


def pytest_unconfigure(config: pytest.Config) -> None:
    if (turns := config.stash.get(_TURNS, None)) is not None:
        turns.cleanup()


def _turns(config: pytest.Config) -> Path | None:
    """Where workers wait for each other; None where there is but one."""
    workerinput: dict[str, str] | None = getattr(config, "workerinput", None)
    return None if workerinput is None else Path(workerinput["turns"])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _turns(config):  # for which another worker would wait, those last
        items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if (folder := _turns(item.config)) is None:
        return (yield)
    with turn(folder, alone=item.get_closest_marker("alone") is not None):
        return (yield)


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
    running: OrderedDict[tuple[str, ...], ServerProcess] = OrderedDict()

    def start(*key: str) -> ServerProcess:
        if key not in running:
            if len(running) == MAX_SERVERS:
                stop(running.popitem(last=False)[1])
            family, *options = key
            device = () if "--device" in options else ("--device", "cpu")
            running[key] = ServerProcess("--model", tiny_checkpoint(family), *device, *options).__enter__()
        running.move_to_end(key)
        return running[key]

    def stop(serving: ServerProcess) -> None:
        serving.__exit__(None, None, None)

    yield start
    for serving in running.values():  # all at once, and then each is waited for
        serving.process.terminate()
    for serving in running.values():
        stop(serving)
