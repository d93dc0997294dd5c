"""The families that are served: one line each. A family's module is imported when a checkpoint asks for it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from encoder_svc.errors import CheckpointError

if TYPE_CHECKING:
    from encoder_svc.models.base import VisionEncoder


@dataclass(frozen=True, slots=True)
class Family:
    """A family of checkpoints.

    Attributes:
        name: ``model_type`` in the checkpoint's config.json.
        encoder: ``module:class`` of its :class:`VisionEncoder`.
        tower_prefixes: what the vision tensors' names start with, in each layout that is in use.
    """

    name: str
    encoder: str
    tower_prefixes: tuple[str, ...] = ("visual.", "model.visual.")

    def encoder_class(self) -> type[VisionEncoder]:
        module, _, attribute = self.encoder.partition(":")
        cls: type[VisionEncoder] = getattr(importlib.import_module(module), attribute)
        return cls


_FAMILIES = {
    family.name: family
    for family in (
        Family("qwen2_vl", "encoder_svc.models.qwen2_vl:Qwen2VLEncoder"),
        Family("qwen2_5_vl", "encoder_svc.models.qwen2_5_vl:Qwen25VLEncoder"),
        Family("qwen3_vl", "encoder_svc.models.qwen3_vl:Qwen3VLEncoder"),
    )
}


def family_names() -> tuple[str, ...]:
    return tuple(_FAMILIES)


def find_family(model_type: object, where: str) -> Family:
    """The family of a checkpoint's ``model_type``.

    Raises:
        CheckpointError: not one that is served.
    """
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not an architecture that is served. Served: {', '.join(_FAMILIES)}."
        )
    return family
