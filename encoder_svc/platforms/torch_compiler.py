"""torch's compiler, left out while packages are imported that only name it.

quack-kernels, and flash-attn 4 with it, wrap functions in ``torch.compile`` and ``torch.compiler.disable`` as they are
imported. Either imports ``torch._dynamo``, ``torch._inductor``, sympy and a thousand modules more, half of a GPU's
start (docs/performance-gpu.md, "Cold start"), and nothing that is served is ever traced or compiled.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def compiler_left_out() -> Iterator[None]:
    """Within it ``torch.compile`` waits for the first call, and ``torch.compiler.disable`` leaves functions as they
    are: a tracer would not stop there. Not for two threads at once. Where the compiler is there already, nothing
    changes."""
    if "torch._dynamo" in sys.modules:
        yield
        return
    compile_now, disable = torch.compile, torch.compiler.disable
    # Assigned like this, for mypy knows no function that may be assigned to.
    vars(torch)["compile"] = partial(_compile_later, compile_now)
    vars(torch.compiler)["disable"] = _leave
    try:
        yield
    finally:
        vars(torch)["compile"] = compile_now
        vars(torch.compiler)["disable"] = disable


def _compile_later(
    compile_now: Callable[..., Any],
    model: Callable[..., Any] | None = None,
    *,
    recompile_limit: int | None = None,  # by name, for packages look whether torch knows it; it does from 2.13 on
    **options: Any,
) -> Any:
    if recompile_limit is not None:
        options["recompile_limit"] = recompile_limit
    if model is None:
        return partial(_compile_later, compile_now, **options)
    return _CompiledWhenCalled(partial(compile_now, model, **options))


class _CompiledWhenCalled:
    def __init__(self, compiled: Callable[[], Callable[..., Any]]) -> None:
        self._make = compiled
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None:
            self._compiled = self._make()
        return self._compiled(*args, **kwargs)


def _leave(fn: Callable[..., Any] | None = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    return (lambda function: function) if fn is None else fn
