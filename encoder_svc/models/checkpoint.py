"""Reads checkpoints in Hugging Face's format: a local folder, or a hub id.

Only safetensors is read. Only the shards that hold vision tensors are opened (or downloaded), and of those only the
vision tensors are read, each straight to the device and dtype.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from encoder_svc.errors import CheckpointError
from encoder_svc.images.processor import ProcessorSettings
from encoder_svc.models.base import ConfigReader
from encoder_svc.models.registry import find_workflow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from encoder_svc.images.resize import ImageProcessing, ResizeFlavour
    from encoder_svc.models.base import VisionConfig, VisionEncoder

    Progress = Callable[[Iterable[str], int], Iterable[str]]
    """Wraps the tensor names that are about to be read, given their number; a progress bar, say."""

# transformers' defaults (Qwen2VLImageProcessor), for preprocessor configs that leave them out.
_DEFAULT_MIN_PIXELS = 56 * 56
_DEFAULT_MAX_PIXELS = 28 * 28 * 1280
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3

_FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")


class Checkpoint:
    """A checkpoint whose configs were read and whose weights were not.

    Attributes:
        name: the hub id, or the folder's name.
        commit: the hub's commit; None for a folder.
        workflow: the modules that its family needs.
        config: the vision tower's dimensions.
    """

    def __init__(self, model: str, *, revision: str | None = None) -> None:
        """
        Args:
            model: a folder, or a hub id such as ``Qwen/Qwen2.5-VL-7B-Instruct``.
            revision: branch, tag or commit of a hub id.

        Raises:
            CheckpointError: not found, no vision tower, or an architecture that is not served.
        """
        self._files: _Files = _Folder(Path(model)) if _is_folder(Path(model)) else _Hub(model, revision)
        self.name = self._files.name
        self.commit = self._files.commit
        config = self._files.read_json("config.json")
        if config is None:
            raise CheckpointError(f"{model}: has no config.json.")
        self.workflow = find_workflow(config.get("model_type"), f"{model}/config.json")
        vision_config = config.get("vision_config")
        if not isinstance(vision_config, dict):
            raise CheckpointError(f"{model}: config.json has no vision_config; this checkpoint has no vision tower.")
        self.config: VisionConfig = self.workflow.load_encoder().read_config(
            ConfigReader(vision_config, f"{model}/config.json: vision_config")
        )

    def processor_settings(
        self,
        *,
        resize: ResizeFlavour,
        image_processing: ImageProcessing = "host",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> ProcessorSettings:
        """How this checkpoint wants its images, from preprocessor_config.json (or processor_config.json).

        Args:
            resize, image_processing: the operator's choices of numerics and place.
            min_pixels, max_pixels: the operator's own bounds in place of the checkpoint's.

        Raises:
            CheckpointError: no such file, or it asks for processing that is not done here.
        """
        reader = self._preprocessor_reader()
        self._check_processing(reader)
        size = reader.section("size")
        low = min_pixels or reader.get("min_pixels", int, 0)
        low = low or size.get("shortest_edge", int, 0) or size.get("min_pixels", int, _DEFAULT_MIN_PIXELS)
        high = max_pixels or reader.get("max_pixels", int, 0)
        high = high or size.get("longest_edge", int, 0) or size.get("max_pixels", int, _DEFAULT_MAX_PIXELS)
        settings = ProcessorSettings(
            patch_size=self.config.patch_size,
            temporal_patch_size=self.config.temporal_patch_size,
            merge_size=self.config.spatial_merge_size,
            min_pixels=low,
            max_pixels=high,
            image_mean=reader.floats("image_mean", _CLIP_MEAN),
            image_std=reader.floats("image_std", _CLIP_STD),
            resize=resize,
            image_processing=image_processing,
        )
        if not settings.factor**2 <= settings.max_pixels or settings.min_pixels > settings.max_pixels:
            raise CheckpointError(
                f"{self.name}: min_pixels {settings.min_pixels} and max_pixels {settings.max_pixels} leave no size: "
                f"max_pixels must be at least min_pixels and {settings.factor}²."
            )
        if not len(settings.image_mean) == len(settings.image_std) == self.config.in_channels == 3:
            raise CheckpointError(f"{self.name}: image_mean, image_std and in_channels must each speak of 3 channels.")
        if min(settings.image_std) <= 0:
            raise CheckpointError(f"{reader.where}: image_std is {list(settings.image_std)}, not positive numbers.")
        return settings

    def _preprocessor_reader(self) -> ConfigReader:
        values = self._files.read_json("preprocessor_config.json")
        if values is not None:
            return ConfigReader(values, f"{self.name}/preprocessor_config.json")
        values = self._files.read_json("processor_config.json")
        if values is not None and "image_processor" in values:
            return ConfigReader(values, f"{self.name}/processor_config.json").section("image_processor")
        raise CheckpointError(
            f"{self.name}: has neither preprocessor_config.json nor processor_config.json with an image_processor."
        )

    def _check_processing(self, reader: ConfigReader) -> None:
        ours = {
            "patch_size": self.config.patch_size,
            "temporal_patch_size": self.config.temporal_patch_size,
            "merge_size": self.config.spatial_merge_size,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "resample": _BICUBIC,
        }
        for key, wanted in ours.items():
            value = reader.get(key, type(wanted), wanted)
            if value != wanted:
                raise CheckpointError(f"{reader.where}: {key} is {value!r}; only {wanted!r} is served.")
        if abs(reader.get("rescale_factor", float, 1 / 255) * 255 - 1) > 1e-6:
            raise CheckpointError(f"{reader.where}: rescale_factor is not 1/255.")

    def read_weights(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> Weights:
        """Reads the vision tower's tensors, each straight to the device and dtype.

        Args:
            shapes: of every tensor by its name in the tower; see :meth:`VisionEncoder.checkpoint_shapes`.

        Raises:
            CheckpointError: names each tensor that is missing, surplus, of the wrong shape or not floating point.
        """
        tensors = self._vision_tensors(shapes)
        digest = hashlib.sha256()
        names = sorted(tensors)
        loaded: dict[str, torch.Tensor] = {}
        for name in progress(names, len(names)) if progress else names:
            stored = tensors[name].read()
            if self.commit is None:
                digest.update(f"{name}:{stored.dtype}:{tuple(stored.shape)};".encode())
                digest.update(stored.contiguous().flatten().view(torch.uint8).numpy().data)
            loaded[name] = stored.to(device=device, dtype=dtype, copy=True)
        return Weights(loaded, self.commit or f"sha256:{digest.hexdigest()}")

    def _vision_tensors(self, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, _StoredTensor]:
        found = self._find_tower()
        self._refuse_difference("lacks vision tensors", wanted.keys() - found.keys())
        self._refuse_difference("has vision tensors that its config does not account for", found.keys() - wanted.keys())
        for name, tensor in found.items():
            shape, dtype = tensor.describe()
            if shape != wanted[name]:
                raise CheckpointError(
                    f"{self.name}: tensor {tensor.name} has shape {list(shape)}; its config makes it "
                    f"{list(wanted[name])}."
                )
            if dtype not in _FLOAT_DTYPES:
                raise CheckpointError(f"{self.name}: tensor {tensor.name} is {dtype}; quantised towers are not served.")
        return found

    def _find_tower(self) -> dict[str, _StoredTensor]:
        """The tower's tensors by their name within it."""
        index = self._files.tensor_index()
        for prefix in self.workflow.tower_prefixes:
            shards = {name: shard for name, shard in index.items() if name.startswith(prefix)}
            if shards:
                paths = {shard: self._files.weights(shard) for shard in sorted(set(shards.values()))}
                return {name.removeprefix(prefix): _StoredTensor(paths[shard], name) for name, shard in shards.items()}
        prefixes = " or ".join(f"{p}*" for p in self.workflow.tower_prefixes)
        raise CheckpointError(f"{self.name}: holds no vision tower (no tensor named {prefixes}).")

    def _refuse_difference(self, what: str, names: Iterable[str]) -> None:
        ordered = sorted(names)
        if ordered:
            more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
            raise CheckpointError(f"{self.name}: {what}: {', '.join(ordered[:5])}{more}.")


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


