"""Which requests are sent, and how often each.

A mix file is a list of entries, in JSON or YAML; configs/bench-mix.yaml explains each key.
"""

from __future__ import annotations

import json
import random
import secrets
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from encoder_svc.bench.pictures import FORMATS, Format, Picture, noise_picture, photo_picture
from encoder_svc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encoder_svc.client.types import ImageInput

MAX_IMAGES_PER_REQUEST: Final = 4096
_MAX_PIXELS = 2**27
_MAX_WEIGHT = 10**9
_KEYS = ("weight", "photo", "size", "images", "format")


@dataclass(frozen=True, kw_only=True, slots=True)
class MixEntry:
    """One kind of request.

    Attributes:
        weight: how often, relative to the other entries.
        photo: a JPEG, PNG or WebP file; else ``size`` is given.
        size: (width, height) in pixels of an image of noise.
        images: (least, most) images in a request; None: what the command line says.
        format: how the image is sent; None: a photo as it is, noise as JPEG.
    """

    weight: float = 1.0
    photo: Path | None = None
    size: tuple[int, int] | None = None
    images: tuple[int, int] | None = None
    format: Format | None = None

    @property
    def name(self) -> str:
        """For a person."""
        if self.size is None:
            assert self.photo is not None
            return self.photo.name if self.format is None else f"{self.photo.name} {self.format}"
        return f"{self.size[0]}×{self.size[1]} {self.format or 'jpeg'}"


DEFAULT_MIX: Final = (
    MixEntry(weight=4, size=(224, 224)),
    MixEntry(weight=3, size=(640, 480)),
    MixEntry(weight=2, size=(1024, 768)),
    MixEntry(weight=1, size=(1920, 1080)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixShare:
    """What one entry of a mix became: its share of the requests (0 to 1), images a request, bytes of an image."""

    name: str
    share: float
    images: tuple[int, int]
    image_bytes: int


class Mix:
    """Draws requests. Every image is ready before the first draw; the same seed draws the same sequence.

    Args:
        entries: at least one.
        images_per_request: (least, most), for entries that say nothing of their own.
        unique: make each image that is drawn differ from every other, also from another run's.

    Raises:
        ConfigError: a photo cannot be read, or Pillow is needed and missing.
    """

    def __init__(
        self, entries: Sequence[MixEntry], *, images_per_request: tuple[int, int], unique: bool, seed: int
    ) -> None:
        self._pictures = [_picture(entry, seed) for entry in entries]
        self._num_images = [entry.images or images_per_request for entry in entries]
        self._cumulative_weights = list(accumulate(entry.weight for entry in entries))
        self._random = random.Random(f"mix {seed}")  # noqa: S311
        self._unique = unique
        self._next_mark = secrets.randbits(64)
        total = self._cumulative_weights[-1]
        self.shares = tuple(
            MixShare(name=entry.name, share=entry.weight / total, images=num_images, image_bytes=int(picture.num_bytes))
            for entry, num_images, picture in zip(entries, self._num_images, self._pictures, strict=True)
        )

    def draw(self) -> list[ImageInput]:
        """The images of the next request: one picture, as many times as its entry says."""
        [chosen] = self._random.choices(range(len(self._pictures)), cum_weights=self._cumulative_weights)
        num_images = self._random.randint(*self._num_images[chosen])
        return [self._copy(self._pictures[chosen]) for _ in range(num_images)]

    def _copy(self, picture: Picture) -> ImageInput:
        if not self._unique:
            return picture.plain()
        self._next_mark = (self._next_mark + 1) % 2**64
        return picture.unique(self._next_mark)


def _picture(entry: MixEntry, seed: int) -> Picture:
    if entry.size is not None:
        return noise_picture(*entry.size, entry.format or "jpeg", seed=seed)
    assert entry.photo is not None
    return photo_picture(entry.photo, entry.format)


def read_mix(path: Path) -> tuple[MixEntry, ...]:
    """Reads a mix file: JSON, or YAML where PyYAML is installed. Photos are looked up from the file's folder.

    Raises:
        ConfigError: it cannot be read, or says something that is not understood.
    """
    try:
        document = _parse(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise ConfigError(f"--mix {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--mix {path}: not UTF-8 text.") from None
    if not isinstance(document, list) or not document:
        raise ConfigError(f"--mix {path}: must be a list of entries, with at least one.")
    return tuple(
        _entry(entry, f"--mix {path}: entry {number}", path.parent) for number, entry in enumerate(document, 1)
    )


def _parse(text: str, path: Path) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}: {error.msg}"
    except (ValueError, RecursionError):
        where = "a number or its nesting is beyond reading"
    if path.suffix == ".json":
        raise ConfigError(f"--mix {path}: not JSON ({where}).")
    try:
        import yaml
    except ModuleNotFoundError:
        raise ConfigError(f"--mix {path}: not JSON ({where}); to read YAML, pip install PyYAML.") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"--mix {path}: neither JSON nor YAML{where}.") from None
    except (ValueError, LookupError, AttributeError, RecursionError):
        # PyYAML's, of what is written like a value of a kind and is none: the date 2024-13-45, say.
        raise ConfigError(f"--mix {path}: neither JSON nor YAML: a date, number or tag in it cannot be read.") from None


def _entry(value: object, where: str, folder: Path) -> MixEntry:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must have keys, of: {', '.join(_KEYS)}.")
    entry = cast("dict[object, object]", value)
    unknown = [str(key) for key in entry if key not in _KEYS]
    if unknown:
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}; the keys are {', '.join(_KEYS)}.")
    if ("photo" in entry) == ("size" in entry):
        raise ConfigError(f"{where} must have either photo or size.")
    image_format = entry.get("format")
    if image_format is not None and image_format not in FORMATS:
        raise ConfigError(f"{where}: format must be one of {', '.join(FORMATS)}, not {image_format!r}.")
    return MixEntry(
        weight=_weight(entry.get("weight", 1), where),
        photo=_photo(entry["photo"], where, folder) if "photo" in entry else None,
        size=_size(entry["size"], where) if "size" in entry else None,
        images=_images(entry["images"], where) if "images" in entry else None,
        format=image_format,
    )


def _weight(value: object, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= _MAX_WEIGHT:
        raise ConfigError(f"{where}: weight must be a number above 0, at most {_MAX_WEIGHT:,}, not {value!r}.")
    return float(value)


def _photo(value: object, where: str, folder: Path) -> Path:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: photo must be a path, not {value!r}.")
    return folder / Path(value).expanduser()


def _size(value: object, where: str) -> tuple[int, int]:
    pair = _two_counts(value)
    if pair is None or min(pair) < 2 or pair[0] * pair[1] > _MAX_PIXELS:
        raise ConfigError(
            f"{where}: size must be [width, height] in pixels, each 2 or more, at most {_MAX_PIXELS} in all, "
            f"not {value!r}."
        )
    return pair


def _images(value: object, where: str) -> tuple[int, int]:
    pair = _two_counts([value, value] if not isinstance(value, list) else value)
    if pair is None or not 1 <= pair[0] <= pair[1] <= MAX_IMAGES_PER_REQUEST:
        raise ConfigError(
            f"{where}: images must be a number from 1 to {MAX_IMAGES_PER_REQUEST}, or [least, most], not {value!r}."
        )
    return pair


def _two_counts(value: object) -> tuple[int, int] | None:
    numbers: list[Any] = value if isinstance(value, list) else []
    if len(numbers) != 2 or any(type(number) is not int for number in numbers):
        return None
    return numbers[0], numbers[1]
