"""Writes checkpoints with seeded random weights, in Hugging Face's format, for those who have no weights at hand.

``tiny`` is a complete model of a few MB: vision tower, LM, byte-level tokenizer. ``real`` has the vision dimensions of
the 7B and 8B checkpoints, with an LM of three narrow layers so that the whole still fits a small machine.

The tensors' names and shapes are those of transformers' own classes, so that a checkpoint made here tests ours.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from encoder_svc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

Size = Literal["tiny", "real"]
SIZES: tuple[Size, ...] = ("tiny", "real")

_SHARD_BYTES = 2 * 2**30

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_NUM_BYTES = 256
_TOKEN_ID = {token: _NUM_BYTES + index for index, token in enumerate(SPECIAL_TOKENS)}
_VOCAB_SIZE = _NUM_BYTES + len(SPECIAL_TOKENS)

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _qwen2_vl_vision(size: Size, out: int) -> dict[str, Any]:
    dimensions = {"tiny": {"depth": 4, "embed_dim": 64, "num_heads": 4}, "real": {"depth": 32, "embed_dim": 1280}}
    return {"num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "hidden_size": out} | dimensions[size]


def _qwen2_5_vl_vision(size: Size, out: int) -> dict[str, Any]:
    dimensions: dict[Size, dict[str, Any]] = {
        "tiny": {
            "depth": 4,
            "hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 172,
            "fullatt_block_indexes": [1, 3],
        },
        "real": {
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }
    return {"patch_size": 14, "window_size": 112, "hidden_act": "silu", "out_hidden_size": out} | dimensions[size]


def _qwen3_vl_vision(size: Size, out: int) -> dict[str, Any]:
    dimensions: dict[Size, dict[str, Any]] = {
        "tiny": {
            "depth": 4,
            "hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 172,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        "real": {
            "depth": 27,
            "hidden_size": 1152,
            "num_heads": 16,
            "intermediate_size": 4304,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    }
    common = {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "out_hidden_size": out}
    return common | dimensions[size]


_OUT_HIDDEN_SIZE: dict[Size, dict[str, int]] = {
    "tiny": {"qwen2_vl": 64, "qwen2_5_vl": 64, "qwen3_vl": 64},
    "real": {"qwen2_vl": 3584, "qwen2_5_vl": 3584, "qwen3_vl": 4096},
}
_VISION: dict[str, Callable[[Size, int], dict[str, Any]]] = {
    "qwen2_vl": _qwen2_vl_vision,
    "qwen2_5_vl": _qwen2_5_vl_vision,
    "qwen3_vl": _qwen3_vl_vision,
}
_PREFIX = {"qwen2_vl": "visual.", "qwen2_5_vl": "visual.", "qwen3_vl": "model.visual."}
"""Where the hub's checkpoints of each family keep the tower."""

