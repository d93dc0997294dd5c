"""What happens side by side while a tower is loaded, and in which order the rest."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from encoder_svc.errors import AttentionBackendError, CheckpointError
from encoder_svc.models.checkpoint import Checkpoint
from encoder_svc.models.tower import VisionTower, load_tower, make_attention
from encoder_svc.platforms import platform_for_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from encoder_svc.attention import MMEncoderAttention

CPU = platform_for_device("cpu")
PATIENCE_S = 30
LOAD_AND_SAY_WHETHER_DYNAMO_CAME = """
import sys
from encoder_svc.models.checkpoint import Checkpoint
from encoder_svc.models.tower import load_tower, make_attention
from encoder_svc.platforms import platform_for_device

cpu = platform_for_device("cpu")
for folder in sys.argv[1:]:
    checkpoint = Checkpoint(folder)
    load_tower(
        checkpoint,
        checkpoint.processor_settings(resize="torch"),
        lambda: make_attention(checkpoint, platform=cpu, dtype="float32", override=None, device="cpu"),
        platform=cpu, device="cpu", dtype="float32",
    )
    print(checkpoint.workflow.model_type, "torch._dynamo" in sys.modules)
"""


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint(str(tiny_checkpoint("qwen2_5_vl")))


def reference(checkpoint: Checkpoint) -> MMEncoderAttention:
    return make_attention(checkpoint, platform=CPU, dtype="float32", override="TORCH_NAIVE")


def load(checkpoint: Checkpoint, choose_attention: Callable[[], MMEncoderAttention], **options: object) -> VisionTower:
    settings = checkpoint.processor_settings(resize="torch")
    return load_tower(checkpoint, settings, choose_attention, platform=CPU, device="cpu", dtype="float32", **options)


def test_weights_are_read_while_attention_is_chosen(checkpoint: Checkpoint) -> None:
    """Each waits for the other to have begun: one after the other would never end."""
    reading, choosing = threading.Event(), threading.Event()

    def begin_to_read(names: Iterable[str], total: int) -> Iterable[str]:
        reading.set()
        assert choosing.wait(PATIENCE_S)
        return names

    def choose() -> MMEncoderAttention:
        choosing.set()
        assert reading.wait(PATIENCE_S)
        return reference(checkpoint)

    tower = load(checkpoint, choose, progress=begin_to_read)
    assert tower.selection.backend == "TORCH_NAIVE"
    assert all(not parameter.is_meta for parameter in tower.encoder.parameters())


def test_the_phases_are_told_in_their_order(checkpoint: Checkpoint) -> None:
    ended: list[str] = []
    load(checkpoint, lambda: reference(checkpoint), phase_ended=ended.append)
    assert ended == ["attention", "operations", "weights"]


def test_what_attention_cannot_is_what_the_caller_hears(checkpoint: Checkpoint) -> None:
    def refuse() -> MMEncoderAttention:
        raise AttentionBackendError("nothing runs here")

    with pytest.raises(AttentionBackendError, match=r"^nothing runs here$"):
        load(checkpoint, refuse)


def test_what_is_wrong_with_the_weights_is_what_the_caller_hears(checkpoint: Checkpoint) -> None:
    def fail(names: Iterable[str], total: int) -> Iterable[str]:
        raise CheckpointError("half a file")

    with pytest.raises(CheckpointError, match=r"^half a file$"):
        load(checkpoint, lambda: reference(checkpoint), progress=fail)


def test_no_family_imports_the_compiler_that_it_does_not_use(tiny_checkpoint: Callable[[str], Path]) -> None:
    """torch._dynamo takes 0.8 s to import, as long as the rest of a start on a CPU."""
    families = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    run = [sys.executable, "-c", LOAD_AND_SAY_WHETHER_DYNAMO_CAME, *map(str, map(tiny_checkpoint, families))]
    done = subprocess.run(run, check=True, capture_output=True, text=True, timeout=50)
    assert done.stdout.splitlines() == [f"{family} False" for family in families]
