"""What tells one tower from another: the revision of its weights, and the config hash."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.models.checkpoints import edit_tensors, edit_vision_config
from tests.models.towers import load

if TYPE_CHECKING:
    from collections.abc import Callable


def test_the_same_weights_have_the_same_revision_in_any_layout(
    sharded: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path], vision_only: dict[str, Path]
) -> None:
    folders = (sharded("qwen2_vl"), tiny_checkpoint("qwen2_vl"), vision_only["qwen2_vl"])
    revisions = {load(folder).revision for folder in folders}
    assert len(revisions) == 1
    assert revisions.pop().startswith("sha256:")


def test_one_changed_value_changes_the_revision(copy: Callable[..., Path]) -> None:
    folder = copy()
    before = load(folder)
    edit_tensors(folder, lambda tensors: tensors["visual.blocks.3.mlp.down_proj.weight"][5, 7].add_(1e-3))
    after = load(folder)
    assert before.revision != after.revision
    assert before.config_hash != after.config_hash


def test_a_changed_lm_does_not_change_the_revision(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint("qwen2_5_vl"), tmp_path / "qwen2_5_vl"))
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert load(folder).revision == load(tiny_checkpoint("qwen2_5_vl")).revision


def test_loading_twice_gives_the_same_config_hash(vision_only: dict[str, Path]) -> None:
    assert load(vision_only["qwen3_vl"]).config_hash == load(vision_only["qwen3_vl"]).config_hash


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"backend": "torch_naive"}], ids=str)
def test_the_config_hash_changes_with(vision_only: dict[str, Path], options: dict[str, str]) -> None:
    folder = vision_only["qwen2_vl"]
    assert load(folder, **options).config_hash != load(folder).config_hash


def test_the_config_hash_changes_with_what_pixels_are_normalised_by(copy: Callable[..., Path]) -> None:
    folder = copy()
    before = load(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_std": [0.25, 0.25, 0.25]}))
    assert load(folder).config_hash != before.config_hash


def test_the_config_hash_changes_with_the_causal_switch(copy: Callable[..., Path]) -> None:
    folder = copy()
    before = load(folder)
    edit_vision_config(folder, is_causal=True)
    assert load(folder).config_hash != before.config_hash
