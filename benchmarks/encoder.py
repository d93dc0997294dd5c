"""Our encoders beside transformers' in one run: same random weights at real dimensions, same images, taking turns.

    python benchmarks/encoder.py [--families qwen2_5_vl,…] [--sizes 448,1008] [--batches 1,8] [--json FILE] …

Ours goes from uint8 patches on the device to rows on the device, as the server runs it; transformers' from pixel
values that are normalised and on the device already. Figures are medians. The floor is the arithmetic of the config
over the rate of a matrix product that is measured in the same run. Errors are against transformers' tower in float32,
at the first size and batch 1.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.support.arguments import (  # noqa: E402
    DEPTH,
    GRAPH_PATCHES,
    IMAGES,
    ROUNDS,
    SECONDS_OR_NONE,
    SIDE,
    cells,
    listed,
)
from benchmarks.support.arithmetic import count  # noqa: E402
from benchmarks.support.encoders import Ours, Theirs, lowest_cosine, photographs, relative_error  # noqa: E402
from benchmarks.support.kernels import page_faults, profile  # noqa: E402
from benchmarks.support.timing import interleave, matrix_product_rate  # noqa: E402
from encoder_svc.config import Config  # noqa: E402
from encoder_svc.models.registry import family_names  # noqa: E402
from encoder_svc.models.synthetic import make_checkpoint  # noqa: E402
from encoder_svc.models.tower import TORCH_DTYPES  # noqa: E402
from encoder_svc.platforms import platform_for_device  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc.images.types import ProcessedImage


def main() -> int:
    arguments = _arguments()
    device = torch.device(arguments.device)
    rate = matrix_product_rate(TORCH_DTYPES[arguments.dtype], device)
    header = {
        "date": str(datetime.date.today()),
        "device": platform_for_device(arguments.device).device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": arguments.dtype,
        "command": " ".join(sys.argv),
        "matrix_product_tflops": rate / 1e12,
    }
    print("\n".join(f"{key}: {value}" for key, value in header.items()))
    rows: list[dict[str, Any]] = []
    for family in arguments.families.split(","):
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / family
            make_checkpoint(made, family=family, size="real", vision_only=True, dtype="bfloat16", depth=arguments.depth)
            rows += measure_family(family, made, rate, arguments)
        gc.collect()
    if arguments.json:
        arguments.json.write_text(json.dumps(header | {"rows": rows}, indent=1))
    if arguments.plot:
        from benchmarks.support.plot import plot

        plot(rows, arguments.plot, f"{header['device']}, {arguments.dtype}, torch {torch.__version__}")
    return 0


def measure_family(family: str, folder: Path, rate: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each side and cell, printed as it is measured."""
    options = {
        "device": arguments.device,
        "dtype": arguments.dtype,
        "backend": arguments.attn_backend,
        "graph_max_patches": arguments.cuda_graph_max_patches,
    }
    ours = Ours(folder, **options)
    also_ours = {}
    if arguments.quantization != "none":
        also_ours[f"ours {arguments.quantization}"] = Ours(folder, **options, quantization=arguments.quantization)
    theirs = None if arguments.no_theirs else Theirs(folder, device=arguments.device, dtype=arguments.dtype)
    settings = ours.tower.settings
    selection = ours.tower.selection
    print(f"\n{family}, depth {ours.tower.encoder.config.depth}: {selection.backend} ({selection.implementation})")
    print(f"{'cell':<11}{'encoder':<20}{'ms':>10}{'images/s':>10}{'patches/s':>11}{'of floor':>9}{'ratio':>7}")
    rows: list[dict[str, Any]] = []
    for side, number in arguments.cells or itertools.product(arguments.sizes, arguments.batches):
        rounded = round(side / settings.factor) * settings.factor
        images = photographs(ROOT / "tests/photos", rounded, number, settings)
        sides = runs(ours, also_ours, theirs, images)
        cell = measure_cell(ours, sides, images, rate, arguments)
        rows += [{"family": family, "side": rounded, "batch": number} | row for row in cell]
        if arguments.profile:
            print_profile(sides, ours.tower.device)
    if not arguments.no_errors:
        images = photographs(ROOT / "tests/photos", rows[0]["side"], 1, settings)
        errors = measure_errors(folder, runs(ours, also_ours, theirs, images), images, arguments.device, settings)
        rows = [row | errors[row["encoder"]] for row in rows]
    return rows


def runs(
    ours: Ours, also_ours: dict[str, Ours], theirs: Theirs | None, images: list[ProcessedImage]
) -> dict[str, Callable[[], torch.Tensor]]:
    """Each side's forward of the same images."""
    sides: dict[str, Callable[[], torch.Tensor]] = {}
    for name, side in {"ours": ours, **also_ours}.items():
        sides[name] = lambda side=side, batch=side.batch(images): side.rows(batch)
    if theirs is None:
        return sides
    pixel_values = theirs.pixel_values(images, ours.tower.settings)
    grids = torch.tensor([image.grid for image in images], device=pixel_values.device)
    for attention in theirs.attentions(pixel_values, grids):
        sides[f"hf {attention}"] = lambda attention=attention: theirs.rows(pixel_values, grids, attention)
    return sides


