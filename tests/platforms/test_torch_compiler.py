"""Each program runs in a process of its own: the compiler is imported once for all."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import inspect, sys
import torch
from encoder_svc.platforms.torch_compiler import compiler_left_out

real = torch.compile, torch.compiler.disable
{before}
with compiler_left_out():
    {within}
assert (torch.compile, torch.compiler.disable) == real
print("torch._dynamo" in sys.modules, {then})
"""


def says(within: str, then: str = "function(2)", before: str = "") -> list[str]:
    """What is printed after ``within``: whether the compiler was imported, and then the value of ``then``."""
    program = _PROGRAM.format(before=before, within=within, then=then)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "within",
    [
        "function = torch.compiler.disable(lambda x: x + 1)",
        "function = torch.compiler.disable(recursive=False)(lambda x: x + 1)",
        "function = torch.compiler.disable(reason='none')(lambda x: x + 1)",
    ],
)
def test_a_function_that_is_not_to_be_traced_stays_as_it_is(within: str) -> None:
    assert says(within) == ["False", "3"]


@pytest.mark.parametrize("wrapped", ["torch.compile({f}, dynamic=False)", "torch.compile(recompile_limit=64)({f})"])
def test_a_function_that_is_to_be_compiled_is_not_until_it_is_called(wrapped: str) -> None:
    within = f"function = {wrapped.format(f='(lambda x: x + 1)')}"
    assert says(within, then="callable(function)") == ["False", "True"]


@pytest.mark.parametrize("wrapped", ["torch.compile({f}, backend='eager')", "torch.compile(backend='eager')({f})"])
def test_a_function_that_is_to_be_compiled_is_when_it_is_called(wrapped: str) -> None:
    within = f"function = {wrapped.format(f='(lambda x: x + 1)')}"
    then = "[int(function(torch.tensor(n))) for n in (2, 3)] == [3, 4], 'torch._dynamo' in sys.modules"
    assert says(within, then) == ["False", "True", "True"]


def test_packages_find_that_the_recompile_limit_is_known() -> None:
    within = "function = 'recompile_limit' in inspect.signature(torch.compile).parameters"
    assert says(within, then="function") == ["False", "True"]


def test_nothing_changes_where_the_compiler_is_there_already() -> None:
    within = "function = (torch.compile, torch.compiler.disable) == real"
    assert says(within, then="function", before="import torch._dynamo") == ["True", "True"]


def test_all_is_as_it_was_after_an_import_that_fails() -> None:
    before = "from contextlib import suppress"
    within = "pass\nwith suppress(ImportError), compiler_left_out():\n    import no_such_package"
    assert says(within, then="torch.compile is real[0]", before=before) == ["False", "True"]
