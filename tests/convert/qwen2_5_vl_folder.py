"""Tiny random folders of Qwen2.5-VL, complete as transformers publishes them, and what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests import torch_weights
from tests.convert.conftest import torch, transformers
from vr_jax.convert.chat_template import CHAT_TEMPLATES
from vr_jax.data.demo.tokenizer import demo_tokenizer

TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# Windows of 3 x 3 cells of 2 x 2 patches, one layer of full attention between windowed ones.
VISION = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_heads": 2,
    "patch_size": 6,
    "window_size": 36,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 32,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
PROCESSOR = {"min_pixels": 24 * 24, "max_pixels": 9000, "patch_size": 6}


def tokenizer() -> Any:
    """A small byte-level tokenizer with the tokens of Qwen2.5-VL."""
    made = demo_tokenizer()
    added = [transformers.AddedToken(name, special=True, normalized=False) for name in TOKENS]
    made.add_tokens(added, special_tokens=True)
    return made


def config(text: Any, *, tied: bool = True, **changes: Any) -> Any:
    """The config of transformers for a tokenizer."""
    ids = dict(zip(TOKENS, text.convert_tokens_to_ids(list(TOKENS)), strict=True))
    return transformers.Qwen2_5_VLConfig(
        vision_config=VISION | changes.pop("vision", {}),
        text_config=TEXT | {"vocab_size": len(text) + 2} | changes.pop("text", {}),
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=tied,
        **changes,
    )


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json in the form of the released files: the decoder's fields beside `vision_config`."""
    text = dict(values.pop("text_config"))
    rope = dict(text.pop("rope_parameters"))
    for name in ("model_type", "layer_types", "dtype"):
        text.pop(name, None)
    vision = dict(values["vision_config"], model_type="qwen2_5_vl", in_chans=3, spatial_patch_size=6)
    del vision["rope_parameters"]
    return {
        **text,
        **values,
        "vision_config": vision,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "vision_token_id": 1,
        "sliding_window": 32768,
        "max_window_layers": 70,
        "transformers_version": "4.41.2",
    }


def write_folder(
    directory: Path, *, tied: bool = True, released: bool = False, generation: dict[str, Any] | None = None
) -> Path:
    """Writes config, weights, tokenizer, preprocessor and generation settings of a random model.

    Args:
        directory: The folder to write.
        tied: Whether the output matrix is the embedding.
        released: Whether config.json has the form of the released files.
        generation: The content of generation_config.json beside the end of a reply.
    """
    text = tokenizer()
    model = transformers.Qwen2_5_VLForConditionalGeneration(config(text, tied=tied)).eval()
    torch_weights.randomize(model)
    model.save_pretrained(directory)
    text.save_pretrained(directory)
    if released:
        path = directory / "config.json"
        path.write_text(json.dumps(flat(json.loads(path.read_text()))))
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", **PROCESSOR}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATES["qwen2_vl"]}))
    settings = {"eos_token_id": [text.eos_token_id, text.pad_token_id], "pad_token_id": text.pad_token_id}
    (directory / "generation_config.json").write_text(json.dumps(settings | (generation or {})))
    return directory


def image_file(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """Writes a smooth random image, which resampling filters treat differently."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


class _StillProcessor(transformers.Qwen2_5_VLProcessor):
    """The processor without the part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accepts that there is no processor of videos."""
        return type(argument)


class Reference:
    """transformers' own model and processor of a folder."""

    def __init__(self, directory: Path):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(directory).eval()
        self.processor = _StillProcessor(
            image_processor=Qwen2VLImageProcessorPil.from_pretrained(directory),
            tokenizer=transformers.AutoTokenizer.from_pretrained(directory),
            video_processor=None,
            chat_template=CHAT_TEMPLATES["qwen2_vl"],
        )

    def inputs(self, asked: Sequence[tuple[str, Sequence[Path]]]) -> dict[str, Any]:
        """The processor's output for a batch of questions with their images in front, padded at the left."""
        texts = []
        for text, images in asked:
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(messages, add_generation_prompt=True))
        images = [[Image.open(image).convert("RGB") for image in images] for _, images in asked]
        given = {"images": images} if any(images) else {}
        return dict(self.processor(text=texts, **given, padding=True, padding_side="left", return_tensors="pt"))

    def positions(self, inputs: dict[str, Any]) -> np.ndarray:
        """The three axes of rotary positions (3, B, N)."""
        found, _ = self.model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            attention_mask=inputs["attention_mask"],
        )
        return found.numpy()

    def logits(self, inputs: dict[str, Any]) -> np.ndarray:
        """The logits of every token."""
        with torch.no_grad():
            return self.model(**inputs).logits.float().numpy()

    def tokens(self, inputs: dict[str, Any], new: int, **options: Any) -> np.ndarray:
        """The greedy replies, as ids."""
        with torch.no_grad():
            output = self.model.generate(**inputs, max_new_tokens=new, do_sample=False, **options)
        return output[:, inputs["input_ids"].shape[1] :].numpy()
