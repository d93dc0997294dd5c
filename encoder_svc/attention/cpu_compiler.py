"""Compiles C where it runs, as Triton compiles its own: in seconds, once a process."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Final

from encoder_svc.temporary import make_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

_FLAGS: Final = (
    *("-O3", "-fno-math-errno", "-fPIC", "-fopenmp", "-mprefer-vector-width=512"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"),
)
_LIMIT_S: Final = 60


def load_compiled(sources: Sequence[str], *definitions: str) -> ctypes.CDLL:
    """A library of C files of ours, for CPUs with AVX512-BF16.

    Args:
        sources: paths inside encoder_svc.
        definitions: macros to define.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, or it failed.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler (gcc) on the PATH")
    defined = [f"-D{definition}" for definition in definitions]
    with as_file(files("encoder_svc")) as package, ExitStack() as temporary:
        folder = make_folder(temporary, "encoder-svc-gcc-")
        # Two steps: linked with -fopenmp it would bring a second OpenMP runtime, whose threads fight with torch's.
        given = (*defined, f"-I{package / 'attention'}", "-c", *(str(package / source) for source in sources))
        _run(compiler, *_FLAGS, *given, cwd=folder)
        objects = [f"{Path(source).stem}.o" for source in sources]
        _run(compiler, "-shared", *objects, "-o", "kernels.so", cwd=folder)
        return _loaded((folder / "kernels.so").read_bytes())


def _run(*command: str, cwd: Path) -> None:
    subprocess.run(  # noqa: S603 - the program is the compiler, the arguments our own
        command, check=True, capture_output=True, text=True, timeout=_LIMIT_S, cwd=cwd
    )


def _loaded(library: bytes) -> ctypes.CDLL:
    """Loads it from memory: a container's /tmp may be mounted noexec.

    The file stays open, as long as the library: to dlopen another file of its number would be the same library.
    """
    file = os.memfd_create("encoder_svc_cpu_kernels")
    with os.fdopen(os.dup(file), "wb") as writer:
        writer.write(library)
    return ctypes.CDLL(f"/proc/self/fd/{file}")
