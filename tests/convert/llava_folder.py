"""Tiny random folders of LLaVA-1.5 and LLaVA-NeXT, complete as transformers saves them, and what transformers makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests import torch_weights
from tests.convert.conftest import torch, transformers
from tests.data.prompts.small_tokenizers import CHATML, byte_level, sentencepiece
from vr_jax.convert.chat_template import CHAT_TEMPLATES

SIDE, PATCH = 24, 4
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]  # (height, width)
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_IMAGES = "{% for part in message['content'] if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
_TEXTS = "{% for part in message['content'] if part.type == 'text' %}{{ part.text }}{% endfor %}"
# Those of llava-hf/llava-1.5-7b-hf and llava-hf/llava-v1.6-mistral-7b-hf, shortened where they do the same.
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    + _IMAGES
    + _TEXTS
    + "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    + _IMAGES
    + _TEXTS
    + "{{ ' [/INST]' }}{% else %}{{ ' ' }}"
    + _TEXTS
    + "{{ '</s>' }}{% endif %}{% endfor %}"
)
# By decoder: its config class, fields of its config, its tokenizer, and its chat template.
DECODERS: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "llama": ("LlamaConfig", {"rms_norm_eps": 1e-5}, lambda: sentencepiece("normalizer"), VICUNA),
    "mistral": (
        "MistralConfig",
        {"sliding_window": None, "head_dim": 8, "rms_norm_eps": 1e-5},
        lambda: sentencepiece("first"),
        MISTRAL,
    ),
    "qwen2": (
        "Qwen2Config",
        {"rope_theta": 1e6, "eos_token_id": None},
        lambda: byte_level(CHATML, pad="<|endoftext|>", eos="<|im_end|>"),
        CHAT_TEMPLATES["qwen_1_5"],
    ),
    "qwen3": (
        "Qwen3Config",
        {"head_dim": 8, "eos_token_id": None, "tie_word_embeddings": True},
        lambda: byte_level(CHATML, pad="<|endoftext|>", eos="<|im_end|>"),
        CHAT_TEMPLATES["qwen_1_5"],
    ),
}


@dataclass(frozen=True)
class Case:
    """A kind of folder.

    Attributes:
        kind: "Llava" or "LlavaNext".
        vision: "clip" or "siglip".
        decoder: A key of `DECODERS`.
        images: How LLaVA-1.5 makes one tile: "crop", "pad" or "square".
    """

    kind: str
    vision: str
    decoder: str
    images: str = "crop"


def text_config(decoder: str, vocab_size: int) -> Any:
    """A tiny config of transformers of a decoder."""
    name, fields, _, _ = DECODERS[decoder]
    return getattr(transformers, name)(**TEXT, **fields, vocab_size=vocab_size)


def write_folder(directory: Path, case: Case) -> Path:
    """Saves a random model and its processor with transformers' own `save_pretrained`."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    _, _, make_tokenizer, template = DECODERS[case.decoder]
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([transformers.AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    clip = case.vision == "clip"
    select, extra = ("default", 1) if clip else ("full", 0)
    vision = transformers.CLIPVisionConfig(**TOWER) if clip else transformers.SiglipVisionConfig(**TOWER)
    text = text_config(case.decoder, len(tokenizer) + 3)
    config = getattr(transformers, f"{case.kind}Config")(
        vision_config=vision.to_dict() | ({} if clip else {"vision_use_head": False}),
        text_config=text.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=select,
        tie_word_embeddings=text.tie_word_embeddings,
        **({"image_grid_pinpoints": PINPOINTS} if case.kind == "LlavaNext" else {}),
    )
    model = getattr(transformers, f"{case.kind}ForConditionalGeneration")(config).eval()
    torch_weights.randomize(model, scale=0.3)  # large enough that replies to images differ
    model.generation_config = transformers.GenerationConfig(eos_token_id=None)
    model.save_pretrained(directory)
    square = {"height": SIDE, "width": SIDE}
    if case.kind == "LlavaNext":
        images: Any = LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=PINPOINTS
        )
    elif case.images == "crop":
        images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
    elif case.images == "pad":
        images = LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square, do_pad=True)
    else:
        images = SiglipImageProcessorPil(size=square)
    processor = getattr(transformers, f"{case.kind}Processor")(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=extra,
        chat_template=template,
    )
    processor.save_pretrained(directory)
    return directory


def images(sizes: tuple[tuple[int, int], ...]) -> list[Image.Image]:
    """Smooth random images of some sizes (width, height)."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for size in sizes
    ]


@dataclass(frozen=True)
class Answer:
    """What transformers makes of a question.

    Attributes:
        ids: The ids of the prompt, with the image token in place of vision tokens.
        pixels: The normalised tiles (T, 3, H, W), or None without images.
        logits: The logits of every position.
        greedy: The greedy reply.
    """

    ids: list[int]
    pixels: np.ndarray | None
    logits: np.ndarray
    greedy: list[int]


class Reference:
    """transformers' own model and processor of a folder."""

    def __init__(self, directory: Path):
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(directory).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(directory)

    @torch.no_grad()
    def answer(self, question: str, sizes: tuple[tuple[int, int], ...], new_tokens: int) -> Answer:
        """Asks a question about images of some sizes."""
        content = [{"type": "image", "image": image} for image in images(sizes)]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        pixels = inputs.get("pixel_values")
        output = self.model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return Answer(
            ids=inputs["input_ids"][0].tolist(),
            pixels=None if pixels is None else pixels.reshape(-1, *pixels.shape[-3:]).numpy(),
            logits=self.model(**inputs).logits[0].numpy(),
            greedy=output[0, inputs["input_ids"].shape[1] :].tolist(),
        )
