"""Memory stays flat while photographs come in."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
from PIL import Image

from encoder_svc.client import EncoderClient
from tests.serving import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.alone


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


def transparent_png(side: int) -> bytes:
    slope = np.linspace(0, 255, side).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(slope[:, None], slope, slope[::-1], slope[:, None]), -1)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=1)
    return file.getvalue()


@pytest.mark.parametrize("front_ends", [0, 1])
def test_large_images_take_no_more_memory_than_is_given_and_give_it_back(
    tiny_checkpoint: Callable[[str], Path], record_property: Callable[[str, object], None], front_ends: int
) -> None:
    large = transparent_png(5000)  # 200 MB while it is decoded
    options = ("--decode-threads", "4", "--max-decoded-bytes", "250MiB", "--frontend-processes", str(front_ends))
    with (
        ServerProcess("--model", tiny_checkpoint("qwen2_vl"), *options) as fresh,
        EncoderClient(fresh.target) as client,
        ThreadPoolExecutor(6) as callers,
    ):
        decoding = psutil.Process(fresh.process.pid)
        if front_ends:
            [decoding] = decoding.children()
        client.encode([transparent_png(300)])
        before_bytes = decoding.memory_info().rss
        list(callers.map(lambda number: client.encode([large + bytes([number])]), range(6)))
        peak_bytes, after_bytes = peak_rss_bytes(decoding.pid), decoding.memory_info().rss
    record_property("rss_mb", (before_bytes / 1e6, peak_bytes / 1e6, after_bytes / 1e6))
    assert peak_bytes - before_bytes < 400e6  # for four at a time it would be 800e6
    assert after_bytes - before_bytes < 150e6  # 128 MiB are kept


def peak_rss_bytes(pid: int) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
