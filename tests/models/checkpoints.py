"""How tests spoil a checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Json = dict[str, Any]
Tensors = dict[str, torch.Tensor]

INDEX = "model.safetensors.index.json"


def edit_json(path: Path, change: Callable[[Json], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_vision_config(folder: Path, **values: Any) -> None:
    edit_json(folder / "config.json", lambda config: config["vision_config"].update(values))


def edit_preprocessor(folder: Path, **values: Any) -> None:
    edit_json(folder / "preprocessor_config.json", lambda config: config.update(values))


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
