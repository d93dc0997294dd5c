"""The vision tower's tensors of a checkpoint. Only safetensors is read; only the shards that hold vision tensors are
opened (or downloaded), and of those only the vision tensors are read, each straight to the device and dtype."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from encoder_svc.errors import CheckpointError
from encoder_svc.models.checkpoint_files import unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from encoder_svc.models.base import VisionEncoder
    from encoder_svc.models.checkpoint_files import CheckpointFiles

    Progress = Callable[[Iterable[str], int], Iterable[str]]
    """Wraps the tensor names that are about to be read, given their number; a progress bar, say."""

_FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class Weights:
    """A vision tower's tensors on its device.

    Attributes:
        tensors: by their names in the tower, of the checkpoint's shapes.
        revision: the hub's commit, or ``sha256:`` and 64 hex digits over a folder's vision tensors.
    """

    tensors: Mapping[str, torch.Tensor]
    revision: str

    def give_to(self, encoder_on_meta: VisionEncoder) -> None:
        """Makes them the parameters of ``encoder_on_meta``, whose own are on the meta device."""
        for name, parameter in list(encoder_on_meta.named_parameters()):
            _set_parameter(encoder_on_meta, name, self.tensors[name].reshape(parameter.shape))


def read_weights(
    files: CheckpointFiles,
    tower_prefixes: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> Weights:
    """See :meth:`encoder_svc.models.checkpoint.Checkpoint.read_weights`."""
    tensors = _vision_tensors(files, tower_prefixes, shapes)
    digest = hashlib.sha256()
    names = sorted(tensors)
    loaded: dict[str, torch.Tensor] = {}
    for name in progress(names, len(names)) if progress else names:
        stored = tensors[name].read()
        if files.commit is None:
            digest.update(f"{name}:{stored.dtype}:{tuple(stored.shape)};".encode())
            digest.update(stored.contiguous().flatten().view(torch.uint8).numpy().data)
        loaded[name] = stored.to(device=device, dtype=dtype, copy=True)
    return Weights(loaded, files.commit or f"sha256:{digest.hexdigest()}")


def _vision_tensors(
    files: CheckpointFiles, tower_prefixes: Sequence[str], wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, _StoredTensor]:
    found = _find_tower(files, tower_prefixes)
    _refuse_difference(files, "lacks vision tensors", wanted.keys() - found.keys())
    _refuse_difference(files, "has vision tensors that its config does not account for", found.keys() - wanted.keys())
    for name, tensor in found.items():
        shape, dtype = tensor.describe()
        if shape != wanted[name]:
            raise CheckpointError(
                f"{files.name}: tensor {tensor.name} has shape {list(shape)}; its config makes it {list(wanted[name])}."
            )
        if dtype not in _FLOAT_DTYPES:
            raise CheckpointError(f"{files.name}: tensor {tensor.name} is {dtype}; quantised towers are not served.")
    return found


def _find_tower(files: CheckpointFiles, prefixes: Sequence[str]) -> dict[str, _StoredTensor]:
    """The tower's tensors by their name within it."""
    index = _tensor_index(files)
    for prefix in prefixes:
        shards = {name: shard for name, shard in index.items() if name.startswith(prefix)}
        if shards:
            paths = {shard: _weight_file(files, shard) for shard in sorted(set(shards.values()))}
            return {name.removeprefix(prefix): _StoredTensor(paths[shard], name) for name, shard in shards.items()}
    either = " or ".join(f"{p}*" for p in prefixes)
    raise CheckpointError(f"{files.name}: holds no vision tower (no tensor named {either}).")


def _refuse_difference(files: CheckpointFiles, what: str, names: Iterable[str]) -> None:
    ordered = sorted(names)
    if ordered:
        more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
        raise CheckpointError(f"{files.name}: {what}: {', '.join(ordered[:5])}{more}.")


def _tensor_index(files: CheckpointFiles) -> dict[str, str]:
    """Each tensor's name and the file that holds it."""
    index = files.read_json("model.safetensors.index.json")
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{files.name}: model.safetensors.index.json has no weight_map of file names.")
        return weight_map
    with _open_weights(_weight_file(files, "model.safetensors")) as weights:
        return dict.fromkeys(weights.keys(), "model.safetensors")


def _weight_file(files: CheckpointFiles, filename: str) -> Path:
    is_plain_name = Path(filename).name == filename and filename not in ("", "..")
    path = files.path(filename) if is_plain_name else None
    if path is None:
        raise CheckpointError(f"{files.name}: lacks {filename}. Only safetensors is read, never pickled weights.")
    return path


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    path: Path
    name: str

    def describe(self) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors' name of the dtype, from the file's header alone."""
        with _open_weights(self.path) as weights:
            if self.name not in weights.keys():  # noqa: SIM118 - not a dict
                raise CheckpointError(f"{self.path.name}: lacks {self.name}, which the index says it holds.")
            entry = weights.get_slice(self.name)
            return tuple(entry.get_shape()), str(entry.get_dtype())

    def read(self) -> torch.Tensor:
        with _open_weights(self.path) as weights:
            tensor: torch.Tensor = weights.get_tensor(self.name)
            return tensor


def _open_weights(path: Path) -> Any:
    try:
        path.open("rb").close()  # safetensors' own errors do not say why a file cannot be opened
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name}: not a readable safetensors file; it is damaged or incomplete.") from error


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner_name, _, attribute = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    setattr(owner, attribute, nn.Parameter(value, requires_grad=False))
