"""Memory stays flat while photographs come in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from encoder_svc.client import EncoderClient
from tests.serving import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def different_photographs(photos: list[Path], number: int) -> list[np.ndarray]:
    """Crops of real photographs, no two of the same pixels, sides from 150 to the photograph's own."""
    random = np.random.default_rng(0)
    pixels = [np.asarray(Image.open(photo).convert("RGB")) for photo in photos]
    crops = []
    for index in range(number):
        whole = pixels[index % len(pixels)]
        height, width = (int(random.integers(150, side)) for side in whole.shape[:2])
        top, left = int(random.integers(whole.shape[0] - height)), int(random.integers(whole.shape[1] - width))
        crops.append(whole[top : top + height, left : left + width])
    return crops


@pytest.mark.parametrize("place", ["host", "device"])
def test_a_hundred_photographs_leave_memory_flat(
    tiny_checkpoint: Callable[[str], Path],
    photos: list[Path],
    record_property: Callable[[str, object], None],
    place: str,
) -> None:
    crops = different_photographs(photos, 200)
    options = ("--model", tiny_checkpoint("qwen3_vl"), "--image-processing", place)
    with ServerProcess(*options) as fresh, EncoderClient(fresh.target) as client:
        for crop in crops[:100]:
            client.encode([crop])
        warm_bytes = fresh.rss_bytes()
        for crop in crops[100:]:
            client.encode([crop])
        after_bytes = fresh.rss_bytes()
    record_property("rss_before_mb", warm_bytes / 1e6)
    record_property("rss_after_mb", after_bytes / 1e6)
    # One photograph's patches, activations and embeddings are about 10 MB here; keeping any of a hundred would show.
    # Holes in the heap are 12 to 18 MB in most runs, and were 37 in one.
    assert after_bytes - warm_bytes < 45e6
