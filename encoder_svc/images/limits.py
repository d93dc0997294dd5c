"""Every limit on what a caller sends, checked before memory is taken for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from encoder_svc.errors import Reason, request_error

_MAX_REQUEST_ID = 256

MAX_DEVICE_PIXELS: Final = 2**25
MAX_DEVICE_SHRINK: Final = 32
"""Bounds on an image that the device resizes: its pixels, and how many times as many they are as those of the resized
image. So the pixels of a batch take at most so many times the bytes of its patches, and the float32 copy of one image
384 MiB. A photograph of 24 megapixels stays within both at a ``max_pixels`` of a million."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds on one request. All inclusive.

    ``max_aspect_ratio`` is that of Qwen-VL's ``smart_resize``: the longer side over the shorter.
    """

    max_image_bytes: int = 32 * 2**20
    max_request_bytes: int = 128 * 2**20
    max_image_side: int = 32_768
    max_image_pixels: int = 80_000_000
    max_aspect_ratio: int = 200
    max_images: int = 64
    max_request_patches: int = 262_144

    def check_num_images(self, num_images: int) -> None:
        self._check_number(num_images, "image")

    def check_num_keys(self, num_keys: int) -> None:
        """As many as images: each is an image's."""
        self._check_number(num_keys, "key")

    def _check_number(self, number: int, noun: str) -> None:
        if number == 0:
            raise request_error(Reason.REQUEST_EMPTY, f"The request holds no {noun}; send at least one.")
        if number > self.max_images:
            raise request_error(
                Reason.REQUEST_TOO_MANY_IMAGES,
                f"The request holds {number} {noun}s; at most {self.max_images} are taken. Split it.",
            )

    def check_request_id(self, request_id: str) -> None:
        if len(request_id) > _MAX_REQUEST_ID:
            raise request_error(
                Reason.REQUEST_ID_TOO_LONG, f"request_id has {len(request_id)} characters; at most {_MAX_REQUEST_ID}."
            )

    def check_request_bytes(self, num_bytes: int) -> None:
        if num_bytes > self.max_request_bytes:
            raise request_error(
                Reason.REQUEST_TOO_LARGE,
                f"The request is {num_bytes} bytes; at most {self.max_request_bytes} are taken. Split it.",
            )

    def check_request_patches(self, num_patches: int) -> None:
        if num_patches > self.max_request_patches:
            raise request_error(
                Reason.REQUEST_TOO_MANY_PATCHES,
                f"The request's images make {num_patches} patches; at most {self.max_request_patches} are taken. "
                "Split it, or send smaller images.",
            )

    def check_image_bytes(self, num_bytes: int) -> None:
        if num_bytes == 0:
            raise request_error(Reason.IMAGE_MISSING, "The image is empty: no bytes were sent.")
        if num_bytes > self.max_image_bytes:
            raise request_error(
                Reason.IMAGE_TOO_LARGE,
                f"The image is {num_bytes} bytes; at most {self.max_image_bytes} are taken.",
            )

    def check_image_size(self, height: int, width: int) -> None:
        """Checks the size that a header declares, in pixels, before anything is allocated for it."""
        if height < 1 or width < 1:
            raise request_error(Reason.IMAGE_SIDE, f"An image of {width} x {height} pixels has no content.")
        if max(height, width) > self.max_image_side:
            raise request_error(
                Reason.IMAGE_SIDE,
                f"The image is {width} x {height} pixels; a side is at most {self.max_image_side}.",
            )
        if height * width > self.max_image_pixels:
            raise request_error(
                Reason.IMAGE_PIXELS,
                f"The image is {width} x {height} = {height * width} pixels; at most {self.max_image_pixels} are "
                "taken.",
            )
        if max(height, width) > self.max_aspect_ratio * min(height, width):
            raise request_error(
                Reason.IMAGE_ASPECT_RATIO,
                f"The image is {width} x {height} pixels; its longer side is more than {self.max_aspect_ratio} times "
                "the shorter.",
            )


def fits_device_resize(height: int, width: int, resized_pixels: int) -> bool:
    """Whether the device may resize an image of this size to so many pixels."""
    pixels = height * width
    return pixels <= MAX_DEVICE_PIXELS and pixels <= MAX_DEVICE_SHRINK * resized_pixels
