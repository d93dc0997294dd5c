"""Layouts that must not change what comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from encoder_svc.attention import MMEncoderAttention
from encoder_svc.images.types import GridThw
from encoder_svc.models.checkpoint import Checkpoint
from encoder_svc.models.ops import Ops
from encoder_svc.models.tower import padded_head_size
from encoder_svc.platforms import platform_for_device
from tests.models.towers import FAMILIES, difference, random_pixel_values, random_reference, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from encoder_svc.models.base import VisionEncoder

SMALL = {
    "qwen2_vl": {"depth": 2, "embed_dim": 48, "hidden_size": 48, "num_heads": 4},
    "qwen2_5_vl": {
        "depth": 2,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_heads": 4,
        "out_hidden_size": 48,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 2,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_heads": 4,
        "out_hidden_size": 48,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0],
    },
}


class DeferringOps(Ops):
    """The reference, with biases left to the norms as a GPU's operations leave them."""

    defers_bias = True

    def add_linear_(self, hidden_NC, x, weights):
        hidden_NC += x @ weights.weight.t()


def encoder(folder: Path, ops: Ops, head_size: int | None = None) -> VisionEncoder:
    checkpoint = Checkpoint(str(folder))
    config = checkpoint.config
    attention = MMEncoderAttention(
        config.num_heads,
        head_size or config.head_size,
        config.head_size**-0.5,
        platform=platform_for_device("cpu"),
        dtype="float32",
    )
    with torch.device("meta"):
        made = checkpoint.workflow.load_encoder()(config, attention)
    checkpoint.load(made, device=torch.device("cpu"), dtype=torch.float32)
    made.prepare(ops, mean=(0.5,) * 3, std=(0.5,) * 3)
    return made


@torch.inference_mode()
def rows(made: VisionEncoder) -> torch.Tensor:
    grids = [(1, 12, 18), (2, 6, 6)]
    inputs = made.build_inputs([GridThw(*grid) for grid in grids])
    return made([random_pixel_values(made.config, grids)], inputs)


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family = request.param
    write_checkpoint(tmp_path / family, family, random_reference(family, **SMALL[family]))
    return tmp_path / family


def test_padded_heads_change_no_row(folder: Path) -> None:
    """12 values a head, in 16."""
    assert difference(rows(encoder(folder, Ops(), 16)), rows(encoder(folder, Ops()))) <= 1e-5


def test_biases_left_to_the_norms_change_no_row(folder: Path) -> None:
    assert difference(rows(encoder(folder, DeferringOps())), rows(encoder(folder, Ops()))) <= 1e-5


@pytest.mark.parametrize(
    ("head_size", "platform", "padded"), [(72, "cuda", 80), (80, "cuda", 80), (72, "cpu", 72), (72, "rocm", 72)]
)
def test_heads_are_padded_on_cuda_alone(head_size: int, platform: str, padded: int) -> None:
    assert padded_head_size(head_size, platform) == padded
