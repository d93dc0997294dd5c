"""uint8 patches through the folded weights give what a processor's normalised pixel values give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from encoder_svc.images.patches import normalise
from encoder_svc.images.types import GridThw
from tests.models.towers import FAMILIES, difference, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from encoder_svc.models.tower import VisionTower

GRID = GridThw(1, 8, 12)
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def uint8_patches(tower: VisionTower) -> torch.Tensor:
    """[N, C, P, P], with the darkest and the brightest value among them."""
    side = tower.settings.patch_size
    shape = (GRID.num_patches, tower.settings.channels, side, side)
    patches = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    patches[0], patches[1] = 0, 255
    return patches


def normalised(tower: VisionTower, patches: torch.Tensor) -> torch.Tensor:
    settings = tower.settings
    return normalise(
        patches, mean=settings.image_mean, std=settings.image_std, temporal_patch_size=settings.temporal_patch_size
    )


@torch.inference_mode()
def embed(tower: VisionTower, *segments: torch.Tensor) -> torch.Tensor:
    return tower.encoder.patch_embed([segment.to(tower.device) for segment in segments]).float().cpu()


@EVERY_FAMILY
def test_float32_patches_are_embedded_alike(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    tower = load(tiny_checkpoint(family))
    patches = uint8_patches(tower)
    assert difference(embed(tower, patches.flatten(1)), embed(tower, normalised(tower, patches))) <= 2e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@EVERY_FAMILY
def test_half_precision_loses_about_as_much_on_uint8_as_on_pixel_values(
    tiny_checkpoint: Callable[[str], Path], family: str, dtype: str
) -> None:
    exact_tower, tower = load(tiny_checkpoint(family)), load(tiny_checkpoint(family), dtype=dtype)
    patches = uint8_patches(tower)
    exact = embed(exact_tower, normalised(exact_tower, patches))
    lost = (embed(tower, patches.flatten(1)) - exact).norm()
    assert lost <= 1.2 * (embed(tower, normalised(tower, patches)) - exact).norm()


@EVERY_FAMILY
def test_segments_of_both_kinds_stand_in_order(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    tower = load(tiny_checkpoint(family))
    patches = uint8_patches(tower)
    pixels, values = patches.flatten(1), normalised(tower, patches)
    mixed = embed(tower, pixels[:20], values[20:50], pixels[50:])
    assert difference(mixed, embed(tower, values)) <= 2e-6


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@EVERY_FAMILY
def test_cuda_embeds_uint8_as_the_cpu_does(tiny_checkpoint: Callable[[str], Path], family: str, dtype: str) -> None:
    here = load(tiny_checkpoint(family))
    there = load(tiny_checkpoint(family), device="cuda", dtype=dtype)
    pixels = uint8_patches(here).flatten(1)
    assert difference(embed(there, pixels), embed(here, pixels)) <= 1e-2
