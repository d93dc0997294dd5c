from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from encoder_svc.attention import MMEncoderAttention
from encoder_svc.errors import CheckpointError
from encoder_svc.models.checkpoint import Checkpoint
from encoder_svc.models.synthetic import make_checkpoint
from encoder_svc.models.tower import TORCH_DTYPES
from encoder_svc.platforms import platform_for_device
from tests.models.towers import FAMILIES, load

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc.images.processor import ProcessorSettings
    from encoder_svc.models.base import VisionEncoder

Json = dict[str, Any]
Tensors = dict[str, torch.Tensor]

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def vision_only(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp("vision") / family for family in FAMILIES}
    for family, folder in folders.items():
        make_checkpoint(folder, family=family, vision_only=True)
    return folders


@pytest.fixture
def copy(vision_only: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A family's vision-only checkpoint, to be spoilt."""
    return lambda family="qwen2_5_vl": Path(shutil.copytree(vision_only[family], tmp_path / family))


@pytest.fixture
def sharded(tmp_path: Path) -> Callable[[str], Path]:
    """A complete checkpoint in several files."""

    def make(family: str) -> Path:
        make_checkpoint(tmp_path / family, family=family, shard_bytes=200_000)
        return tmp_path / family

    return make


def edit_json(path: Path, change: Callable[[Json], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_vision_config(folder: Path, **values: Any) -> None:
    edit_json(folder / "config.json", lambda config: config["vision_config"].update(values))


def edit_preprocessor(folder: Path, **values: Any) -> None:
    edit_json(folder / "preprocessor_config.json", lambda config: config.update(values))


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def read(folder: Path, dtype: str = "float32", progress: Any = None) -> VisionEncoder:
    """An encoder as it was read, before its weights are laid out for a device."""
    checkpoint = Checkpoint(str(folder))
    config = checkpoint.config
    attention = MMEncoderAttention(
        config.num_heads, config.head_size, platform=platform_for_device("cpu"), dtype="float32"
    )
    with torch.device("meta"):
        encoder = checkpoint.workflow.load_encoder()(config, attention)
    cpu, shapes = torch.device("cpu"), encoder.checkpoint_shapes()
    checkpoint.read_weights(shapes, device=cpu, dtype=TORCH_DTYPES[dtype], progress=progress).give_to(encoder)
    return encoder


def weights(encoder: VisionEncoder) -> Tensors:
    return dict(encoder.named_parameters())


def same_weights(one: VisionEncoder, other: VisionEncoder) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# Where the tensors are.


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_and_one_file_give_the_same_tower(
    tiny_checkpoint: Callable[[str], Path], sharded: Callable[[str], Path], family: str
) -> None:
    folder = sharded(family)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert same_weights(read(folder), read(tiny_checkpoint(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_without_vision_tensors_are_not_opened(sharded: Callable[[str], Path], family: str) -> None:
    folder = sharded(family)
    before = read(folder)
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    with_vision = {shard for name, shard in weight_map.items() if "visual." in name}
    lm_only = sorted(set(weight_map.values()) - with_vision)
    assert len(lm_only) > 1
    (folder / lm_only[0]).unlink()
    (folder / lm_only[1]).write_bytes(b"no safetensors at all")
    assert same_weights(read(folder), before)


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_is_found_under_either_prefix(copy: Callable[[str], Path], family: str, prefix: str) -> None:
    folder = copy(family)
    before = read(folder)

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name.partition("visual.")[2]] = tensors.pop(name)

    edit_tensors(folder, rename)
    assert same_weights(read(folder), before)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_tensors_are_converted_to_the_dtype_asked_for(tmp_path: Path, stored: str, wanted: str) -> None:
    make_checkpoint(tmp_path / "model", family="qwen3_vl", vision_only=True, dtype=stored)
    encoder = read(tmp_path / "model", dtype=wanted)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name, parameter in weights(encoder).items():
        expected = tensors[f"model.visual.{name}"].to(getattr(torch, wanted)).reshape(parameter.shape)
        assert torch.equal(parameter, expected), name


def test_a_float64_checkpoint_is_served(copy: Callable[..., Path]) -> None:
    folder = copy()
    before = read(folder)
    edit_tensors(folder, lambda tensors: tensors.update({name: value.double() for name, value in tensors.items()}))
    assert same_weights(read(folder), before)


def test_the_progress_callback_wraps_every_tensor(vision_only: dict[str, Path]) -> None:
    seen: list[str] = []

    def progress(names: Any, total: int) -> Any:
        for name in names:
            seen.append(name)
            yield name
        assert total == len(seen)

    encoder = read(vision_only["qwen2_vl"], progress=progress)
    assert sorted(seen) == sorted(weights(encoder))


# Tensors that are not as the config says.

SPOILT_TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop("visual.blocks.2.norm1.weight"), "lacks vision tensors: blocks.2.norm1.weight"),
    "surplus": (lambda t: t.update({"visual.extra.weight": torch.ones(2)}), "does not account for: extra.weight"),
    "wrong shape": (
        lambda t: t.update({"visual.merger.ln_q.weight": torch.ones(65)}),
        r"visual.merger.ln_q.weight has shape \[65\]; its config makes it \[64\]",
    ),
    "right size, wrong shape": (
        lambda t: t.update({"visual.patch_embed.proj.weight": torch.ones(64, 2, 3, 14, 14)}),
        r"visual.patch_embed.proj.weight has shape \[64, 2, 3, 14, 14\]",
    ),
    "integers": (
        lambda t: t.update({"visual.merger.ln_q.weight": torch.ones(64, dtype=torch.int8)}),
        "visual.merger.ln_q.weight is I8",
    ),
    "fp8": (
        lambda t: t.update({"visual.merger.ln_q.weight": torch.ones(64).to(torch.float8_e4m3fn)}),
        "visual.merger.ln_q.weight is F8_E4M3",
    ),
    "no tower": (
        lambda t: [t.pop(name) for name in list(t)] and t.update({"model.norm.weight": torch.ones(2)}),
        r"holds no vision tower \(no tensor named visual\.\* or model\.visual\.\*\)",
    ),
    "nothing": (lambda t: t.clear(), "holds no vision tower"),
}


@pytest.mark.parametrize(("spoil", "text"), SPOILT_TENSORS.values(), ids=SPOILT_TENSORS)
def test_a_tensor_that_does_not_fit_is_named(
    copy: Callable[..., Path], spoil: Callable[[Tensors], object], text: str
) -> None:
    folder = copy()
    edit_tensors(folder, spoil)
    with pytest.raises(CheckpointError, match=f"qwen2_5_vl: .*{text}"):
        load(folder)


def test_many_missing_tensors_are_counted(copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_tensors(folder, lambda t: [t.pop(name) for name in list(t) if ".blocks.3." in f".{name}"])
    with pytest.raises(CheckpointError, match=r"blocks.3.attn.proj.bias, .* and \d+ more"):
        load(folder)


# Weight files that cannot be read.


@pytest.mark.parametrize("keep", [0, 4, 200, 100_000])
def test_a_truncated_weight_file_is_named(copy: Callable[..., Path], keep: int) -> None:
    folder = copy()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        load(folder)


def test_a_missing_shard_is_named(sharded: Callable[[str], Path]) -> None:
    folder = sharded("qwen2_vl")
    shard = json.loads((folder / INDEX).read_text())["weight_map"]["visual.blocks.0.norm1.weight"]
    (folder / shard).unlink()
    with pytest.raises(CheckpointError, match=f"qwen2_vl: lacks {shard}"):
        load(folder)


def test_an_index_that_names_the_wrong_shard_is_found_out(sharded: Callable[[str], Path]) -> None:
    folder = sharded("qwen2_vl")
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    name = "visual.blocks.0.norm1.weight"
    other = next(shard for shard in weight_map.values() if shard != weight_map[name])
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: other}))
    with pytest.raises(CheckpointError, match=f"{other}: lacks {name}, which the index says it holds"):
        load(folder)


@pytest.mark.parametrize("outside", ["../model.safetensors", "sub/model.safetensors", "{absolute}", "..", ""])
def test_an_index_reads_no_file_outside_the_folder(copy: Callable[..., Path], outside: str) -> None:
    folder = copy()
    for elsewhere in (folder.parent, folder / "sub"):
        elsewhere.mkdir(exist_ok=True)
        shutil.copy(folder / "model.safetensors", elsewhere)
    shard = outside.format(absolute=folder.parent / "model.safetensors")
    names = load_file(folder / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(CheckpointError, match=f"qwen2_5_vl: lacks {shard}"):
        load(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, {"weight_map": {"visual.x": 3}}], ids=str)
def test_an_index_without_a_map_of_names_is_refused(copy: Callable[..., Path], index: Json) -> None:
    folder = copy()
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{INDEX} has no weight_map"):
        load(folder)


class _LeavesATrace:
    """Unpickling this makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_pickled_weights_are_refused_and_never_unpickled(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder, trace = copy(), tmp_path / "trace"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_LeavesATrace(trace)))
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors\. Only safetensors is read, never pickled"):
        load(folder)
    assert not trace.exists()


def test_pickled_weights_named_by_an_index_are_never_unpickled(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder, trace = copy(), tmp_path / "trace"
    names = load_file(folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_LeavesATrace(trace)))
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "pytorch_model.bin")}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load(folder)
    assert not trace.exists()


# config.json


def test_an_unknown_architecture_is_named_beside_those_served(copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_json(folder / "config.json", lambda config: config.update(model_type="llava"))
    with pytest.raises(CheckpointError, match=r"model_type 'llava' is not .* Served: qwen2_vl, qwen2_5_vl, qwen3_vl"):
        Checkpoint(str(folder))


@pytest.mark.parametrize("model_type", [None, 7, ["qwen2_vl"]])
def test_a_model_type_that_is_no_name_is_refused(copy: Callable[..., Path], model_type: object) -> None:
    folder = copy()
    edit_json(folder / "config.json", lambda config: config.update(model_type=model_type))
    with pytest.raises(CheckpointError, match="model_type"):
        Checkpoint(str(folder))


@pytest.mark.parametrize("vision_config", [None, [], "x"])
def test_a_config_without_vision_config_is_refused(copy: Callable[..., Path], vision_config: object) -> None:
    folder = copy()
    edit_json(folder / "config.json", lambda config: config.update(vision_config=vision_config))
    with pytest.raises(CheckpointError, match=r"config\.json has no vision_config"):
        Checkpoint(str(folder))


REQUIRED = {
    "qwen2_vl": ["depth", "embed_dim", "num_heads", "hidden_size", "patch_size"],
    "qwen2_5_vl": ["hidden_size", "intermediate_size", "out_hidden_size", "window_size", "fullatt_block_indexes"],
    "qwen3_vl": ["depth", "intermediate_size", "num_position_embeddings", "deepstack_visual_indexes"],
}


@pytest.mark.parametrize(("family", "key"), [(family, key) for family, keys in REQUIRED.items() for key in keys])
def test_a_missing_dimension_is_named(copy: Callable[[str], Path], family: str, key: str) -> None:
    folder = copy(family)
    edit_json(folder / "config.json", lambda config: config["vision_config"].pop(key))
    with pytest.raises(CheckpointError, match=rf"config\.json: vision_config lacks '{key}'"):
        Checkpoint(str(folder))


WRONG_VALUES: list[tuple[str, str, Any]] = [
    ("qwen2_vl", "depth", "four"),
    ("qwen2_vl", "depth", 4.0),
    ("qwen2_vl", "depth", True),
    ("qwen2_vl", "depth", 0),
    ("qwen2_vl", "patch_size", -14),
    ("qwen2_vl", "mlp_ratio", "4"),
    ("qwen2_vl", "mlp_ratio", True),
    ("qwen2_vl", "mlp_ratio", -4),
    ("qwen2_vl", "mlp_ratio", 0),
    ("qwen2_vl", "hidden_act", 3),
    ("qwen2_vl", "is_causal", "yes"),
    ("qwen2_vl", "rope_parameters", 10_000),
    ("qwen2_5_vl", "window_size", 0),
    ("qwen2_5_vl", "window_size", 27),
    ("qwen2_5_vl", "fullatt_block_indexes", 3),
    ("qwen2_5_vl", "fullatt_block_indexes", [1, 4]),
    ("qwen2_5_vl", "fullatt_block_indexes", [-1]),
    ("qwen2_5_vl", "fullatt_block_indexes", [1, 1]),
    ("qwen2_5_vl", "fullatt_block_indexes", ["1"]),
    ("qwen2_5_vl", "fullatt_block_indexes", [[1]]),
    ("qwen2_5_vl", "fullatt_block_indexes", [True]),
    ("qwen3_vl", "deepstack_visual_indexes", [0, 9]),
    ("qwen3_vl", "num_position_embeddings", 63),
]


@pytest.mark.parametrize(("family", "key", "value"), WRONG_VALUES)
def test_a_dimension_of_the_wrong_kind_is_named(copy: Callable[[str], Path], family: str, key: str, value: Any) -> None:
    folder = copy(family)
    edit_vision_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: vision_config.*'?{key}"):
        Checkpoint(str(folder))


@pytest.mark.parametrize("theta", ["10000", [1], True])
def test_a_rope_theta_that_is_no_number_is_named(copy: Callable[..., Path], theta: object) -> None:
    folder = copy()
    edit_vision_config(folder, rope_parameters={"rope_theta": theta})
    with pytest.raises(CheckpointError, match="'rope_theta'"):
        Checkpoint(str(folder))


def test_heads_that_leave_no_rotary_halves_are_refused(copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_vision_config(folder, num_heads=32)
    with pytest.raises(CheckpointError, match=r"config\.json: vision_config: hidden size 64 over 32 heads"):
        Checkpoint(str(folder))


def test_an_unknown_activation_is_refused(copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_vision_config(folder, hidden_act="relu7")
    with pytest.raises(CheckpointError, match="'relu7'"):
        load(folder)


def test_the_older_spelling_of_channels_is_read(copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_json(folder / "config.json", lambda config: config["vision_config"].pop("in_channels"))
    edit_vision_config(folder, in_chans=5)
    assert Checkpoint(str(folder)).config.in_channels == 5


@pytest.mark.parametrize("filename", ["config.json", "preprocessor_config.json", INDEX])
@pytest.mark.parametrize("text", ["{", "[1]", "\xff", ""])
def test_bad_json_is_named(copy: Callable[..., Path], filename: str, text: str) -> None:
    folder = copy()
    (folder / filename).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"qwen2_5_vl: {filename} is not (a JSON object|readable JSON)"):
        load(folder)


# Where checkpoints are.


@pytest.mark.parametrize("filename", ["config.json", "preprocessor_config.json", INDEX, "model.safetensors"])
def test_a_file_that_cannot_be_read_is_named_with_the_reason(copy: Callable[..., Path], filename: str) -> None:
    folder = copy()
    (folder / filename).unlink(missing_ok=True)
    (folder / filename).mkdir()  # as unreadable to root as to anyone
    with pytest.raises(CheckpointError) as refused:
        load(folder)
    assert str(refused.value) == f"{folder / filename}: cannot be read (Is a directory)."


@pytest.mark.parametrize("inside", ["", "made"], ids=["a folder", "a folder's folder"])
def test_a_folder_that_may_not_be_entered_is_named_with_the_reason(tmp_path: Path, inside: str) -> None:
    (tmp_path / "closed/made").mkdir(parents=True)
    tmp_path.chmod(0o755)
    code = f"""
import os
from pathlib import Path
from encoder_svc.models.checkpoint import Checkpoint, CheckpointError
os.chdir({str(tmp_path)!r})
Path("closed").chmod(0)
if os.geteuid() == 0:
    os.setuid(65534)  # root may enter everything
try:
    Checkpoint(os.path.join("closed", {inside!r}))
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    (tmp_path / "closed").chmod(0o700)
    named = "closed/made" if inside else "closed/config.json"
    assert (done.stdout, done.stderr) == (f"{named}: cannot be read (Permission denied).\n", "")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint(str(tmp_path))


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "a/b/c", "two words", ""])
def test_a_model_that_is_no_folder_and_no_hub_id_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither a folder that exists nor a hub id|no config"):
        Checkpoint(model)