class _Files:
    """Where a checkpoint's files come from."""

    name: str
    commit: str | None = None

    def path(self, filename: str) -> Path | None:
        """The local path of a file; None if the checkpoint has no such file."""
        raise NotImplementedError

    def read_json(self, filename: str) -> dict[str, Any] | None:
        path = self.path(filename)
        if path is None:
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise _unreadable(path, error) from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.name}: {filename} is not readable JSON.") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.name}: {filename} is not a JSON object.")
        return values

    def tensor_index(self) -> dict[str, str]:
        """Each tensor's name and the file that holds it."""
        index = self.read_json("model.safetensors.index.json")
        if index is not None:
            weight_map = index.get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
                raise CheckpointError(f"{self.name}: model.safetensors.index.json has no weight_map of file names.")
            return weight_map
        with _open_weights(self.weights("model.safetensors")) as weights:
            return dict.fromkeys(weights.keys(), "model.safetensors")

    def weights(self, filename: str) -> Path:
        is_plain_name = Path(filename).name == filename and filename not in ("", "..")
        path = self.path(filename) if is_plain_name else None
        if path is None:
            raise CheckpointError(f"{self.name}: lacks {filename}. Only safetensors is read, never pickled weights.")
        return path


class _Folder(_Files):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = folder.resolve().name

    def path(self, filename: str) -> Path | None:
        path = self._folder / filename
        try:
            return path if path.exists() else None
        except OSError as error:
            raise _unreadable(path, error) from error


class _Hub(_Files):
    """A repository on the hub. Each file is downloaded (or found in the cache) when it is first asked for."""

    def __init__(self, repo_id: str, revision: str | None) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        self.name = repo_id
        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            raise CheckpointError(f"--model {repo_id}: neither a folder that exists nor a hub id.") from None
        self._revision = revision
        config = self.path("config.json")
        if config is not None:
            # A cached file lies in snapshots/COMMIT/; every further file comes from that very commit.
            self.commit = self._revision = config.parent.name

    def path(self, filename: str) -> Path | None:
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, filename, revision=self._revision))
        except LocalEntryNotFoundError as error:
            # Offline, the hub client does not ask its own note that this commit has no such file.
            if try_to_load_from_cache(self.name, filename, revision=self._revision) is _CACHED_NO_EXIST:
                return None
            raise self._unreachable() from error
        except EntryNotFoundError:
            return None
        except Exception as error:  # the hub client raises its HTTP library's errors as well as its own
            raise self._unreachable() from error

    def _unreachable(self) -> CheckpointError:
        revision = f" at revision {self._revision}" if self._revision else ""
        return CheckpointError(
            f"--model {self.name}: not a folder that exists, and not to be had from the hub{revision} (no such "
            "repository, no access, or no network)."
        )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error.strerror}).")


def _open_weights(path: Path) -> Any:
    try:
        path.open("rb").close()  # safetensors' own errors do not say why a file cannot be opened
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name}: not a readable safetensors file; it is damaged or incomplete.") from error


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner_name, _, attribute = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    setattr(owner, attribute, nn.Parameter(value, requires_grad=False))
