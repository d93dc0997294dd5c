"""The tower's tensors are found, read and converted, and nothing else is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from encoder_svc.attention import MMEncoderAttention
from encoder_svc.models.checkpoint import Checkpoint
from encoder_svc.models.synthetic import make_checkpoint
from encoder_svc.models.tower import TORCH_DTYPES
from encoder_svc.platforms import platform_for_device
from tests.models.checkpoints import INDEX, Tensors, edit_tensors
from tests.models.towers import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from encoder_svc.models.base import VisionEncoder


def read(folder: Path, dtype: str = "float32", progress: Any = None) -> VisionEncoder:
    """An encoder as it was read, before its weights are laid out for a device."""
    checkpoint = Checkpoint(str(folder))
    config = checkpoint.config
    attention = MMEncoderAttention(
        config.num_heads, config.head_size, platform=platform_for_device("cpu"), dtype="float32"
    )
    with torch.device("meta"):
        encoder = checkpoint.workflow.load_encoder()(config, attention)
    cpu, shapes = torch.device("cpu"), encoder.checkpoint_shapes()
    checkpoint.read_weights(shapes, device=cpu, dtype=TORCH_DTYPES[dtype], progress=progress).give_to(encoder)
    return encoder


def weights(encoder: VisionEncoder) -> Tensors:
    return dict(encoder.named_parameters())


def same_weights(one: VisionEncoder, other: VisionEncoder) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_and_one_file_give_the_same_tower(
    tiny_checkpoint: Callable[[str], Path], sharded: Callable[[str], Path], family: str
) -> None:
    folder = sharded(family)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert same_weights(read(folder), read(tiny_checkpoint(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_without_vision_tensors_are_not_opened(sharded: Callable[[str], Path], family: str) -> None:
    folder = sharded(family)
    before = read(folder)
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    with_vision = {shard for name, shard in weight_map.items() if "visual." in name}
    lm_only = sorted(set(weight_map.values()) - with_vision)
    assert len(lm_only) > 1
    (folder / lm_only[0]).unlink()
    (folder / lm_only[1]).write_bytes(b"no safetensors at all")
    assert same_weights(read(folder), before)


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_is_found_under_either_prefix(copy: Callable[[str], Path], family: str, prefix: str) -> None:
    folder = copy(family)
    before = read(folder)

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name.partition("visual.")[2]] = tensors.pop(name)

    edit_tensors(folder, rename)
    assert same_weights(read(folder), before)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_tensors_are_converted_to_the_dtype_asked_for(tmp_path: Path, stored: str, wanted: str) -> None:
    make_checkpoint(tmp_path / "model", family="qwen3_vl", vision_only=True, dtype=stored)
    encoder = read(tmp_path / "model", dtype=wanted)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name, parameter in weights(encoder).items():
        expected = tensors[f"model.visual.{name}"].to(getattr(torch, wanted)).reshape(parameter.shape)
        assert torch.equal(parameter, expected), name


def test_a_float64_checkpoint_is_served(copy: Callable[..., Path]) -> None:
    folder = copy()
    before = read(folder)
    edit_tensors(folder, lambda tensors: tensors.update({name: value.double() for name, value in tensors.items()}))
    assert same_weights(read(folder), before)


def test_the_progress_callback_wraps_every_tensor(vision_only: dict[str, Path]) -> None:
    seen: list[str] = []

    def progress(names: Any, total: int) -> Any:
        for name in names:
            seen.append(name)
            yield name
        assert total == len(seen)

    encoder = read(vision_only["qwen2_vl"], progress=progress)
    assert sorted(seen) == sorted(weights(encoder))