def measure_cell(
    ours: Ours,
    sides: dict[str, Callable[[], torch.Tensor]],
    images: list[ProcessedImage],
    rate: float,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One row a side. ``ratio`` says how many times as long as ours it takes."""
    device, encoder = ours.tower.device, ours.tower.encoder
    times_s = interleave(sides, device, rounds=arguments.rounds, budget_s=arguments.cell_s)
    medians_s = {name: statistics.median(times) for name, times in times_s.items()}
    floor_s = count(encoder.config, encoder.build_inputs([image.grid for image in images])).total / rate
    patches = sum(image.grid.num_patches for image in images)
    label = f"{images[0].grid.h * encoder.config.patch_size}² × {len(images)}"
    rows = []
    for name, median_s in medians_s.items():
        row = {
            "encoder": name,
            "patches": patches,
            "ms": median_s * 1e3,
            "images_per_s": len(images) / median_s,
            "patches_per_s": patches / median_s,
            "of_floor": floor_s / median_s,
            "ratio": median_s / medians_s["ours"],
            "floor_ms": floor_s * 1e3,
            "rounds": len(times_s[name]),
        }
        if device.type == "cuda":
            row["peak_bytes_per_patch"] = _peak_bytes(sides[name], device) / patches
        print(
            f"{label:<11}{name:<20}{row['ms']:>10.2f}{row['images_per_s']:>10.2f}{row['patches_per_s']:>11.0f}"
            f"{row['of_floor']:>9.2f}{row['ratio']:>7.2f}",
            flush=True,
        )
        rows.append(row)
    return rows


def measure_errors(
    folder: Path,
    sides: dict[str, Callable[[], torch.Tensor]],
    images: list[ProcessedImage],
    device: str,
    settings: Any,
) -> dict[str, dict[str, float]]:
    """Relative error and lowest cosine of each side's rows, against transformers' tower in float32."""
    exact = Theirs(folder, device=device, dtype="float32")
    pixel_values = exact.pixel_values(images, settings)
    grids = torch.tensor([image.grid for image in images], device=pixel_values.device)
    wanted = exact.rows(pixel_values, grids).double()
    errors = {}
    for name, run in sides.items():
        rows = run().double()
        errors[name] = {"relative_error": relative_error(rows, wanted), "lowest_cosine": lowest_cosine(rows, wanted)}
        print(f"{name}: relative error {errors[name]['relative_error']:.2e}", end=", ")
        print(f"lowest cosine {errors[name]['lowest_cosine']:.6f}", flush=True)
    return errors


def print_profile(sides: dict[str, Callable[[], torch.Tensor]], device: torch.device) -> None:
    for name, run in sides.items():
        spent_ms = profile(run, device)
        spent = ", ".join(f"{label} {ms:.2f} ms" for label, ms in spent_ms.items())
        faults = f"; {page_faults(run)} page faults" if device.type == "cpu" else ""
        print(f"  {name}: {spent}{faults}", flush=True)


def _peak_bytes(run: Callable[[], torch.Tensor], device: torch.device) -> int:
    """What a forward takes beyond what was allocated before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", default=",".join(family_names()))
    parser.add_argument(
        "--sizes", type=listed(SIDE), default="448,1008", help="sides in pixels, rounded to the family's multiple"
    )
    parser.add_argument("--batches", type=listed(IMAGES), default="1", help="images in a batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=list(TORCH_DTYPES))
    parser.add_argument("--attn-backend", help="our attention backend; without it the platform chooses")
    parser.add_argument("--cells", type=cells, help="SIDExBATCH, separated by commas, in place of sizes and batches")
    parser.add_argument("--no-theirs", action="store_true", help="time ours alone")
    parser.add_argument("--quantization", default="none", choices=["none", "fp8"], help="measure ours quantised too")
    parser.add_argument(
        "--cuda-graph-max-patches", type=GRAPH_PATCHES, default=Config().cuda_graph_max_patches, metavar="N"
    )
    parser.add_argument("--depth", type=DEPTH, help="layers, for a quick look; default: the checkpoints' own")
    parser.add_argument("--rounds", type=ROUNDS, default=20, help="at most")
    parser.add_argument(
        "--cell-s", type=SECONDS_OR_NONE, default=20.0, help="stop a cell's rounds after this many seconds"
    )
    parser.add_argument("--no-errors", action="store_true", help="skip the comparison with float32")
    parser.add_argument("--profile", action="store_true", help="print each cell's time by class of kernel")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--plot", type=Path, help="draw cost by size and by batch; needs matplotlib")
    return parser.parse_args()


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
