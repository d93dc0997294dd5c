#!/usr/bin/env python3
"""The main job, end to end: photographs through a server process to a separate LM process, which generates.

    make demo                      # or: python scripts/demo.py --family qwen3_vl

Three processes: this one, the server (vision tower alone), and an LM (language weights alone, scripts/demo_lm.py).
Afterwards the whole model runs in this process, and its tokens are compared with the LM's.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from encoder_svc.temporary import make_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = [ROOT / "tests/photos" / f"{name}.jpg" for name in ("cat", "coffee", "rocket")]
QUESTION = "What do these photographs have in common?"
NUM_TOKENS = 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="qwen2_5_vl", choices=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
    parser.add_argument("photos", nargs="*", type=Path, default=PHOTOS, metavar="PHOTO")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends too, and the folder goes
    with ExitStack() as temporary:
        return demo(arguments.family, arguments.photos, make_folder(temporary, "encoder-svc-demo-"))


def demo(family: str, photos: list[Path], folder: Path) -> int:
    step(f"1. A tiny {family} checkpoint with random weights (seed 0): vision tower and LM")
    checkpoint = folder / f"tiny-{family}"
    command = ["make-checkpoint", "--family", family, str(checkpoint)]
    subprocess.run([sys.executable, "-m", "encoder_svc", *command], check=True, stdout=subprocess.DEVNULL)
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    print(f"   {len(list(checkpoint.iterdir()))} files, {size / 1e6:.1f} MB")

    step("2. A server process, which reads the vision tower alone")
    with running_server(checkpoint, folder / "server.log") as target:
        print(f"   serving on {target}")
        step("3. A separate LM process, which reads the language weights alone, sends the photographs, generates")
        lm = json.loads(
            subprocess.run(
                [sys.executable, str(ROOT / "scripts/demo_lm.py"), target, str(checkpoint), QUESTION, str(NUM_TOKENS)]
                + [str(photo) for photo in photos],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
    show(lm, photos)

    step("4. The whole model in one process, for comparison")
    tokens, text = whole_model(checkpoint, photos)
    print(f"   tokens  {tokens}\n   text    {text!r}")
    same = tokens == lm["tokens"]
    print(f"\n{'THE TOKENS ARE THE SAME.' if same else 'THE TOKENS DIFFER.'}")
    return 0 if same else 1


def show(lm: dict[str, object], photos: list[Path]) -> None:
    print(f"   the LM process holds {lm['parameters']:,} parameters, of them {lm['vision_parameters']} for vision")
    print(f"\n   {'photograph':<16}{'sent':>10}{'rows':>6}{'received':>11}  milliseconds in each stage")
    for photo, image in zip(photos, lm["images"], strict=True):
        stages = "  ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in image["timings"].items())
        sent, received = f"{photo.stat().st_size:,} B", f"{image['bytes']:,} B"
        print(f"   {photo.name:<16}{sent:>10}{image['rows']:>6}{received:>11}  {stages}")
    print(
        f"\n   prompt  {QUESTION!r}\n   tokens  {lm['tokens']}\n   text    {lm['text']!r}   (random weights: gibberish)"
    )


@contextmanager
def running_server(checkpoint: Path, log: Path) -> Iterator[str]:
    """A server on a free port. Pillow's resize, because the comparison below uses transformers' Pillow processor."""
    command = ["serve", "--model", str(checkpoint), "--port", "0", "--dtype", "float32", "--resize", "pillow"]
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-m", "encoder_svc", *command], stderr=output)
        try:
            yield f"127.0.0.1:{wait_for_port(process, log)}"
        finally:
            process.terminate()
            process.wait()


def wait_for_port(process: subprocess.Popen[bytes], log: Path) -> int:
    for _ in range(600):
        for line in log.read_text().splitlines():
            if ": serving " in line:
                return int(line.rsplit(":", 1)[1])
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def whole_model(checkpoint: Path, photos: list[Path]) -> tuple[list[int], str]:
    """transformers alone: its image processor, its vision tower, its LM."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
    pixels = processor([Image.open(photo).convert("RGB") for photo in photos], return_tensors="pt")
    prompt = chat_prompt(tokenizer, QUESTION, len(photos))
    for grid in pixels["image_grid_thw"].tolist():
        rows = grid[0] * grid[1] * grid[2] // processor.merge_size**2
        prompt = prompt.replace("<|image_pad|>", "<|placeholder|>" * rows, 1)
    inputs = tokenizer(prompt.replace("<|placeholder|>", "<|image_pad|>"), return_tensors="pt")
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    out = model.generate(**inputs, **pixels, max_new_tokens=NUM_TOKENS, do_sample=False)
    tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, tokenizer.decode(tokens)


def chat_prompt(tokenizer: object, question: str, num_images: int) -> str:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def step(text: str) -> None:
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
