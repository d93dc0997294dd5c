"""The service as the vision tower of a transformers model.

::

    client = EncoderClient("127.0.0.1:50051")
    model = load_language_model("Qwen/Qwen2.5-VL-7B-Instruct", client, dtype="auto")
    images = client.encode(["photo.jpg"])
    inputs = model.model.visual.generation_inputs(tokenizer, prompt, images)
    model.generate(**inputs)

The model holds no vision weight: its tower is a :class:`RemoteVisionTower`, and the checkpoint's vision tensors are
never read. What a transformers processor returns (``pixel_values``) works as well: the tower sends it to the service.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import torch
from torch import nn

from encoder_svc.client.types import PixelValues

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    from encoder_svc.client import EncodedImage, EncoderClient

IMAGE_TOKEN = "<|image_pad|>"  # noqa: S105 - Qwen-VL's placeholder token, no secret
_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class RemoteVisionTower(nn.Module):
    """Stands in place of ``model.model.visual`` of transformers' Qwen2-VL, Qwen2.5-VL and Qwen3-VL models.

    What the model passes as ``pixel_values`` may be either of two things, told apart by the number of rows:

    - patches [t * h * w, patch_dim], as a transformers processor makes them: they are sent to the service;
    - embeddings [rows, width] that came from the service before: they are used as they are.

    With embeddings, generate with one sequence a prompt: for beam search transformers multiplies ``pixel_values`` by
    their patches.

    Args:
        client: connected to a service that serves the same checkpoint. Asked once for its model info.
    """

    def __init__(self, client: EncoderClient) -> None:
        super().__init__()
        self._client = client
        self.info = client.info()
        self.spatial_merge_size = self.info.spatial_merge_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the service's embeddings; the model converts ``pixel_values`` to it."""
        return _TORCH_DTYPES[self.info.dtype]

    def forward(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """
        Args:
            hidden_states: patches or embeddings, see above.
            grid_thw: int [images, 3].

        Returns:
            ``pooler_output`` [rows, out_hidden_size], and with deepstack ``deepstack_features``, one such tensor for
            each level; on the device of ``hidden_states``.

        Raises:
            ValueError: neither patches nor embeddings that fit ``grid_thw``.
            RequestError: the service refused or failed.
        """
        patches = [int(t * h * w) for t, h, w in grid_thw.tolist()]
        rows = sum(patches) // self.spatial_merge_size**2
        if hidden_states.shape[0] == sum(patches):
            parts = zip(hidden_states.split(patches), grid_thw.tolist(), strict=True)
            encoded = self._client.encode([PixelValues(_to_numpy(part), tuple(grid)) for part, grid in parts])
            embeddings = torch.cat([image.torch() for image in encoded]).to(hidden_states.device)
        elif tuple(hidden_states.shape) == (rows, self.info.width):
            embeddings = hidden_states
        else:
            raise ValueError(
                f"pixel_values of shape {list(hidden_states.shape)} are neither {sum(patches)} patches nor {rows} rows "
                f"of {self.info.width} embedding values, as image_grid_thw wants."
            )
        return self._output(embeddings)

    def generation_inputs(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, images: Sequence[EncodedImage]
    ) -> dict[str, torch.Tensor]:
        """Everything that ``model.generate`` wants for one prompt with embeddings from the service.

        Args:
            prompt: with one ``<|image_pad|>`` for each image, as the chat template leaves it.
            images: in the order in which the prompt names them.

        Raises:
            ValueError: the prompt names another number of images.
        """
        pieces = prompt.split(IMAGE_TOKEN)
        if len(pieces) != len(images) + 1:
            raise ValueError(f"the prompt holds {len(pieces) - 1} {IMAGE_TOKEN}, but {len(images)} images were given.")
        expanded = pieces[0] + "".join(
            IMAGE_TOKEN * image.embeddings.shape[0] + piece for image, piece in zip(images, pieces[1:], strict=True)
        )
        inputs: dict[str, torch.Tensor] = dict(tokenizer(expanded, return_tensors="pt"))
        is_image = inputs["input_ids"] == torch.tensor(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        inputs["mm_token_type_ids"] = is_image.to(torch.int32)
        if images:
            inputs["pixel_values"] = torch.cat([image.torch() for image in images])
            inputs["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
        return inputs

    def _output(self, embeddings: torch.Tensor) -> BaseModelOutputWithPooling:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        main, *levels = embeddings.split(self.info.out_hidden_size, dim=-1)
        if not levels:
            return BaseModelOutputWithPooling(pooler_output=main)
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        return BaseModelOutputWithDeepstackFeatures(pooler_output=main, deepstack_features=levels)


def load_language_model(model: str, client: EncoderClient, **kwargs: Any) -> PreTrainedModel:
    """Loads a Qwen-VL model whose vision tower is the service. Of the checkpoint only the LM's weights are read.

    Args:
        model: a folder or a hub id.
        client: connected to a service that serves the same checkpoint.
        **kwargs: for ``from_pretrained``: dtype, device_map and so on.

    Raises:
        ValueError: another family than the service's, an LM of another width, or a checkpoint without its weights.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(model)
    tower = RemoteVisionTower(client)
    if config.model_type != tower.info.family or config.text_config.hidden_size != tower.info.out_hidden_size:
        raise ValueError(
            f"{model} is a {config.model_type} of width {config.text_config.hidden_size}, but the service serves a "
            f"{tower.info.family} of width {tower.info.out_hidden_size}."
        )
    whole_class = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    loaded: PreTrainedModel
    loaded, report = _without_tower(whole_class, tower).from_pretrained(model, output_loading_info=True, **kwargs)
    if report["missing_keys"]:
        raise ValueError(f"{model} lacks weights of the language model: {sorted(report['missing_keys'])[:5]}.")
    return loaded


def _without_tower(whole_class: Any, tower: RemoteVisionTower) -> Any:
    """A subclass that takes ``tower`` in place of the vision weights.

    from_pretrained builds on the meta device, so the tower that the parent's constructor makes takes no memory; and
    tensors for which the model has no parameter are not read.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        whole_class.__init__(self, config, *args, **kwargs)
        self.model.visual = tower

    unread = [*(whole_class._keys_to_ignore_on_load_unexpected or []), r"(^|\.)visual\."]
    # transformers renames a checkpoint's tensors only for classes of its own modules.
    members = {"__init__": __init__, "__module__": whole_class.__module__, "_keys_to_ignore_on_load_unexpected": unread}
    return type(whole_class.__name__, (whole_class,), members)


def _to_numpy(values: torch.Tensor) -> np.ndarray[Any, Any]:
    host = values.detach().cpu().contiguous()
    if host.dtype == torch.bfloat16:
        return host.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    array: np.ndarray[Any, Any] = host.numpy()
    return array
