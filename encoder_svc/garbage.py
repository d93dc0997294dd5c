"""Python's garbage collector, told when to look for cycles."""

from __future__ import annotations

import gc
from typing import Final

_DEFAULT_THRESHOLDS: Final = gc.get_threshold()
_NEW_OBJECTS_WHILE_LOADING: Final = 100_000


def look_for_cycles_rarely() -> None:
    """Until :func:`spare_what_is_loaded`, while all that is made is imported and stays: to look through it again and
    again takes a fifth of the imports' time. Not switched off, for callers are refused meanwhile, maybe for long."""
    gc.set_threshold(_NEW_OBJECTS_WHILE_LOADING)


def spare_what_is_loaded() -> None:
    """Has Python's collector of cycles leave alone what is there by now: modules, weights, kernels. To look through
    those two hundred thousand objects again takes a tenth of a second, in which every thread stands still."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_DEFAULT_THRESHOLDS)
