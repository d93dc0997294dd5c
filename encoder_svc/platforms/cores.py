"""How many cores this process may use: what the scheduler allows, and no more than its container's share of time."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores(cgroups: Path = _CGROUPS) -> int:
    """At least 1. A quota of a core and a half counts as two.

    Args:
        cgroups: where Linux mounts control groups, of version 2 or 1, as a container sees its own.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota(cgroups))))


def _quota(cgroups: Path) -> float:
    """Cores' worth of time; infinite without a quota."""
    try:
        if (cgroups / "cpu.max").exists():
            limit, period = (cgroups / "cpu.max").read_text(encoding="ascii").split()
        else:
            limit, period = (
                (cgroups / "cpu" / name).read_text(encoding="ascii").strip()
                for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
    except (OSError, ValueError):  # another system, or a root group, which has no quota
        return math.inf
    return math.inf if limit in ("max", "-1") else int(limit) / int(period)
