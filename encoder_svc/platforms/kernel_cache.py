"""Where kernels that were compiled for a GPU are kept between starts.

Triton, quack and flash-attn 4 each compile kernels when these are first used, and keep them on disk as their own
variables say: quack by default in a folder in /tmp whose name anybody can foresee, flash-attn 4 not at all. What lies
there is loaded and run as native code, so the folder must be one that nobody else may write.
"""

from __future__ import annotations

import logging
import os
import stat
from typing import TYPE_CHECKING, Final

from encoder_svc.config import kernel_cache_folder, set_unless_set
from encoder_svc.temporary import make_folder

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

    from encoder_svc.config import Config
    from encoder_svc.platforms.facts import Facts

logger = logging.getLogger(__name__)

_TRITON: Final = "TRITON_CACHE_DIR"
_FOLDERS: Final = {
    _TRITON: "triton",
    "QUACK_CACHE_DIR": "quack",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash_attn_4",
}
_SWITCHES: Final = ("QUACK_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED")


def use_kernel_cache(config: Config, facts: Facts, temporary: ExitStack) -> None:
    """Sets the packages' variables for this process, those that the operator has set excepted. Call it before any of
    the packages is imported. On a CPU it does nothing.

    Without a folder that is fit for it, kernels are compiled at every start, and a warning says why.

    Args:
        facts: of the device that kernels will be compiled for.
        temporary: takes back the folder that Triton needs all the same.
    """
    if facts.platform not in ("cuda", "rocm"):
        return
    folder = kernel_cache_folder(config)
    why = None if folder is None else why_not(folder)
    if folder is not None and why is None:
        # Not all keys of flash-attn 4's kernels name the architecture, and a volume may be shared by unlike machines.
        inside = folder / f"{facts.platform}-{_architecture(facts)}"
        variables = {name: str(inside / package) for name, package in _FOLDERS.items()} | dict.fromkeys(_SWITCHES, "1")
        kept = set_unless_set(variables)
        logger.info("kernel cache: %s%s", folder, f"; set already: {', '.join(kept)}" if kept else "")
        return
    if why is None:
        logger.info("kernel cache: none, as kernel_cache_dir is empty; every start compiles")
    else:
        logger.warning("kernel cache: NONE, every start compiles: %s. Give --kernel-cache-dir another folder.", why)
    set_unless_set(dict.fromkeys(_SWITCHES, "0") | _private_folder(temporary))


def why_not(folder: Path) -> str | None:
    """Why kernels must not, or cannot, be kept in ``folder``, as a sentence; None if they can.

    Makes it, for this user alone, if it is not there.
    """
    if not folder.is_absolute():
        return f"{folder} is in a home, which this user has none of"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"
    if status.st_uid != os.geteuid():
        return f"{folder} belongs to user {status.st_uid} and this process is user {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{folder} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}; 0700 would do)"
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return f"{folder} cannot be written"
    return None


def _private_folder(temporary: ExitStack) -> dict[str, str]:
    try:
        return {_TRITON: str(make_folder(temporary, "encoder-svc-kernels-"))}
    except OSError as error:
        logger.warning("kernel cache: no temporary folder either (%s): what needs Triton will give way", error.strerror)
        return {}


def _architecture(facts: Facts) -> str:
    return facts.gfx or ".".join(map(str, facts.capability or ()))
