"""Third parties bring a family by an entry point, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from encoder_svc.client import EncoderClient
from encoder_svc.errors import CheckpointError
from encoder_svc.models.registry import family_names, find_workflow
from encoder_svc.models.workflow import Workflow
from tests.serving import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ROWS_DOUBLED = 2.0
MODULE = """
from encoder_svc.engine.builder import build_batch
from encoder_svc.engine.outputs import split_by_image
from encoder_svc.images.processor import ImageProcessor
from encoder_svc.images.types import RawRgb
from encoder_svc.models.qwen2_vl import Qwen2VLEncoder
from encoder_svc.models.workflow import Workflow

class Encoder(Qwen2VLEncoder):
    pass

class Processor(ImageProcessor):
    "Takes images upside down."
    def plan(self, source):
        if isinstance(source, RawRgb):
            row = source.width * 3
            rows = [source.data[at : at + row] for at in range(0, len(source.data), row)]
            source = RawRgb(source.height, source.width, b"".join(reversed(rows)))
        return super().plan(source)

def build(images, encoder):
    assert isinstance(encoder, Encoder)
    return build_batch(images, encoder)

def split(rows, grids, merge_size):
    return split_by_image(rows * 2, grids, merge_size)

WORKFLOW = Workflow(
    model_type="theirs_vl",
    encoder="theirs_vl:Encoder",
    input_processor="theirs_vl:Processor",
    input_builder="theirs_vl:build",
    output_processor="theirs_vl:split",
)
NONE = object()
"""


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution with the module above, as pip lays one out."""
    (tmp_path / "theirs_vl.py").write_text(MODULE)
    info = tmp_path / "theirs_vl-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs_vl\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[encoder_svc.workflows]\ntheirs_vl = theirs_vl:WORKFLOW\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("theirs_vl", None)


def test_a_server_serves_it(
    distribution: Path, tiny_checkpoint: Callable[[str], Path], server: Callable[..., ServerProcess]
) -> None:
    checkpoint = distribution / "checkpoint"
    shutil.copytree(tiny_checkpoint("qwen2_vl"), checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "theirs_vl"}))
    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    with EncoderClient(server("qwen2_vl").target) as client:
        (ours,) = client.encode([np.ascontiguousarray(image[::-1])])
    path = os.pathsep.join([str(distribution), *filter(None, sys.path)])
    environment = {"PYTHONPATH": path}
    with (
        ServerProcess("--model", checkpoint, "--device", "cpu", environment=environment) as process,
        EncoderClient(process.target) as client,
    ):
        assert client.info().family == "theirs_vl"
        (theirs,) = client.encode([image])
    np.testing.assert_array_equal(theirs.embeddings, ours.embeddings * ROWS_DOUBLED)


def test_it_is_imported_only_for_its_own_checkpoints(distribution: Path) -> None:
    assert "theirs_vl" in family_names()
    find_workflow("qwen2_vl", "here")
    assert "theirs_vl" not in sys.modules
    assert find_workflow("theirs_vl", "here").encoder == "theirs_vl:Encoder"
    assert "theirs_vl" in sys.modules


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("theirs_vl = theirs_vl:NONE", "is not a Workflow whose model_type is 'theirs_vl'"),
        ("others_vl = theirs_vl:WORKFLOW", "is not a Workflow whose model_type is 'others_vl'"),
        ("theirs_vl = theirs_vl:MISSING", "cannot be loaded"),
        ("theirs_vl = missing_module:WORKFLOW", "cannot be loaded"),
    ],
)
def test_what_is_no_workflow_is_refused(distribution: Path, line: str, said: str) -> None:
    (distribution / "theirs_vl-1.0.dist-info" / "entry_points.txt").write_text(f"[encoder_svc.workflows]\n{line}\n")
    with pytest.raises(CheckpointError, match=said) as caught:
        find_workflow(line.split(maxsplit=1)[0], "here")
    assert "group encoder_svc.workflows" in str(caught.value)


def test_ours_cannot_be_replaced(distribution: Path) -> None:
    (distribution / "theirs_vl-1.0.dist-info" / "entry_points.txt").write_text(
        "[encoder_svc.workflows]\nqwen2_vl = theirs_vl:WORKFLOW\n"
    )
    assert find_workflow("qwen2_vl", "here").encoder == "encoder_svc.models.qwen2_vl:Qwen2VLEncoder"


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointError, match="The workflow of gone_vl names gone:Encoder, which cannot be loaded"):
        Workflow(model_type="gone_vl", encoder="gone:Encoder").load_encoder()


def test_an_architecture_that_nobody_serves_is_refused(distribution: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'llama' is not .* served. Served: .*qwen3_vl, theirs_vl"):
        find_workflow("llama", "here/config.json")
