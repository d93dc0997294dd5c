"""Writes tests/images/resize_references.json: what transformers' torchvision-backed Qwen2-VL processor makes of images.

`--resize torch` promises that processor's bits without torchvision, so the tests hold it to this file. Run in an
environment of its own, since torchvision is no dependency of ours:

    python3 -m venv references && references/bin/pip install torch==2.13.0
    references/bin/pip install --no-deps torchvision==0.28.0
    references/bin/pip install transformers==5.23.0 pillow==13.0.0 numpy
    references/bin/python scripts/make_resize_references.py

What is hashed is uint8 [N, C, P, P]: the patches, in the processor's own order, one frame of each temporal patch,
resized and not yet normalised. `float32_patches` are samples of the same as torchvision makes them on a GPU, where it
interpolates in float32, made on a CPU by taking its kernel for uint8 from it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import PIL
import torch
from PIL import Image

if TYPE_CHECKING:
    import numpy.typing as npt

TESTS = Path(__file__).parent.parent / "tests"
REFERENCES = TESTS / "images" / "resize_references.json"
NUM_SAMPLES = 64
NUM_FLOAT32_SAMPLES = 256

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
# Patch sizes and normalisation of Qwen2-VL and Qwen2.5-VL (14, CLIP) and of Qwen3-VL (16, a half); the bounds make the
# same image grow, shrink, or keep about its size.
SETTINGS = [
    {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": low, "max_pixels": high, **CLIP}
    for low, high in [(56 * 56, 28 * 28 * 1280), (3_136, 50_000), (700_000, 1_003_520)]
] + [
    {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": low, "max_pixels": high, **HALF}
    for low, high in [(65_536, 16_777_216), (4_096, 40_000)]
]
PHOTOS = ["astronaut.jpg", "cat.jpg", "coffee.jpg", "galaxies.jpg", "rocket.jpg"]
# (height, width): tiny, flat and tall, odd, larger than its bounds, and one that needs no resize.
NOISE_SIZES = [(1, 1), (3, 5), (10, 1500), (1500, 10), (1, 200), (97, 61), (801, 533), (56, 84), (320, 256)]


def main() -> None:
    processor_class, versions = load_processor()
    cases = [make_case(processor_class, source, settings) for source, settings in product(sources(), SETTINGS)]
    lines = ",\n".join(json.dumps(case) for case in cases)
    REFERENCES.write_text(f'{{"versions": {json.dumps(versions)},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{REFERENCES}: {len(cases)} cases, {versions}")


def load_processor() -> tuple[type[Any], dict[str, str]]:
    """The processor class and the versions behind it."""
    operators = declare_torchvision_operators()
    import torchvision
    import transformers
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    del operators  # had to live until torchvision had registered its own half
    versions = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
    }
    return Qwen2VLImageProcessor, versions


def declare_torchvision_operators() -> torch.library.Library:
    """Declares the operators that torchvision's compiled half would.

    A torchvision built for CUDA cannot load that half beside a CPU torch, and then fails to import ("operator
    torchvision::nms does not exist"). The operators are detection's; resize is torch's own, so the import is all
    that they are needed for and their signatures do not matter.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        raise SystemExit("torchvision is not installed; see the head of this script.")
    registrations = Path(found.origin).with_name("_meta_registrations.py").read_text(encoding="utf-8")
    names = set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"\)', registrations))
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        library.define(f"{name}(Tensor unused) -> Tensor")
    return library


def sources() -> list[dict[str, Any]]:
    noise = [{"seed": seed, "height": height, "width": width} for seed, (height, width) in enumerate(NOISE_SIZES)]
    return [{"photo": photo} for photo in PHOTOS] + noise


def source_pixels(source: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """[H, W, 3]. Grey noise is the same byte in all three channels."""
    if "photo" in source:
        with Image.open(TESTS / "photos" / source["photo"]) as photo:
            return np.array(photo.convert("RGB"))
    size = source["height"], source["width"], 1
    grey = np.random.default_rng(source["seed"]).integers(0, 256, size, dtype=np.uint8)
    return np.repeat(grey, 3, axis=2)


def make_case(processor_class: type[Any], source: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    pixels_HWC = source_pixels(source)
    processor = processor_class(**settings)
    grid, patches_NCPP = resized_patches(processor, pixels_HWC)
    uint8_kernel = "torchvision.transforms.v2.functional._geometry._do_native_uint8_resize_on_cpu"
    with mock.patch(uint8_kernel, return_value=False):
        _, float32_patches_NCPP = resized_patches(processor, pixels_HWC)

    values = processor(Image.fromarray(pixels_HWC), return_tensors="pt")["pixel_values"].flatten()
    return {
        "source": source,
        "source_sha256": hashlib.sha256(pixels_HWC.tobytes()).hexdigest(),
        "settings": settings,
        "grid": grid,
        "patches_sha256": hashlib.sha256(patches_NCPP.numpy().tobytes()).hexdigest(),
        "float32_patches": samples(float32_patches_NCPP.flatten(), NUM_FLOAT32_SAMPLES),
        "samples": samples(values, NUM_SAMPLES),
        "mean": values.double().mean().item(),
        "min": values.min().item(),
        "max": values.max().item(),
    }


def resized_patches(processor: Any, pixels_HWC: npt.NDArray[np.uint8]) -> tuple[list[int], torch.Tensor]:
    """The grid, and uint8 [N, C, P, P]."""
    resized = processor(Image.fromarray(pixels_HWC), return_tensors="pt", do_rescale=False, do_normalize=False)
    patch, frames = processor.patch_size, processor.temporal_patch_size
    patches_NCTPP = resized["pixel_values"].reshape(-1, 3, frames, patch, patch)
    assert patches_NCTPP.dtype == torch.uint8
    assert torch.equal(patches_NCTPP[:, :, 0], patches_NCTPP[:, :, -1])
    return resized["image_grid_thw"][0].tolist(), patches_NCTPP[:, :, 0].contiguous()


def samples(values: torch.Tensor, number: int) -> list[float]:
    """Evenly spread ones of a flat tensor."""
    return [values[position].item() for position in np.linspace(0, len(values) - 1, number).astype(int)]


if __name__ == "__main__":
    main()
