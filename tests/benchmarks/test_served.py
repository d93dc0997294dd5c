"""What a server is measured against."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]


def test_the_encoder_runs_in_a_loop_as_a_server_has_it(tiny_checkpoint: Callable[[str], Path]) -> None:
    loop = ["--loop", str(tiny_checkpoint("qwen2_vl")), "--loop-side", "56", "--clients", "2", "--duration", "0.2"]
    command = [sys.executable, "benchmarks/served.py", *loop, "--device", "cpu", "--", "--max-image-pixels", "100"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["patches_per_s"] == 16 * seen["images_per_s"] > 0
    assert 0 < seen["cores"] < 64
