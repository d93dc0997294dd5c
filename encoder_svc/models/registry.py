"""The families that are served: one line each, and those that others bring by entry point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from encoder_svc.errors import CheckpointError
from encoder_svc.models.workflow import Workflow

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS: Final = "encoder_svc.workflows"
"""Third parties add a family by an entry point of this group: its name is the ``model_type``, its value the
:class:`Workflow`."""

_WORKFLOWS = {
    workflow.model_type: workflow
    for workflow in (
        Workflow(model_type="qwen2_vl", encoder="encoder_svc.models.qwen2_vl:Qwen2VLEncoder"),
        Workflow(model_type="qwen2_5_vl", encoder="encoder_svc.models.qwen2_5_vl:Qwen25VLEncoder"),
        Workflow(model_type="qwen3_vl", encoder="encoder_svc.models.qwen3_vl:Qwen3VLEncoder"),
    )
}


def family_names() -> tuple[str, ...]:
    """Every ``model_type`` that is served."""
    return (*_WORKFLOWS, *_entry_points())


def find_workflow(model_type: object, where: str) -> Workflow:
    """The workflow for a checkpoint's ``model_type``. Nobody else's code is imported for another family.

    Raises:
        CheckpointError: not one that is served, or what was installed for it is no workflow.
    """
    if isinstance(model_type, str):
        if workflow := _WORKFLOWS.get(model_type):
            return workflow
        if entry := _entry_points().get(model_type):
            return _load(entry)
    raise CheckpointError(
        f"{where}: model_type {model_type!r} is not an architecture that is served. Served: "
        f"{', '.join(family_names())}."
    )


def _entry_points() -> dict[str, EntryPoint]:
    """By name. Ours cannot be replaced."""
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS) if entry.name not in _WORKFLOWS}


def _load(entry: EntryPoint) -> Workflow:
    where = f"entry point '{entry.name}' of group {ENTRY_POINTS} ({entry.value})"
    try:
        workflow = entry.load()
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"{where} cannot be loaded: {error}.") from error
    if not isinstance(workflow, Workflow) or workflow.model_type != entry.name:
        raise CheckpointError(f"{where} is not a Workflow whose model_type is {entry.name!r}.")
    return workflow
