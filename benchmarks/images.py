"""JPEG bytes to what a device gets, on one core: time, and the host's CPU time, of one image, best of some.

    python benchmarks/images.py [--rounds 9] [--device cpu|cuda]

Ours ends with uint8 patches, with ``--image-processing device`` with the decoded pixels; on a GPU with either there.
transformers' Pillow-based processor ends with normalised float32 pixel values on the host, by ``--resize pillow`` the
same pixels. All decode. The sides take turns. CPU time is the thread's own, without waiting for the GPU.

Last, what is left to the device with ``--image-processing device``: the copy, and the resize and cutting; by the clock
of a GPU, or on one core.
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

from benchmarks.support.arguments import ROUNDS  # noqa: E402
from encoder_svc.engine.pixels import Pixels, pinned_to  # noqa: E402
from encoder_svc.images.limits import Limits  # noqa: E402
from encoder_svc.images.processor import ImageProcessor, ProcessorSettings  # noqa: E402
from encoder_svc.images.types import DecodedImage, EncodedImageBytes  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc.images.resize import ImageProcessing, ResizeFlavour
    from encoder_svc.images.types import EncoderImage

# A photograph's (width, height), and the largest area it is resized to: to 980², and to 1148 × 840.
CASES = (((1024, 1024), 980 * 980), ((4000, 3000), 28 * 28 * 1280))
PATCH_SIZE, MERGE_SIZE = 14, 2
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=ROUNDS, default=9)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    print(
        f"{datetime.date.today()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Pillow {PIL.__version__}: {' '.join(sys.argv)}"
    )
    for size, max_pixels in CASES:
        data = photograph(size)
        print(f"{size[0]} × {size[1]}, {len(data)} bytes")
        for name, (ms, cpu_ms) in measure(sides(data, max_pixels, device), device, arguments.rounds).items():
            print(f"  {name:<34}{ms:8.1f} ms  {cpu_ms:8.1f} ms of CPU")
        image = our_processor(max_pixels, image_processing="device").plan(EncodedImageBytes(data)).process()
        assert isinstance(image, DecodedImage)
        for name, ms in on_the_device(image, device, arguments.rounds).items():
            print(f"  left to the device: {name:<15}{ms:8.2f} ms")
    return 0


def photograph(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    photo = Image.open(ROOT / "tests/photos/astronaut.jpg").convert("RGB")
    photo.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def sides(data: bytes, max_pixels: int, device: torch.device) -> dict[str, Callable[[], object]]:
    ours = {
        "ours, --resize torch": our_processor(max_pixels),
        "ours, --resize pillow": our_processor(max_pixels, resize="pillow"),
        "ours, --image-processing device": our_processor(max_pixels, image_processing="device"),
    }
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": max_pixels})

    def run(processor: ImageProcessor) -> object:
        return sent(processor.plan(EncodedImageBytes(data)).process(), device)

    return {name: lambda processor=processor: run(processor) for name, processor in ours.items()} | {
        "transformers, Pillow-based": lambda: theirs(Image.open(io.BytesIO(data)), return_tensors="pt")
    }


def our_processor(
    max_pixels: int, *, resize: ResizeFlavour = "torch", image_processing: ImageProcessing = "host"
) -> ImageProcessor:
    settings = ProcessorSettings(
        patch_size=PATCH_SIZE,
        temporal_patch_size=2,
        merge_size=MERGE_SIZE,
        min_pixels=3136,
        max_pixels=max_pixels,
        image_mean=_MEAN,
        image_std=_STD,
        resize=resize,
        image_processing=image_processing,
    )
    return ImageProcessor(settings, Limits())


def sent(image: EncoderImage, device: torch.device) -> object:
    """What a batch of this image holds, on the device."""
    if isinstance(image, DecodedImage):
        pixels = pixels_of(image)
        return pixels if device.type == "cpu" else pixels.to(device)
    patches = torch.from_numpy(image.patches)
    return patches if device.type == "cpu" else pinned_to(patches, device)


def pixels_of(image: DecodedImage) -> Pixels:
    return Pixels.of([image], patch_size=PATCH_SIZE, merge_size=MERGE_SIZE)


def measure(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, tuple[float, float]]:
    """The least milliseconds of each, and of its thread's CPU time, taking turns."""
    best_ms = dict.fromkeys(runs, (float("inf"), float("inf")))
    for _ in range(rounds):
        for name, run in runs.items():
            started_s, cpu_s = time.perf_counter(), time.thread_time()
            run()
            spent_ms = (time.thread_time() - cpu_s) * 1e3
            synchronize(device)
            ms = (time.perf_counter() - started_s) * 1e3
            best_ms[name] = min(best_ms[name][0], ms), min(best_ms[name][1], spent_ms)
    return best_ms


def on_the_device(image: DecodedImage, device: torch.device, rounds: int) -> dict[str, float]:
    """The least milliseconds of each step."""
    pixels = pixels_of(image)
    if device.type == "cpu":
        return {"resize and cut": least_ms(pixels.patches, device, rounds)}
    pinned = pixels.images[0].pin_memory()
    there = pixels.to(device)
    return {
        "copy": least_ms(lambda: pinned.to(device, non_blocking=True), device, rounds),
        "resize and cut": least_ms(there.patches, device, rounds),
    }


def least_ms(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    best_ms = float("inf")
    for _ in range(rounds):
        if device.type == "cpu":
            started_s = time.perf_counter()
            run()
            best_ms = min(best_ms, (time.perf_counter() - started_s) * 1e3)
        else:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            run()
            ended.record()
            ended.synchronize()
            best_ms = min(best_ms, begun.elapsed_time(ended))
    return best_ms


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
