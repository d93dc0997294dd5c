"""What a batch must not change, and what the causal switch must."""

from __future__ import annotations

import json
import random
import shutil
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

from tests.models.towers import (
    FAMILIES,
    Grids,
    difference,
    load,
    random_pixel_values,
    rows,
    split_images,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from encoder_svc.models.tower import VisionTower

MERGE_UNIT = 4


def random_grids(seed: int) -> Grids:
    """A few images of any shape, one of them twice, and sometimes a video."""
    draw = random.Random(seed)
    sides = [2 * blocks for blocks in range(1, 13)]
    grids = [(draw.choice([1, 1, 1, 2]), draw.choice(sides), draw.choice(sides)) for _ in range(draw.randint(2, 5))]
    return [*grids, draw.choice(grids)]


@pytest.fixture(scope="module")
def towers(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], VisionTower]:
    return cache(lambda family: load(tiny_checkpoint(family)))


@pytest.fixture(scope="module")
def causal_towers(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], VisionTower]:
    @cache
    def make(family: str, backend: str) -> VisionTower:
        folder = shutil.copytree(tiny_checkpoint(family), tmp_path_factory.mktemp("causal") / family)
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"]["is_causal"] = True
        (folder / "config.json").write_text(json.dumps(config))
        return load(folder, backend=backend)

    return make


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_each_image_what_it_gets_alone(
    towers: Callable[[str], VisionTower], family: str, seed: int
) -> None:
    tower, grids = towers(family), random_grids(seed)
    pixel_values = random_pixel_values(tower.encoder.config, grids, seed)
    alone = [rows(tower, image, [grid]) for image, grid in zip(split_images(pixel_values, grids), grids, strict=True)]
    assert difference(rows(tower, pixel_values, grids), torch.cat(alone)) <= 1e-5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_images_does_not_matter(towers: Callable[[str], VisionTower], family: str, seed: int) -> None:
    tower, grids = towers(family), random_grids(seed)
    images = split_images(random_pixel_values(tower.encoder.config, grids, seed), grids)
    order = random.Random(seed).sample(range(len(grids)), len(grids))
    shuffled = rows(tower, torch.cat([images[i] for i in order]), [grids[i] for i in order])
    wanted = split_images(rows(tower, torch.cat(images), grids), grids, MERGE_UNIT)
    assert difference(shuffled, torch.cat([wanted[i] for i in order])) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_of_a_video_do_not_see_each_other(towers: Callable[[str], VisionTower], family: str) -> None:
    tower = towers(family)
    pixel_values = random_pixel_values(tower.encoder.config, [(3, 6, 10)])
    as_images = rows(tower, pixel_values, [(1, 6, 10)] * 3)
    assert difference(rows(tower, pixel_values, [(3, 6, 10)]), as_images) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_rows_differ_from_bidirectional_ones(
    towers: Callable[[str], VisionTower], causal_towers: Callable[[str, str], VisionTower], family: str
) -> None:
    tower, grids = towers(family), [(1, 10, 14)]
    pixel_values = random_pixel_values(tower.encoder.config, grids)
    causal = rows(causal_towers(family, "TORCH_SDPA"), pixel_values, grids)
    assert difference(causal, rows(tower, pixel_values, grids)) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_rows_are_those_of_the_naive_backend(
    causal_towers: Callable[[str, str], VisionTower], family: str
) -> None:
    tower, grids = causal_towers(family, "TORCH_SDPA"), random_grids(7)
    pixel_values = random_pixel_values(tower.encoder.config, grids)
    naive = rows(causal_towers(family, "TORCH_NAIVE"), pixel_values, grids)
    assert difference(rows(tower, pixel_values, grids), naive) <= 1e-5


@pytest.mark.parametrize("backend", ["TORCH_SDPA", "TORCH_NAIVE"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_a_causal_tower_does_not_see_later_patches(
    causal_towers: Callable[[str, str], VisionTower], family: str, backend: str
) -> None:
    tower, grids = causal_towers(family, backend), [(1, 6, 10)]
    pixel_values = random_pixel_values(tower.encoder.config, grids)
    before = rows(tower, pixel_values, grids)
    pixel_values[-MERGE_UNIT:] += 1.0
    after = rows(tower, pixel_values, grids)
    assert difference(after[:-1], before[:-1]) <= 1e-6
    assert difference(after[-1:], before[-1:]) > 1e-3


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_on_cuda_gives_each_image_what_it_gets_alone(
    tiny_checkpoint: Callable[[str], Path], family: str
) -> None:
    tower, grids = load(tiny_checkpoint(family), device="cuda"), random_grids(0)
    pixel_values = random_pixel_values(tower.encoder.config, grids)
    alone = [rows(tower, image, [grid]) for image, grid in zip(split_images(pixel_values, grids), grids, strict=True)]
    assert difference(rows(tower, pixel_values, grids), torch.cat(alone)) <= 1e-3
