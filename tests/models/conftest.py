"""Fixtures of the model tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from encoder_svc.models.synthetic import make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Towers this small lose more to waiting for a second thread than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vision_only(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family's tiny vision-only checkpoint (seed 0), to be read."""
    from tests.models.towers import FAMILIES  # imports transformers

    folders = {family: tmp_path_factory.mktemp("vision") / family for family in FAMILIES}
    for family, folder in folders.items():
        make_checkpoint(folder, family=family, vision_only=True)
    return folders


@pytest.fixture
def copy(vision_only: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A family's vision-only checkpoint, to be spoilt."""
    return lambda family="qwen2_5_vl": Path(shutil.copytree(vision_only[family], tmp_path / family))


@pytest.fixture
def sharded(tmp_path: Path) -> Callable[[str], Path]:
    """A complete checkpoint in several files."""

    def make(family: str) -> Path:
        make_checkpoint(tmp_path / family, family=family, shard_bytes=200_000)
        return tmp_path / family

    return make