# preprocessor_config.json and processor_config.json


def settings_of(folder: Path, **options: Any) -> ProcessorSettings:
    return Checkpoint(str(folder)).processor_settings(resize="torch", **options)


BOUNDS: dict[str, tuple[Json, tuple[int, int]]] = {
    "flat": ({"min_pixels": 4000, "max_pixels": 90_000}, (4000, 90_000)),
    "edges": ({"size": {"shortest_edge": 4000, "longest_edge": 90_000}}, (4000, 90_000)),
    "in size": ({"size": {"min_pixels": 4000, "max_pixels": 90_000}}, (4000, 90_000)),
    "flat before size": ({"min_pixels": 4000, "size": {"shortest_edge": 1, "longest_edge": 90_000}}, (4000, 90_000)),
    "none": ({}, (56 * 56, 28 * 28 * 1280)),
    "null": ({"min_pixels": None, "max_pixels": None, "size": None}, (56 * 56, 28 * 28 * 1280)),
}


@pytest.mark.parametrize(("values", "bounds"), BOUNDS.values(), ids=BOUNDS)
def test_every_spelling_of_the_pixel_bounds_is_read(
    copy: Callable[..., Path], values: Json, bounds: tuple[int, int]
) -> None:
    folder = copy()
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    settings = settings_of(folder)
    assert (settings.min_pixels, settings.max_pixels) == bounds


