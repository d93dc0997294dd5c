from __future__ import annotations

import json
import os
import re
import resource
import subprocess
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from encoder_svc.errors import ConfigError
from encoder_svc.models.base import ConfigReader
from encoder_svc.models.registry import find_workflow
from encoder_svc.models.synthetic import SPECIAL_TOKENS, _model_config, make_checkpoint
from tests.models.towers import FAMILIES
from tests.serving import ENVIRONMENT, command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensor_names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as weights:
        return list(weights.keys())


@EVERY_FAMILY
def test_the_same_seed_gives_the_same_bytes(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    make_checkpoint(tmp_path / "again", family=family)
    assert contents(tmp_path / "again") == contents(tiny_checkpoint(family))


@EVERY_FAMILY
def test_another_seed_gives_other_weights(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    make_checkpoint(tmp_path / "other", family=family, seed=1)
    other, first = contents(tmp_path / "other"), contents(tiny_checkpoint(family))
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


@EVERY_FAMILY
def test_no_two_tensors_are_alike_and_none_is_neutral(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    tensors = load_file(tiny_checkpoint(family) / "model.safetensors")
    assert len({value.numpy().tobytes() for value in tensors.values()}) == len(tensors)
    assert all(value.unique().numel() > 1 for value in tensors.values())


@EVERY_FAMILY
def test_transformers_loads_every_tensor_of_a_complete_checkpoint(
    tiny_checkpoint: Callable[[str], Path], family: str
) -> None:
    _, loading = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(family), output_loading_info=True)
    assert not any(loading.values()), loading


@EVERY_FAMILY
def test_vision_only_holds_the_same_tower_and_nothing_of_the_lm(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    make_checkpoint(tmp_path / "vision", family=family, vision_only=True)
    vision = load_file(tmp_path / "vision" / "model.safetensors")
    complete = load_file(tiny_checkpoint(family) / "model.safetensors")
    assert vision.keys() == {name for name in complete if "visual." in name}
    assert all(torch.equal(value, complete[name]) for name, value in vision.items())
    assert not (tmp_path / "vision" / "tokenizer.json").exists()


@EVERY_FAMILY
def test_shards_hold_what_the_index_says_and_keep_to_their_size(tmp_path: Path, family: str) -> None:
    make_checkpoint(tmp_path / "model", family=family, shard_bytes=300_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert {name: path.name for path in shards for name in tensor_names(path)} == index["weight_map"]
    tensors = [load_file(path) for path in shards]
    sizes = [sum(value.nbytes for value in shard.values()) for shard in tensors]
    assert len(shards) > 2
    assert sum(sizes) == index["metadata"]["total_size"]
    assert all(size <= 300_000 or len(shard) == 1 for size, shard in zip(sizes, tensors, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_written_in_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    make_checkpoint(tmp_path / "model", family="qwen2_vl", vision_only=True, dtype=dtype)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {getattr(torch, dtype)}


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        make_checkpoint(tmp_path, family="qwen2_vl")
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        make_checkpoint(tmp_path / "model", family="qwen2_vl")


@pytest.mark.parametrize("wrong", [{"family": "llava"}, {"size": "huge"}, {"dtype": "int8"}], ids=str)
def test_an_unknown_choice_is_named(tmp_path: Path, wrong: dict[str, str]) -> None:
    arguments = {"family": "qwen2_vl"} | wrong
    with pytest.raises(ConfigError, match=next(iter(wrong.values()))):
        make_checkpoint(tmp_path / "model", **arguments)
    assert not (tmp_path / "model").exists()


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_checkpoint("qwen3_vl"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_special_token_is_one_token(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    ids = tokenizer(f"a{token}b").input_ids
    assert ids[1:2] == tokenizer.convert_tokens_to_ids([token])
    assert len(ids) == 3


@EVERY_FAMILY
def test_the_configs_image_token_is_the_tokenizers(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    folder = tiny_checkpoint(family)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(config["image_token_id"]) == "<|image_pad|>"


REAL = {
    "qwen2_vl": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "out_hidden_size": 3584}
    | {"intermediate_size": 5120, "patch_size": 14, "width": 3584},
    "qwen2_5_vl": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "out_hidden_size": 3584}
    | {"intermediate_size": 3420, "patch_size": 14, "window_size": 112, "full_attention_blocks": (7, 15, 23, 31)},
    "qwen3_vl": {"depth": 27, "hidden_size": 1152, "num_heads": 16, "out_hidden_size": 4096}
    | {"intermediate_size": 4304, "patch_size": 16, "position_grid_side": 48, "deepstack_blocks": (8, 16, 24)}
    | {"head_size": 72, "width": 4 * 4096},
}


@EVERY_FAMILY
def test_real_has_the_released_dimensions(family: str) -> None:
    written = _model_config(family, "real", "bfloat16").to_dict()["vision_config"]
    config = find_workflow(family, "here").load_encoder().read_config(ConfigReader(written, "here"))
    assert {name: getattr(config, name) for name in REAL[family]} == REAL[family]


def test_every_file_has_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make_checkpoint(tmp_path / "made", family="qwen2_vl", shard_bytes=200_000)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "made").iterdir()} == {0o640}


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_that_torch_does_not_take_is_refused(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ConfigError, match=rf"from 0 to 2\^63 - 1, not {seed}"):
        make_checkpoint(tmp_path / "made", family="qwen2_vl", seed=seed)
    assert not (tmp_path / "made").exists()


def test_the_largest_seed_is_taken(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "made", family="qwen2_vl", vision_only=True, seed=2**63 - 1)


def test_a_folder_that_cannot_be_made_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/made: cannot be written \(Not a directory\)\.$"):
        make_checkpoint(tmp_path / "file" / "made", family="qwen2_vl")


def test_a_disk_that_is_full_is_said_in_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        command("make-checkpoint", "--family", "qwen2_vl", tmp_path / "made"),
        check=False,
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert done.returncode == 2
    assert re.fullmatch(rf"encoder-svc make-checkpoint: {tmp_path}/made\S*: cannot be written \(.*\)\.\n", done.stderr)
    assert "File too large" in done.stderr
