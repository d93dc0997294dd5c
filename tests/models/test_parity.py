"""Every encoder gives what transformers' vision tower gives on the same weights."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from encoder_svc.attention import MMEncoderAttention
from encoder_svc.images.types import GridThw
from encoder_svc.models.base import ConfigReader
from encoder_svc.models.ops import Ops
from encoder_svc.models.registry import find_workflow
from encoder_svc.platforms import platform_for_device
from tests.models.towers import (
    BACKENDS,
    FAMILIES,
    Grids,
    difference,
    load,
    random_pixel_values,
    random_reference,
    reference,
    reference_levels,
    reference_rows,
    rows,
    write_checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    from encoder_svc.models.tower import VisionTower

GRIDS: dict[str, Grids] = {
    "smallest": [(1, 2, 2)],
    "one square": [(1, 16, 16)],
    "one tall": [(1, 30, 4)],
    "one wide": [(1, 2, 38)],
    "ragged windows": [(1, 22, 18)],
    "several of one size": [(1, 6, 4)] * 5,
    "mixed sizes": [(1, 18, 22), (1, 4, 4), (1, 2, 30), (1, 10, 6)],
    "video": [(3, 10, 14)],
    "video between images": [(1, 4, 6), (4, 6, 10), (1, 2, 2)],
}
EVERY_GRID = pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)

RELEASED: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 1280, "hidden_size": 256, "num_heads": 16, "mlp_ratio": 4},
    "qwen2_5_vl": {
        "depth": 2,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 256,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 2,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 256,
        "patch_size": 16,
        "num_position_embeddings": 48 * 48,
        "deepstack_visual_indexes": [0],
    },
}

SMALL: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 3, "embed_dim": 32, "hidden_size": 48, "num_heads": 2},
    "qwen2_5_vl": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 48,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 48,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [1],
    },
}

OF_EVERY_FAMILY: list[dict[str, Any]] = [
    {"rope_parameters": {"rope_type": "axial", "rope_theta": 50.0}},
    {"hidden_act": "gelu"},
    {"hidden_act": "gelu_pytorch_tanh"},
    {"hidden_act": "quick_gelu"},
    {"hidden_act": "silu"},
    {"patch_size": 8},
    {"spatial_merge_size": 1},
    {"spatial_merge_size": 3},
    {"temporal_patch_size": 1},
    {"num_heads": 4},
]
VARIATIONS = [(family, change) for change in OF_EVERY_FAMILY for family in FAMILIES] + [
    ("qwen2_vl", {"mlp_ratio": 3}),
    ("qwen2_5_vl", {"window_size": 28}),
    ("qwen2_5_vl", {"window_size": 100}),
    ("qwen2_5_vl", {"fullatt_block_indexes": []}),
    ("qwen2_5_vl", {"fullatt_block_indexes": [2, 0]}),
    ("qwen3_vl", {"deepstack_visual_indexes": []}),
    ("qwen3_vl", {"deepstack_visual_indexes": [2, 0, 1]}),
    ("qwen3_vl", {"num_position_embeddings": 1}),
]


@pytest.fixture(scope="module")
def references(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    return cache(lambda family: reference(tiny_checkpoint(family)))


@pytest.fixture(scope="module")
def towers(tiny_checkpoint: Callable[[str], Path]) -> Callable[..., VisionTower]:
    return cache(lambda family, **options: load(tiny_checkpoint(family), **options))


@EVERY_GRID
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_the_references(
    references: Callable[[str], PreTrainedModel],
    towers: Callable[..., VisionTower],
    family: str,
    backend: str,
    grids: Grids,
) -> None:
    tower = towers(family, backend=backend)
    pixel_values = random_pixel_values(tower.encoder.config, grids)
    wanted = reference_rows(references(family), pixel_values, grids)
    assert difference(rows(tower, pixel_values, grids), wanted) <= 1e-4


@pytest.mark.parametrize("level", [1, 2, 3])
def test_each_deepstack_level_stands_after_the_embedding(
    references: Callable[[str], PreTrainedModel], towers: Callable[..., VisionTower], level: int
) -> None:
    tower, grids = towers("qwen3_vl"), GRIDS["mixed sizes"]
    pixel_values = random_pixel_values(tower.encoder.config, grids)
    wanted = reference_levels(references("qwen3_vl"), pixel_values, grids)[level]
    out = tower.encoder.config.out_hidden_size
    got = rows(tower, pixel_values, grids)[:, level * out : (level + 1) * out]
    assert difference(got, wanted) <= 1e-4


@pytest.mark.parametrize(("family", "change"), VARIATIONS, ids=str)
def test_every_dimension_is_read_from_the_config(tmp_path: Path, family: str, change: dict[str, Any]) -> None:
    visual = random_reference(family, **SMALL[family] | change)
    write_checkpoint(tmp_path, family, visual)
    tower = load(tmp_path)
    grids: Grids = [(1, 12, 18), (2, 6, 6)]
    pixel_values = random_pixel_values(tower.encoder.config, grids)
    wanted = reference_rows(visual, pixel_values, grids)
    assert difference(rows(tower, pixel_values, grids), wanted) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_the_references_at_released_dimensions(family: str) -> None:
    visual = random_reference(family, **RELEASED[family])
    encoder_class = find_workflow(family, "here").load_encoder()
    config = encoder_class.read_config(ConfigReader(visual.config.to_dict(), "here"))
    attention = MMEncoderAttention(
        config.num_heads, config.head_size, platform=platform_for_device("cpu"), dtype="float32"
    )
    with torch.device("meta"):
        encoder = encoder_class(config, attention)
    shapes = {name: parameter.shape for name, parameter in encoder.named_parameters()}
    weights = {name: value.reshape(shapes[name]) for name, value in visual.state_dict().items()}
    encoder.load_state_dict(weights, assign=True)
    encoder.prepare(Ops(), mean=(0.5,) * 3, std=(0.5,) * 3)
    grids: Grids = [(1, 18, 22), (1, 4, 8)]
    pixel_values = random_pixel_values(config, grids)
    wanted = reference_rows(visual, pixel_values, grids)
    with torch.inference_mode():
        got = encoder([pixel_values], encoder.build_inputs([GridThw(*grid) for grid in grids]))
    assert difference(got, wanted) <= 1e-4


@pytest.fixture(scope="module")
def causal_attention() -> str:
    """transformers' towers are bidirectional; this attention function of theirs makes one causal."""

    def causal_sdpa(
        module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, scaling: float, **__: Any
    ) -> tuple[torch.Tensor, None]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2), None

    AttentionInterface.register("causal_sdpa", causal_sdpa)
    return "causal_sdpa"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_causal_checkpoint_gives_what_a_causal_reference_gives(
    tmp_path: Path, causal_attention: str, family: str, backend: str
) -> None:
    visual = random_reference(family, attn_implementation=causal_attention, **SMALL[family])
    write_checkpoint(tmp_path, family, visual, is_causal=True)
    tower, grids = load(tmp_path, backend=backend), GRIDS["video between images"] + GRIDS["ragged windows"]
    pixel_values = random_pixel_values(tower.encoder.config, grids)
    wanted = reference_rows(visual, pixel_values, grids)
    assert difference(rows(tower, pixel_values, grids), wanted) <= 1e-4


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """float32 products in float32, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.cuda
@pytest.mark.usefixtures("exact_float32")
@EVERY_GRID
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_on_cuda_equal_the_references(
    references: Callable[[str], PreTrainedModel],
    towers: Callable[..., VisionTower],
    family: str,
    backend: str,
    grids: Grids,
) -> None:
    tower = towers(family, backend=backend, device="cuda")
    pixel_values = random_pixel_values(tower.encoder.config, grids)
    wanted = reference_rows(references(family), pixel_values, grids)
    assert difference(rows(tower, pixel_values, grids), wanted) <= 1e-3


@pytest.mark.cuda
@EVERY_GRID
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_rows_on_cuda_are_near_the_references(
    references: Callable[[str], PreTrainedModel],
    towers: Callable[..., VisionTower],
    family: str,
    backend: str,
    grids: Grids,
) -> None:
    tower = towers(family, backend=backend, device="cuda", dtype="bfloat16")
    pixel_values = random_pixel_values(tower.encoder.config, grids)
    wanted = reference_rows(references(family), pixel_values, grids)
    assert difference(rows(tower, pixel_values, grids), wanted) <= 3e-2