def test_an_operators_bounds_stand_before_the_checkpoints(vision_only: dict[str, Path]) -> None:
    settings = settings_of(vision_only["qwen3_vl"], min_pixels=5000, max_pixels=60_000)
    assert (settings.min_pixels, settings.max_pixels) == (5000, 60_000)


def test_processor_config_is_read_where_there_is_no_preprocessor_config(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3_vl")
    before = settings_of(folder)
    values = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert settings_of(folder) == before


@pytest.mark.parametrize("processor_config", [None, {"video_processor": {}}], ids=str)
def test_a_checkpoint_without_processor_settings_is_refused(
    copy: Callable[..., Path], processor_config: Json | None
) -> None:
    folder = copy()
    (folder / "preprocessor_config.json").unlink()
    if processor_config is not None:
        (folder / "processor_config.json").write_text(json.dumps(processor_config))
    with pytest.raises(CheckpointError, match=r"neither preprocessor_config\.json nor processor_config\.json"):
        settings_of(folder)


REFUSED_PROCESSING: list[tuple[str, Any]] = [
    ("do_resize", False),
    ("do_rescale", False),
    ("do_normalize", False),
    ("resample", 2),
    ("rescale_factor", 1 / 127.5),
    ("rescale_factor", "1/255"),
    ("patch_size", 16),
    ("merge_size", 1),
    ("temporal_patch_size", 1),
    ("image_mean", [0.5]),
    ("image_mean", 0.5),
    ("image_mean", ["a", "b", "c"]),
    ("image_std", [0.5, 0.5]),
    ("image_std", [0.5, 0.0, 0.5]),
    ("min_pixels", "many"),
    ("max_pixels", 100),
    ("size", 224),
    ("size", [224, 224]),
]


@pytest.mark.parametrize(("key", "value"), REFUSED_PROCESSING, ids=str)
def test_processing_that_is_not_done_here_is_named(copy: Callable[..., Path], key: str, value: Any) -> None:
    folder = copy()
    edit_preprocessor(folder, **{key: value})
    with pytest.raises(CheckpointError, match=f"qwen2_5_vl.*{key}"):
        settings_of(folder)


# What tells one tower from another.


def test_the_same_weights_have_the_same_revision_in_any_layout(
    sharded: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path], vision_only: dict[str, Path]
) -> None:
    folders = (sharded("qwen2_vl"), tiny_checkpoint("qwen2_vl"), vision_only["qwen2_vl"])
    revisions = {load(folder).revision for folder in folders}
    assert len(revisions) == 1
    assert revisions.pop().startswith("sha256:")


