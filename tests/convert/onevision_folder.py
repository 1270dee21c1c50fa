"""Tiny random LLaVA-OneVision folders, complete as transformers publishes them, and what transformers replies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests import torch_weights
from tests.convert.conftest import torch, transformers
from vr_jax.data.demo.tokenizer import demo_tokenizer

SYSTEM = "You are a helpful assistant."


def image_file(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """Writes a smooth random image, which resampling filters treat differently."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_folder(
    directory: Path,
    *,
    vision: dict[str, Any],
    text: dict[str, Any],
    grids: Sequence[tuple[int, int]],
    processor: dict[str, Any],
    generation: dict[str, Any] | None,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Writes config, weights, tokenizer, preprocessor and generation settings of a random model.

    Args:
        directory: The folder to write.
        vision: Fields of the encoder's config.
        text: Fields of the decoder's config.
        grids: The grids (rows, columns) of tiles.
        processor: Fields of preprocessor_config.json beside the size and the grids.
        generation: The content of generation_config.json, or None for no such file.
        changes: Further fields of the whole config.
    """
    tokenizer = demo_tokenizer()
    added = [transformers.AddedToken(name, special=True, normalized=False) for name in ("<image>", "<video>")]
    tokenizer.add_tokens(added, special_tokens=True)
    side = vision["image_size"]
    pinpoints = [[side * rows, side * columns] for rows, columns in grids]
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**vision, vision_use_head=False).to_dict(),
        text_config=transformers.Qwen2Config(**text, vocab_size=len(tokenizer) + 3).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=text["tie_word_embeddings"],
        **(changes or {}),
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    torch_weights.randomize(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    file = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": side, "width": side},
        "image_grid_pinpoints": pinpoints,
        **processor,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(file))
    (directory / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


class Reference:
    """transformers' own model, tokenizer and image processor of a folder."""

    def __init__(self, directory: Path):
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        self.model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(directory).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.processor = LlavaOnevisionImageProcessorPil.from_pretrained(directory)

    def tokens(self, question: str, images: Sequence[Path], max_new_tokens: int, **options: Any) -> list[int]:
        """The greedy reply to a question in ChatML, as ids."""
        marks = " ".join(["<image>"] * len(images)) + ("\n" if images else "")
        prompt = (
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{marks}{question}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        inputs: dict[str, Any] = {}
        lengths = iter(())
        if images:
            opened = [Image.open(image).convert("RGB") for image in images]
            inputs = dict(self.processor([opened], return_tensors="pt"))
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            with torch.no_grad():
                features = self.model.get_image_features(**inputs).pooler_output
            lengths = iter([len(one) for one in features])
        image = self.model.config.image_token_id
        expanded = [token for one in ids for token in ([image] * next(lengths) if one == image else [one])]
        inputs["input_ids"] = torch.tensor([expanded])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **options)
        return output[0, len(expanded) :].tolist()

    def reply(self, question: str, images: Sequence[Path], max_new_tokens: int, **options: Any) -> str:
        """The text of the reply."""
        tokens = self.tokens(question, images, max_new_tokens, **options)
        ends = self.model.generation_config.eos_token_id
        if tokens[-1] in (ends if isinstance(ends, list) else [ends]):
            tokens = tokens[:-1]
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
