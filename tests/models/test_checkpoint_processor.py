"""preprocessor_config.json and processor_config.json."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from encoder_svc.errors import CheckpointError
from encoder_svc.models.checkpoint import Checkpoint
from tests.models.checkpoints import Json, edit_preprocessor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from encoder_svc.images.processor import ProcessorSettings


def settings_of(folder: Path, **options: Any) -> ProcessorSettings:
    return Checkpoint(str(folder)).processor_settings(resize="torch", **options)


BOUNDS: dict[str, tuple[Json, tuple[int, int]]] = {
    "flat": ({"min_pixels": 4000, "max_pixels": 90_000}, (4000, 90_000)),
    "edges": ({"size": {"shortest_edge": 4000, "longest_edge": 90_000}}, (4000, 90_000)),
    "in size": ({"size": {"min_pixels": 4000, "max_pixels": 90_000}}, (4000, 90_000)),
    "flat before size": ({"min_pixels": 4000, "size": {"shortest_edge": 1, "longest_edge": 90_000}}, (4000, 90_000)),
    "none": ({}, (56 * 56, 28 * 28 * 1280)),
    "null": ({"min_pixels": None, "max_pixels": None, "size": None}, (56 * 56, 28 * 28 * 1280)),
}


@pytest.mark.parametrize(("values", "bounds"), BOUNDS.values(), ids=BOUNDS)
def test_every_spelling_of_the_pixel_bounds_is_read(
    copy: Callable[..., Path], values: Json, bounds: tuple[int, int]
) -> None:
    folder = copy()
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    settings = settings_of(folder)
    assert (settings.min_pixels, settings.max_pixels) == bounds


def test_an_operators_bounds_stand_before_the_checkpoints(vision_only: dict[str, Path]) -> None:
    settings = settings_of(vision_only["qwen3_vl"], min_pixels=5000, max_pixels=60_000)
    assert (settings.min_pixels, settings.max_pixels) == (5000, 60_000)


def test_processor_config_is_read_where_there_is_no_preprocessor_config(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3_vl")
    before = settings_of(folder)
    values = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert settings_of(folder) == before


@pytest.mark.parametrize("processor_config", [None, {"video_processor": {}}], ids=str)
def test_a_checkpoint_without_processor_settings_is_refused(
    copy: Callable[..., Path], processor_config: Json | None
) -> None:
    folder = copy()
    (folder / "preprocessor_config.json").unlink()
    if processor_config is not None:
        (folder / "processor_config.json").write_text(json.dumps(processor_config))
    with pytest.raises(CheckpointError, match=r"neither preprocessor_config\.json nor processor_config\.json"):
        settings_of(folder)


REFUSED_PROCESSING: list[tuple[str, Any]] = [
    ("do_resize", False),
    ("do_rescale", False),
    ("do_normalize", False),
    ("resample", 2),
    ("rescale_factor", 1 / 127.5),
    ("rescale_factor", "1/255"),
    ("patch_size", 16),
    ("merge_size", 1),
    ("temporal_patch_size", 1),
    ("image_mean", [0.5]),
    ("image_mean", 0.5),
    ("image_mean", ["a", "b", "c"]),
    ("image_std", [0.5, 0.5]),
    ("image_std", [0.5, 0.0, 0.5]),
    ("image_std", [float("inf"), 0.5, 0.5]),
    ("image_mean", [0.5, float("nan"), 0.5]),
    ("rescale_factor", float("nan")),
    ("min_pixels", "many"),
    ("min_pixels", -1),
    ("max_pixels", 2**31),
    ("max_pixels", 100),
    ("size", 224),
    ("size", [224, 224]),
]


@pytest.mark.parametrize(("key", "value"), REFUSED_PROCESSING, ids=str)
def test_processing_that_is_not_done_here_is_named(copy: Callable[..., Path], key: str, value: Any) -> None:
    folder = copy()
    edit_preprocessor(folder, **{key: value})
    with pytest.raises(CheckpointError, match=f"qwen2_5_vl.*{key}"):
        settings_of(folder)
