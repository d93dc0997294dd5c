#!/usr/bin/env python3
"""A server's memory while a hundred different photographs come in, one after the other.

    python benchmarks/memory.py [--model DIR] [--photos FOLDER …] [--number 100]

Photographs are the files in the folders; where those are fewer than asked for, crops of them make up the rest, no two
of the same pixels. Prints the server's resident memory before the first, after every tenth, and after the last.
"""

from __future__ import annotations

import argparse
import io
import platform
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from support.arguments import IMAGES
from support.server import make_tiny, running_server

from encoder_svc.client import EncoderClient

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--photos", type=Path, nargs="+", default=[ROOT / "tests/photos"], metavar="FOLDER")
    parser.add_argument("--number", type=IMAGES, default=100)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    photos = different_photographs(arguments.photos, arguments.number)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_tiny(Path(folder))
        measure(model, arguments.dtype, photos, Path(folder) / "server.log")
    return 0


def measure(model: Path, dtype: str, photos: list[bytes], log: Path) -> None:
    # No cache: it grows by design, up to its bound.
    with (
        running_server(model, ["--device", "cpu", "--dtype", dtype], log) as (process, target),
        EncoderClient(target) as client,
    ):
        print(f"{date.today()}, {platform.machine()}, torch {torch.__version__}, {client.info().family} {dtype}")
        print(f"{'after':>6} {'RSS, MB':>10}")
        print(f"{'start':>6} {process.memory_info().rss / 1e6:>10.1f}")
        for number, photo in enumerate(photos, start=1):
            client.encode([photo])
            if number % 10 == 0 or number == 1:
                print(f"{number:>6} {process.memory_info().rss / 1e6:>10.1f}", flush=True)


def different_photographs(folders: list[Path], number: int) -> list[bytes]:
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.suffix in {".jpg", ".png"})
    photos = [file.read_bytes() for file in files][:number]
    random = np.random.default_rng(0)
    for index in range(number - len(photos)):
        whole = Image.open(files[index % len(files)]).convert("RGB")
        width, height = (int(random.integers(side // 3, side)) for side in whole.size)
        left, top = int(random.integers(whole.width - width)), int(random.integers(whole.height - height))
        buffer = io.BytesIO()
        whole.crop((left, top, left + width, top + height)).save(buffer, "JPEG", quality=90)
        photos.append(buffer.getvalue())
    random.shuffle(photos)
    return photos


if __name__ == "__main__":
    raise SystemExit(main())
