"""config.json: what is served, and what is wrong with one that is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from encoder_svc.errors import CheckpointError
from encoder_svc.models.checkpoint import Checkpoint
from tests.models.checkpoints import edit_json, edit_vision_config
from tests.models.towers import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_an_unknown_architecture_is_named_beside_those_served(copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_json(folder / "config.json", lambda config: config.update(model_type="llava"))
    with pytest.raises(CheckpointError, match=r"model_type 'llava' is not .* Served: qwen2_vl, qwen2_5_vl, qwen3_vl"):
        Checkpoint(str(folder))


def test_a_revision_of_a_folder_is_refused(copy: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"^--revision main: is for hub ids; --model \S+ is a folder"):
        Checkpoint(str(copy()), revision="main")


@pytest.mark.parametrize("model_type", [None, 7, ["qwen2_vl"]])
def test_a_model_type_that_is_no_name_is_refused(copy: Callable[..., Path], model_type: object) -> None:
    folder = copy()
    edit_json(folder / "config.json", lambda config: config.update(model_type=model_type))
    with pytest.raises(CheckpointError, match="model_type"):
        Checkpoint(str(folder))


@pytest.mark.parametrize("vision_config", [None, [], "x"])
def test_a_config_without_vision_config_is_refused(copy: Callable[..., Path], vision_config: object) -> None:
    folder = copy()
    edit_json(folder / "config.json", lambda config: config.update(vision_config=vision_config))
    with pytest.raises(CheckpointError, match=r"config\.json has no vision_config"):
        Checkpoint(str(folder))


REQUIRED = {
    "qwen2_vl": ["depth", "embed_dim", "num_heads", "hidden_size", "patch_size"],
    "qwen2_5_vl": ["hidden_size", "intermediate_size", "out_hidden_size", "window_size", "fullatt_block_indexes"],
    "qwen3_vl": ["depth", "intermediate_size", "num_position_embeddings", "deepstack_visual_indexes"],
}


@pytest.mark.parametrize(("family", "key"), [(family, key) for family, keys in REQUIRED.items() for key in keys])
def test_a_missing_dimension_is_named(copy: Callable[[str], Path], family: str, key: str) -> None:
    folder = copy(family)
    edit_json(folder / "config.json", lambda config: config["vision_config"].pop(key))
    with pytest.raises(CheckpointError, match=rf"config\.json: vision_config lacks '{key}'"):
        Checkpoint(str(folder))


WRONG_VALUES: list[tuple[str, str, Any]] = [
    ("qwen2_vl", "depth", "four"),
    ("qwen2_vl", "depth", 4.0),
    ("qwen2_vl", "depth", True),
    ("qwen2_vl", "depth", 0),
    ("qwen2_vl", "patch_size", -14),
    ("qwen2_vl", "mlp_ratio", "4"),
    ("qwen2_vl", "mlp_ratio", True),
    ("qwen2_vl", "mlp_ratio", -4),
    ("qwen2_vl", "mlp_ratio", 0),
    ("qwen2_vl", "mlp_ratio", 1e30),
    ("qwen2_vl", "mlp_ratio", float("nan")),
    ("qwen2_vl", "mlp_ratio", 10**400),
    ("qwen2_vl", "embed_dim", 10**12),
    ("qwen2_vl", "depth", 2**20),
    ("qwen2_5_vl", "hidden_size", 10**12),
    ("qwen2_5_vl", "patch_size", 2**20),
    ("qwen2_5_vl", "in_channels", 2**20),
    ("qwen2_vl", "hidden_act", 3),
    ("qwen2_vl", "is_causal", "yes"),
    ("qwen2_vl", "rope_parameters", 10_000),
    ("qwen2_5_vl", "window_size", 0),
    ("qwen2_5_vl", "window_size", 27),
    ("qwen2_5_vl", "fullatt_block_indexes", 3),
    ("qwen2_5_vl", "fullatt_block_indexes", [1, 4]),
    ("qwen2_5_vl", "fullatt_block_indexes", [-1]),
    ("qwen2_5_vl", "fullatt_block_indexes", [1, 1]),
    ("qwen2_5_vl", "fullatt_block_indexes", ["1"]),
    ("qwen2_5_vl", "fullatt_block_indexes", [[1]]),
    ("qwen2_5_vl", "fullatt_block_indexes", [True]),
    ("qwen3_vl", "deepstack_visual_indexes", [0, 9]),
    ("qwen3_vl", "num_position_embeddings", 63),
]


@pytest.mark.parametrize(("family", "key", "value"), WRONG_VALUES)
def test_a_dimension_of_the_wrong_kind_is_named(copy: Callable[[str], Path], family: str, key: str, value: Any) -> None:
    folder = copy(family)
    edit_vision_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: vision_config.*'?{key}"):
        Checkpoint(str(folder))


@pytest.mark.parametrize("theta", ["10000", [1], True, 0, -1, float("nan"), float("inf")])
def test_a_rope_theta_that_is_no_positive_number_is_named(copy: Callable[..., Path], theta: object) -> None:
    folder = copy()
    edit_vision_config(folder, rope_parameters={"rope_theta": theta})
    with pytest.raises(CheckpointError, match="'rope_theta'"):
        Checkpoint(str(folder))


def test_heads_that_leave_no_rotary_halves_are_refused(copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_vision_config(folder, num_heads=32)
    with pytest.raises(CheckpointError, match=r"config\.json: vision_config: hidden size 64 over 32 heads"):
        Checkpoint(str(folder))


def test_an_unknown_activation_is_refused(copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_vision_config(folder, hidden_act="relu7")
    with pytest.raises(CheckpointError, match="'relu7'"):
        load(folder)


def test_the_older_spelling_of_channels_is_read(copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_json(folder / "config.json", lambda config: config["vision_config"].pop("in_channels"))
    edit_vision_config(folder, in_chans=5)
    assert Checkpoint(str(folder)).config.in_channels == 5