def test_one_changed_value_changes_the_revision(copy: Callable[..., Path]) -> None:
    folder = copy()
    before = load(folder)
    edit_tensors(folder, lambda tensors: tensors["visual.blocks.3.mlp.down_proj.weight"][5, 7].add_(1e-3))
    after = load(folder)
    assert before.revision != after.revision
    assert before.config_hash != after.config_hash


def test_a_changed_lm_does_not_change_the_revision(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint("qwen2_5_vl"), tmp_path / "qwen2_5_vl"))
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert load(folder).revision == load(tiny_checkpoint("qwen2_5_vl")).revision


def test_loading_twice_gives_the_same_config_hash(vision_only: dict[str, Path]) -> None:
    assert load(vision_only["qwen3_vl"]).config_hash == load(vision_only["qwen3_vl"]).config_hash


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"backend": "torch_naive"}], ids=str)
def test_the_config_hash_changes_with(vision_only: dict[str, Path], options: dict[str, str]) -> None:
    folder = vision_only["qwen2_vl"]
    assert load(folder, **options).config_hash != load(folder).config_hash


def test_the_config_hash_changes_with_what_pixels_are_normalised_by(copy: Callable[..., Path]) -> None:
    folder = copy()
    before = load(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_std": [0.25, 0.25, 0.25]}))
    assert load(folder).config_hash != before.config_hash


def test_the_config_hash_changes_with_the_causal_switch(copy: Callable[..., Path]) -> None:
    folder = copy()
    before = load(folder)
    edit_vision_config(folder, is_causal=True)
    assert load(folder).config_hash != before.config_hash
