"""JPEG bytes to patches on one core, ours beside transformers' Pillow-based processor: milliseconds, best of some.

    python benchmarks/images.py [--rounds 9]

Ours ends with the uint8 patches that go to the device; transformers' with normalised float32 pixel values, and by
``--resize pillow`` the same pixels. Both decode. The sides take turns.
"""

from __future__ import annotations

import argparse
import datetime
import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import PIL
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from encoder_svc.images.limits import Limits  # noqa: E402
from encoder_svc.images.processor import ImageProcessor, ProcessorSettings  # noqa: E402
from encoder_svc.images.types import EncodedImageBytes  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc.images.resize import ResizeFlavour

# A photograph's (width, height), and the largest area it is resized to: to 980², and to 1148 × 840.
CASES = (((1024, 1024), 980 * 980), ((4000, 3000), 28 * 28 * 1280))
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{datetime.date.today()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Pillow {PIL.__version__}: {' '.join(sys.argv)}"
    )
    for size, max_pixels in CASES:
        data = photograph(size)
        best_ms = measure(sides(data, max_pixels), arguments.rounds)
        print(f"{size[0]} × {size[1]}, {len(data)} bytes")
        for name, ms in best_ms.items():
            print(f"  {name:<28}{ms:8.1f} ms")
    return 0


def photograph(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    photo = Image.open(ROOT / "tests/photos/astronaut.jpg").convert("RGB")
    photo.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def sides(data: bytes, max_pixels: int) -> dict[str, Callable[[], object]]:
    ours = {flavour: our_processor(flavour, max_pixels) for flavour in ("torch", "pillow")}
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": max_pixels})
    return {
        "ours, --resize torch": lambda: ours["torch"].plan(EncodedImageBytes(data)).process(),
        "ours, --resize pillow": lambda: ours["pillow"].plan(EncodedImageBytes(data)).process(),
        "transformers, Pillow-based": lambda: theirs(Image.open(io.BytesIO(data)), return_tensors="pt"),
    }


def our_processor(flavour: ResizeFlavour, max_pixels: int) -> ImageProcessor:
    settings = ProcessorSettings(
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        min_pixels=3136,
        max_pixels=max_pixels,
        image_mean=_MEAN,
        image_std=_STD,
        resize=flavour,
    )
    return ImageProcessor(settings, Limits())


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least milliseconds of each, taking turns."""
    best_ms = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            started_s = time.perf_counter()
            run()
            best_ms[name] = min(best_ms[name], (time.perf_counter() - started_s) * 1e3)
    return best_ms


if __name__ == "__main__":
    sys.exit(main())
