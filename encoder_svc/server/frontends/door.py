"""How full the replica is, where every front end sees it: refusing a call asks nobody."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Final

from encoder_svc.engine.load import Load

if TYPE_CHECKING:
    from encoder_svc.engine.load import Budgets
    from encoder_svc.errors import RequestError

# Each number is written whole; that two of them may be of different moments does no harm.
_NUM_BYTES: Final = 8 * len(Load._fields)


class DoorSign:
    """Written where the device is.

    Args:
        file: a shared file's descriptor.
    """

    def __init__(self, file: int) -> None:
        os.ftruncate(file, _NUM_BYTES)
        self._numbers = memoryview(mmap.mmap(file, _NUM_BYTES)).cast("d")

    def write(self, load: Load) -> None:
        """See :attr:`encoder_svc.engine.admission.Admission.on_change`."""
        for place, number in enumerate(load):
            self._numbers[place] = number


class DoorSignReader:
    """Read where calls come in."""

    def __init__(self, file: int, budgets: Budgets, num_front_ends: int) -> None:
        self._num_front_ends = num_front_ends
        self._numbers = memoryview(mmap.mmap(file, _NUM_BYTES, access=mmap.ACCESS_READ)).cast("d")
        self._budgets = budgets

    def refusal(self) -> RequestError | None:
        """See :meth:`encoder_svc.engine.admission.Load.refusal_at_the_door`."""
        return Load(*self._numbers).refusal_at_the_door(self._budgets)

    def is_half_empty(self, **ahead: int) -> bool:
        """See :meth:`encoder_svc.engine.admission.Load.is_half_empty`. ``ahead``: of this front end; that the others
        have as much is taken for granted, so that all of them together stay within the budgets."""
        total = {what: number * self._num_front_ends for what, number in ahead.items()}
        return Load(*self._numbers).is_half_empty(self._budgets, **total)
