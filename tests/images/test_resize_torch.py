"""`--resize torch` against transformers' torchvision-backed processor, through what it was recorded to yield."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from encoder_svc.images.limits import Limits
from encoder_svc.images.patches import normalise
from encoder_svc.images.processor import ImageProcessor, ProcessorSettings
from encoder_svc.images.types import EncodedImageBytes, ImageSource, RawRgb

if TYPE_CHECKING:
    from encoder_svc.images.types import ProcessedImage

REFERENCES = json.loads(Path(__file__).with_name("resize_references.json").read_text(encoding="utf-8"))
CASES: list[dict[str, Any]] = REFERENCES["cases"]
PHOTO_DIGESTS = {case["source"]["photo"]: case["source_sha256"] for case in CASES if "photo" in case["source"]}


def name_of(case: dict[str, Any]) -> str:
    source, settings = case["source"], case["settings"]
    what = source.get("photo") or f"noise-{source['height']}x{source['width']}"
    return f"{what}-p{settings['patch_size']}-{settings['min_pixels']}-{settings['max_pixels']}"


def processor_of(case: dict[str, Any]) -> ImageProcessor:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in case["settings"].items()}
    return ImageProcessor(ProcessorSettings(**values, resize="torch"), Limits())


def image_of(case: dict[str, Any], photo_files: dict[str, bytes]) -> ImageSource:
    source = case["source"]
    if "photo" in source:
        return EncodedImageBytes(photo_files[source["photo"]])
    height, width = source["height"], source["width"]
    grey = np.random.default_rng(source["seed"]).integers(0, 256, (height, width, 1), dtype=np.uint8)
    return RawRgb(height, width, np.repeat(grey, 3, axis=2).tobytes())


def process(case: dict[str, Any], photo_files: dict[str, bytes]) -> ProcessedImage:
    return processor_of(case).plan(image_of(case, photo_files)).process()


@pytest.mark.parametrize(("photo", "digest"), PHOTO_DIGESTS.items())
def test_a_photograph_decodes_to_the_pixels_that_the_references_were_made_from(
    photo: str, digest: str, photo_files: dict[str, bytes], open_image
) -> None:
    decoded = open_image(photo_files[photo]).decode()
    assert hashlib.sha256(decoded.tobytes()).hexdigest() == digest, (
        f"{photo}: this Pillow's JPEG decoder yields other pixels than that of Pillow "
        f"{REFERENCES['versions']['pillow']}, with which the references were made. The resize is not at fault: run "
        "scripts/make_resize_references.py with this Pillow."
    )


@pytest.mark.parametrize("case", [case for case in CASES if "seed" in case["source"]], ids=name_of)
def test_noise_is_the_noise_that_the_references_were_made_from(case: dict[str, Any]) -> None:
    assert hashlib.sha256(image_of(case, {}).data).hexdigest() == case["source_sha256"]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_patches_equal_torchvisions_to_the_bit(case: dict[str, Any], photo_files: dict[str, bytes]) -> None:
    processed = process(case, photo_files)
    assert list(processed.grid) == case["grid"]
    assert hashlib.sha256(processed.patches.tobytes()).hexdigest() == case["patches_sha256"]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_pixel_values_equal_torchvisions(case: dict[str, Any], photo_files: dict[str, bytes]) -> None:
    settings = case["settings"]
    values = normalise(
        torch.from_numpy(process(case, photo_files).patches),
        mean=settings["image_mean"],
        std=settings["image_std"],
        temporal_patch_size=settings["temporal_patch_size"],
    ).flatten()
    positions = np.linspace(0, len(values) - 1, len(case["samples"])).astype(int)
    assert values[positions].tolist() == pytest.approx(case["samples"], rel=0, abs=1e-6)
    assert values.double().mean().item() == pytest.approx(case["mean"], rel=0, abs=1e-6)
    assert values.min().item() == pytest.approx(case["min"], rel=0, abs=1e-6)
    assert values.max().item() == pytest.approx(case["max"], rel=0, abs=1e-6)


def test_the_references_cover_growing_shrinking_and_keeping_the_size() -> None:
    def change(case: dict[str, Any]) -> str:
        if "photo" in case["source"]:
            return "photo"
        resized = [side * case["settings"]["patch_size"] for side in case["grid"][1:]]
        source = [case["source"]["height"], case["source"]["width"]]
        return "kept" if resized == source else "grown" if resized > source else "shrunk"

    assert {change(case) for case in CASES} == {"photo", "kept", "grown", "shrunk"}
