#!/usr/bin/env python3
"""The LM process of scripts/demo.py: language weights, a client, and no vision weight. Prints one JSON object."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch
from demo import chat_prompt
from transformers import AutoTokenizer
from transformers.utils import logging

from encoder_svc.client import EncoderClient
from encoder_svc.integrations.transformers import load_language_model


def main(target: str, checkpoint: str, question: str, num_tokens: str, *photos: str) -> None:
    logging.disable_progress_bar()
    with EncoderClient(target, timeout_s=60) as client:
        model = load_language_model(checkpoint, client, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        images = client.encode(photos)
        inputs = model.model.visual.generation_inputs(tokenizer, chat_prompt(tokenizer, question, len(images)), images)
        out = model.generate(**inputs, max_new_tokens=int(num_tokens), do_sample=False)
    tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
    parameters = dict(model.named_parameters())
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in parameters.values()),
                "vision_parameters": sum(p.numel() for name, p in parameters.items() if "visual" in name),
                "images": [
                    {
                        "rows": image.embeddings.shape[0],
                        "bytes": image.embeddings.nbytes,
                        "timings": {name.removesuffix("_s"): value for name, value in asdict(image.timings).items()},
                    }
                    for image in images
                ],
                "tokens": tokens,
                "text": tokenizer.decode(tokens),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
