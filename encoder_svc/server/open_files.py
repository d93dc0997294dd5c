"""How many files a server's process must be allowed to open."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Final

from encoder_svc.errors import ConfigError

if TYPE_CHECKING:
    from encoder_svc.config import Config

# An idle server has 17 of them open, and six more for each device's process or three for each front end's; a caller's
# connection is one more, and a start opens some for a while.
_FILES: Final = 64
_FILES_OF_A_PROCESS: Final = 8


def refuse_few_open_files(config: Config) -> None:
    """Refuses a start that would fail anywhere, with an error of whatever wanted the next file.

    Raises:
        ConfigError: too few are allowed.
    """
    num_devices = config.cpu_devices if config.cpu_devices > 1 else 0
    needed = _FILES + _FILES_OF_A_PROCESS * (num_devices + (config.frontend_processes or 0))
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise ConfigError(
            f"this process may open {allowed} files at a time, and a server with these options needs at least "
            f"{needed}, and one for each connection beyond: raise the limit (ulimit -n, systemd's LimitNOFILE, "
            "Docker's --ulimit nofile)."
        )
