"""How this server starts more processes of its own."""

from __future__ import annotations

import os
import sys


def python_module(module: str, *arguments: object) -> list[str]:
    """The command that runs a module of ours as this process runs: ``-m`` would look for every module, the standard
    library's too, in the working directory first, where a user's ``queue.py`` may lie."""
    is_run_from_here = "" in sys.path or any(os.path.isdir(path) and os.path.samefile(path, ".") for path in sys.path)
    return [sys.executable, *([] if is_run_from_here else ["-P"]), "-m", module, *map(str, arguments)]
