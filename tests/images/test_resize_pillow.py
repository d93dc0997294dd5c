"""`--resize pillow` against transformers' own Pillow-backed processor, and `smart_resize` against its original."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as their_smart_resize

from encoder_svc.images.limits import Limits
from encoder_svc.images.patches import normalise
from encoder_svc.images.processor import ImageProcessor, ProcessorSettings
from encoder_svc.images.resize import smart_resize
from encoder_svc.images.types import EncodedImageBytes, ImageSource, RawRgb

PHOTOS = ["astronaut.jpg", "cat.jpg", "coffee.jpg", "galaxies.jpg", "rocket.jpg"]
NOISE_SIZES = [(1, 1), (3, 5), (10, 1500), (1, 200), (200, 1), (2000, 10), (97, 61), (56, 84), (64, 96)]
SOURCES = [pytest.param(source, id=str(source)) for source in [*PHOTOS, *NOISE_SIZES]]

QWEN2_VL = ProcessorSettings(
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=56 * 56,
    max_pixels=28 * 28 * 64,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    resize="pillow",
)
QWEN3_VL = dataclasses.replace(
    QWEN2_VL, patch_size=16, min_pixels=200_000, max_pixels=400_000, image_mean=(0.5,) * 3, image_std=(0.5,) * 3
)
SETTINGS = [pytest.param(QWEN2_VL, id="patch14"), pytest.param(QWEN3_VL, id="patch16")]


@pytest.fixture(params=SOURCES)
def image(request: pytest.FixtureRequest, photo_files: dict[str, bytes]) -> ImageSource:
    if isinstance(request.param, str):
        return EncodedImageBytes(photo_files[request.param])
    height, width = request.param
    pixels_HWC = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return RawRgb(height, width, pixels_HWC.tobytes())


def as_pillow(image: ImageSource, open_image) -> Image.Image:
    if isinstance(image, EncodedImageBytes):
        return Image.fromarray(open_image(image.data).decode())
    return Image.frombytes("RGB", (image.width, image.height), image.data)


def theirs(settings: ProcessorSettings) -> Qwen2VLImageProcessorPil:
    values = dataclasses.asdict(settings)
    del values["resize"]
    return Qwen2VLImageProcessorPil(**values)


@pytest.mark.parametrize("settings", SETTINGS)
def test_patches_equal_transformers_to_the_bit(settings: ProcessorSettings, image: ImageSource, open_image) -> None:
    ours = ImageProcessor(settings, Limits()).plan(image).process()
    expected = theirs(settings)(as_pillow(image, open_image), do_rescale=False, do_normalize=False, return_tensors="np")
    assert [list(ours.grid)] == expected["image_grid_thw"].tolist()
    frames = expected["pixel_values"].reshape(-1, 3, settings.temporal_patch_size, *[settings.patch_size] * 2)
    for frame in range(settings.temporal_patch_size):
        assert np.array_equal(ours.patches, frames[:, :, frame])


@pytest.mark.parametrize("settings", SETTINGS)
def test_pixel_values_equal_transformers(settings: ProcessorSettings, image: ImageSource, open_image) -> None:
    ours = normalise(
        torch.from_numpy(ImageProcessor(settings, Limits()).plan(image).process().patches),
        mean=settings.image_mean,
        std=settings.image_std,
        temporal_patch_size=settings.temporal_patch_size,
    )
    expected = theirs(settings)(as_pillow(image, open_image), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_the_plan_foretells_the_grid_and_the_number_of_patches(image: ImageSource) -> None:
    plan = ImageProcessor(QWEN2_VL, Limits()).plan(image)
    processed = plan.process()
    assert processed.grid == plan.grid
    assert len(processed.patches) == plan.grid.num_patches


SIZES = st.integers(1, 40_000).flatmap(
    lambda height: st.tuples(st.just(height), st.integers(math.ceil(height / 200), min(200 * height, 40_000)))
)
BOUNDS = st.tuples(st.integers(1, 2**25), st.integers(1, 2**25)).map(sorted)


@hypothesis_settings(deadline=None)
@given(size=SIZES, factor=st.sampled_from([14, 28, 32, 56]), bounds=BOUNDS)
def test_smart_resize_is_transformers_own(size: tuple[int, int], factor: int, bounds: list[int]) -> None:
    arguments = {"factor": factor, "min_pixels": bounds[0], "max_pixels": bounds[1]}
    assert smart_resize(*size, **arguments) == their_smart_resize(*size, **arguments)


@hypothesis_settings(deadline=None)
@given(short=st.integers(1, 400), ratio=st.integers(1, 200), tall=st.booleans(), factor=st.sampled_from([28, 32]))
def test_smart_resize_yields_positive_multiples_of_the_factor(short: int, ratio: int, tall: bool, factor: int) -> None:
    height, width = (short * ratio, short) if tall else (short, short * ratio)
    resized = smart_resize(height, width, factor=factor, min_pixels=factor**2 * 4, max_pixels=factor**2 * 1280)
    assert min(resized) >= factor
    assert [side % factor for side in resized] == [0, 0]