_MAX_SEED = 2**63 - 1  # torch's generators take no more

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def make_checkpoint(
    folder: Path,
    *,
    family: str,
    size: Size = "tiny",
    vision_only: bool = False,
    dtype: str = "float32",
    depth: int | None = None,
    seed: int = 0,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes a checkpoint into ``folder``, which is made if need be.

    Args:
        family: ``qwen2_vl``, ``qwen2_5_vl`` or ``qwen3_vl``.
        depth: vision layers, in place of the size's own; those that are special keep their places.
        vision_only: leave out the LM's weights and the tokenizer.
        seed: from 0; the same seed, family, size and dtype give the same bytes.
        shard_bytes: weights beyond this many bytes go into several files with an index.

    Raises:
        ConfigError: the folder holds something already or cannot be written, or an argument is not one of those named.
    """
    if family not in _VISION or size not in SIZES or dtype not in _DTYPES:
        raise ConfigError(f"No such checkpoint: family {family}, size {size}, dtype {dtype}.")
    if not 0 <= seed <= _MAX_SEED:
        raise ConfigError(f"The seed must be a whole number from 0 to 2^63 - 1, not {seed}.")
    config = _model_config(family, size, dtype, depth)
    with torch.device("meta"):
        model = _model_class(family)(config)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists and is not an empty folder; name another.")
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(folder, _random_tensors(model, family, vision_only, _DTYPES[dtype], seed), shard_bytes)
        _write_texts(folder, config, family=family, size=size, vision_only=vision_only)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be written ({error.strerror}).") from None
    except SafetensorError as error:
        raise ConfigError(f"{folder}: cannot be written ({error}).") from None


def _write_texts(folder: Path, config: PreTrainedConfig, *, family: str, size: Size, vision_only: bool) -> None:
    _write_json(folder / "config.json", _config_json(config, family))
    _write_json(folder / "preprocessor_config.json", _preprocessor(family, size))
    if not vision_only:
        _write_json(folder / "generation_config.json", {"eos_token_id": _TOKEN_ID["<|im_end|>"], "do_sample": False})
        _write_tokenizer(folder)


def _model_config(family: str, size: Size, dtype: str, depth: int | None = None) -> PreTrainedConfig:
    from transformers import AutoConfig

    hidden = _OUT_HIDDEN_SIZE[size][family]
    vision = _VISION[family](size, hidden)
    if depth is not None:
        vision["depth"] = depth
        for layers in vision.keys() & {"fullatt_block_indexes", "deepstack_visual_indexes"}:
            vision[layers] = [layer for layer in vision[layers] if layer < depth]
    head_dim = 16 if size == "tiny" else 128
    spatial = 3 * head_dim // 16
    text: dict[str, Any] = {
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 128 if size == "tiny" else 512,
        "num_hidden_layers": 4 if size == "tiny" else 3,
        "num_attention_heads": hidden // head_dim,
        "num_key_value_heads": 2 if size == "tiny" else 4,
        "max_position_embeddings": 32_768,
        "bos_token_id": _TOKEN_ID["<|endoftext|>"],
        "eos_token_id": _TOKEN_ID["<|im_end|>"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [head_dim // 2 - 2 * spatial, spatial, spatial],
        },
    }
    if family == "qwen3_vl":
        text["head_dim"] = head_dim
    return AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=vision,
        image_token_id=_TOKEN_ID["<|image_pad|>"],
        video_token_id=_TOKEN_ID["<|video_pad|>"],
        vision_start_token_id=_TOKEN_ID["<|vision_start|>"],
        vision_end_token_id=_TOKEN_ID["<|vision_end|>"],
        dtype=dtype,
    )


def _model_class(family: str) -> type[PreTrainedModel]:
    from transformers import (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLForConditionalGeneration,
        Qwen3VLForConditionalGeneration,
    )

    classes: dict[str, type[PreTrainedModel]] = {
        "qwen2_vl": Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": Qwen3VLForConditionalGeneration,
    }
    return classes[family]


def _random_tensors(
    model: PreTrainedModel, family: str, vision_only: bool, dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter under its name in the hub's layout, one at a time.

    Matrices keep the variance of what passes through; norms and biases are off their neutral values, so that a test
    on these weights notices when one is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_vision = name.startswith("model.visual.")
        if vision_only and not is_vision:
            continue
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            fan_in = parameter[0].numel() if "embed_tokens" not in name and "pos_embed" not in name else 1
            values *= fan_in**-0.5
        elif name.endswith("bias"):
            values *= 0.1
        else:
            values = 1.0 + 0.1 * values
        yield _hub_name(name, family), values.to(dtype)


def _hub_name(name: str, family: str) -> str:
    if name.startswith("model.visual."):
        return _PREFIX[family] + name.removeprefix("model.visual.")
    if family != "qwen3_vl":
        return name.replace("model.language_model.", "model.", 1)
    return name


def _write_weights(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], shard_bytes: int) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}.safetensors"
        path.touch()
        mode = path.stat().st_mode
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors leaves a file that its owner alone may read, whatever the umask says
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        filename = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}.safetensors").rename(folder / filename)
        weight_map |= dict.fromkeys(names, filename)
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    )


def _config_json(config: PreTrainedConfig, family: str) -> dict[str, Any]:
    values: dict[str, Any] = config.to_dict()
    values["architectures"] = [_model_class(family).__name__]
    return values


def _preprocessor(family: str, size: Size) -> dict[str, Any]:
    """The two spellings of the pixel bounds, as the families' own checkpoints have them."""
    patch = 16 if family == "qwen3_vl" else 14
    common: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    if family == "qwen3_vl":
        bounds: dict[str, Any] = {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
        colours = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
        if size == "tiny":
            bounds = {"size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 256 * 32 * 32}}
    else:
        bounds = {"min_pixels": 3_136, "max_pixels": 12_845_056 if size == "real" else 256 * 28 * 28}
        colours = {
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
    return common | bounds | colours


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes and Qwen's special tokens: enough to read and write any text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "chat_template": _CHAT_TEMPLATE,
        },
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
