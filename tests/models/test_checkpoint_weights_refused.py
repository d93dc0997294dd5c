"""Tensors that are not as the config says, and weight files that cannot be read."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from encoder_svc.errors import CheckpointError
from tests.models.checkpoints import INDEX, Json, Tensors, edit_json, edit_tensors
from tests.models.towers import load

if TYPE_CHECKING:
    from collections.abc import Callable


SPOILT_TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop("visual.blocks.2.norm1.weight"), "lacks vision tensors: blocks.2.norm1.weight"),
    "surplus": (lambda t: t.update({"visual.extra.weight": torch.ones(2)}), "does not account for: extra.weight"),
    "wrong shape": (
        lambda t: t.update({"visual.merger.ln_q.weight": torch.ones(65)}),
        r"visual.merger.ln_q.weight has shape \[65\]; its config makes it \[64\]",
    ),
    "right size, wrong shape": (
        lambda t: t.update({"visual.patch_embed.proj.weight": torch.ones(64, 2, 3, 14, 14)}),
        r"visual.patch_embed.proj.weight has shape \[64, 2, 3, 14, 14\]",
    ),
    "integers": (
        lambda t: t.update({"visual.merger.ln_q.weight": torch.ones(64, dtype=torch.int8)}),
        "visual.merger.ln_q.weight is I8",
    ),
    "fp8": (
        lambda t: t.update({"visual.merger.ln_q.weight": torch.ones(64).to(torch.float8_e4m3fn)}),
        "visual.merger.ln_q.weight is F8_E4M3",
    ),
    "no tower": (
        lambda t: [t.pop(name) for name in list(t)] and t.update({"model.norm.weight": torch.ones(2)}),
        r"holds no vision tower \(no tensor named visual\.\* or model\.visual\.\*\)",
    ),
    "nothing": (lambda t: t.clear(), "holds no vision tower"),
}


@pytest.mark.parametrize(("spoil", "text"), SPOILT_TENSORS.values(), ids=SPOILT_TENSORS)
def test_a_tensor_that_does_not_fit_is_named(
    copy: Callable[..., Path], spoil: Callable[[Tensors], object], text: str
) -> None:
    folder = copy()
    edit_tensors(folder, spoil)
    with pytest.raises(CheckpointError, match=f"qwen2_5_vl: .*{text}"):
        load(folder)


def test_many_missing_tensors_are_counted(copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_tensors(folder, lambda t: [t.pop(name) for name in list(t) if ".blocks.3." in f".{name}"])
    with pytest.raises(CheckpointError, match=r"blocks.3.attn.proj.bias, .* and \d+ more"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, 100_000])
def test_a_truncated_weight_file_is_named(copy: Callable[..., Path], keep: int) -> None:
    folder = copy()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        load(folder)


def test_a_missing_shard_is_named(sharded: Callable[[str], Path]) -> None:
    folder = sharded("qwen2_vl")
    shard = json.loads((folder / INDEX).read_text())["weight_map"]["visual.blocks.0.norm1.weight"]
    (folder / shard).unlink()
    with pytest.raises(CheckpointError, match=f"qwen2_vl: lacks {shard}"):
        load(folder)


def test_an_index_that_names_the_wrong_shard_is_found_out(sharded: Callable[[str], Path]) -> None:
    folder = sharded("qwen2_vl")
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    name = "visual.blocks.0.norm1.weight"
    other = next(shard for shard in weight_map.values() if shard != weight_map[name])
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: other}))
    with pytest.raises(CheckpointError, match=f"{other}: lacks {name}, which the index says it holds"):
        load(folder)


@pytest.mark.parametrize("outside", ["../model.safetensors", "sub/model.safetensors", "{absolute}", "..", ""])
def test_an_index_reads_no_file_outside_the_folder(copy: Callable[..., Path], outside: str) -> None:
    folder = copy()
    for elsewhere in (folder.parent, folder / "sub"):
        elsewhere.mkdir(exist_ok=True)
        shutil.copy(folder / "model.safetensors", elsewhere)
    shard = outside.format(absolute=folder.parent / "model.safetensors")
    names = load_file(folder / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(CheckpointError, match=f"qwen2_5_vl: lacks {shard}"):
        load(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, {"weight_map": {"visual.x": 3}}], ids=str)
def test_an_index_without_a_map_of_names_is_refused(copy: Callable[..., Path], index: Json) -> None:
    folder = copy()
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{INDEX} has no weight_map"):
        load(folder)


class _LeavesATrace:
    """Unpickling this makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_pickled_weights_are_refused_and_never_unpickled(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder, trace = copy(), tmp_path / "trace"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_LeavesATrace(trace)))
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors\. Only safetensors is read, never pickled"):
        load(folder)
    assert not trace.exists()


def test_pickled_weights_named_by_an_index_are_never_unpickled(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder, trace = copy(), tmp_path / "trace"
    names = load_file(folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_LeavesATrace(trace)))
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "pytorch_model.bin")}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load(folder)
    assert not trace.exists()
