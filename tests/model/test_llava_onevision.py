"""The whole LLaVA-OneVision against transformers: pixels and prompt in, logits and greedy tokens out.

Weights travel through a saved checkpoint and `vr_jax.convert`; images and text through `vr_jax.data`."""

import io
from dataclasses import dataclass

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AddedToken,
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from tests import torch_weights
from tests.golden.discovery import DATA_ROOT, needs_data
from tests.tiny import quick
from vr_jax.convert.importing import import_checkpoint
from vr_jax.data.collate import collate
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from vr_jax.data.types import IMAGE, Conversation, Turn
from vr_jax.model.batch import BatchShape
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model_directory import load_model

NEW_TOKENS = 6
SYSTEM = "You are a helpful assistant."
# Writes what the template published with the llava-onevision-qwen2 checkpoints writes: images before text.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Chat:
    """Turns alternate between user and assistant; `images` (width, height) belong to the user turns in order."""

    turns: tuple[str, ...]
    images: tuple[tuple[tuple[int, int], ...], ...] = ()  # per user turn

    def opened(self) -> list[Image.Image]:
        rng = np.random.default_rng(0)
        sizes = [size for turn in self.images for size in turn]
        # Smooth and structured: noise would hide resampling errors in its average.
        return [
            Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
            for size in sizes
        ]

    def messages(self) -> list[dict]:
        """For transformers."""
        out = [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]}]
        for i, text in enumerate(self.turns):
            count = len(self.images[i // 2]) if i % 2 == 0 and self.images else 0
            content = [{"type": "image"}] * count + [{"type": "text", "text": text}]
            out.append({"role": ("user", "assistant")[i % 2], "content": content})
        return out

    def conversation(self) -> Conversation:
        """For us."""
        turns = []
        for i, text in enumerate(self.turns):
            count = len(self.images[i // 2]) if i % 2 == 0 and self.images else 0
            turns.append(Turn(("user", "assistant")[i % 2], *[IMAGE, "\n"] * count, text))
        encoded = []
        for image in self.opened():
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            encoded.append(buffer.getvalue())
        return Conversation(id=self.turns[0], turns=tuple(turns), images=tuple(encoded))


CHATS = {
    "square": Chat(("What is the word?",), (((27, 27),),)),
    "wide": Chat(("How many bars are there?",), (((80, 31),),)),
    "tall": Chat(("What is it?",), (((25, 90),),)),
    "bilinear": Chat(("What is the word?",), (((150, 139),),)),  # 6 x 6 tiles, more than nine
    "bilinear, wide": Chat(("And here?",), (((160, 60),),)),
    "thin": Chat(("What?",), (((120, 3),),)),
    "two images": Chat(("Which is it?",), (((40, 30), (20, 50)),)),
    "two turns": Chat(("What is it?", "red", "And why?"), (((50, 50),), ())),
    "text only": Chat(("What is red?",)),
}


def torch_model(vision: dict, text: dict, pinpoints: list[list[int]], image_token: int):
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False).to_dict(),
        text_config=Qwen2Config(**text).to_dict(),
        image_token_index=image_token,
        video_token_index=image_token + 1,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    torch.manual_seed(0)
    return LlavaOnevisionForConditionalGeneration(config).eval()


def torch_image_processor(side: int, pinpoints: list[list[int]]) -> LlavaOnevisionImageProcessorPil:
    """As the published checkpoints configure it: SigLIP's mean and deviation."""
    half = [0.5] * 3
    return LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_grid_pinpoints=pinpoints, image_mean=half, image_std=half
    )


@torch.no_grad()
def torch_answer(model, tokenizer, image_processor, chat: Chat):
    """Prompt ids with expanded placeholders, logits of every position, greedy tokens."""
    text = tokenizer.apply_chat_template(
        chat.messages(), chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    image_token = model.config.image_token_id
    inputs, lengths = {}, iter(())
    if chat.images:
        # A list in a list: the images of one prompt. Several images get one tile each.
        inputs = dict(image_processor([chat.opened()], return_tensors="pt"))
        inputs["pixel_values"] = inputs["pixel_values"].float()
        lengths = iter([len(features) for features in model.get_image_features(**inputs).pooler_output])
    expanded = [token for id in ids for token in ([id] * next(lengths) if id == image_token else [id])]
    inputs["input_ids"] = torch.tensor([expanded])
    logits = model(**inputs).logits[0].numpy()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    output = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=tokenizer.pad_token_id
    )
    return expanded, logits, output[0, -NEW_TOKENS:].tolist()


def our_answers(model: VisionLanguageModel, processor: Processor, conversations: list[Conversation]):
    """Prompt tokens, logits and greedy tokens of every conversation, as one right-aligned batch."""
    examples = [processor.prompt(conversation) for conversation in conversations]
    length, tiles = max(len(e.tokens) for e in examples), max(1, *(len(e.tile_image) for e in examples))
    config = model.config
    shape = BatchShape(rows=len(examples), tokens=length, tiles=tiles, tile_size=config.image.tile_size)
    weighted = config.image.may_interpolate
    batch = collate(
        [[e] for e in examples], shape, pad_side="left", optional=("vision_cells", "vision_weights") if weighted else ()
    ).batch

    @jax.jit
    def prefill(model, batch):
        hidden, cache = model(batch, cache=model.init_cache(shape.rows, length + NEW_TOKENS))
        return model.logits(hidden), cache

    @jax.jit
    def step(model, tokens, positions, cache):
        hidden, cache = model.decode(tokens[:, None], positions[:, None], cache)
        return model.logits(hidden[:, 0]), cache

    logits, cache = prefill(model, batch)
    logits = np.asarray(logits)
    greedy = [logits[:, -1].argmax(-1).astype(np.int32)]
    for i in range(1, NEW_TOKENS):
        following, cache = step(model, greedy[-1], batch.positions[:, -1] + i, cache)
        greedy.append(np.asarray(following).argmax(-1).astype(np.int32))
    return [
        (e.tokens, e.vision_cell, logits[row, length - len(e.tokens) :], [int(tokens[row]) for tokens in greedy])
        for row, e in enumerate(examples)
    ]


def check(theirs, ours, image_token: int) -> float:
    """Raises unless the two agree; the largest difference of the logits."""
    expanded, expected, expected_tokens = theirs
    tokens, cells, logits, greedy = ours
    is_text = np.asarray(expanded) != image_token
    assert len(tokens) == len(expanded)
    np.testing.assert_array_equal(np.asarray(cells) == -1, is_text)
    np.testing.assert_array_equal(tokens[is_text], np.asarray(expanded)[is_text])
    # Row by row: at full size each of the two takes a gigabyte.
    difference = max(np.abs(ours - theirs).max() for ours, theirs in zip(logits, expected, strict=True))
    assert difference <= 2e-4
    assert greedy == expected_tokens
    return difference


# Small: 27 pixels are six patches of four and a rest, as so400m/14-384 has one.
SIDE = 27
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in range(1, 7) for columns in range(1, 7)]
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}


@pytest.fixture(scope="module", params=quick([True, False], True), ids=["tied", "untied"])
def answers(request, tmp_path_factory, pillow_13_in_module):
    """Both sides' answers to every chat."""
    tokenizer = demo_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    theirs = torch_model(VISION, TEXT | {"tie_word_embeddings": request.param}, PINPOINTS, image_token)
    torch_weights.randomize(theirs)
    image_processor = torch_image_processor(SIDE, PINPOINTS)
    folder = tmp_path_factory.mktemp("onevision")
    theirs.save_pretrained(folder / "torch")
    import_checkpoint(folder / "torch", folder / "ours", report=lambda line: None)
    model = load_model(folder / "ours")
    assert model.config.decoder.tie_word_embeddings == request.param
    found = our_answers(model, Processor(demo_tokenizer(), model.config), [c.conversation() for c in CHATS.values()])
    expected = [torch_answer(theirs, tokenizer, image_processor, chat) for chat in CHATS.values()]
    return dict(zip(CHATS, zip(expected, found, strict=True), strict=True)), image_token


@pytest.mark.parametrize("name", CHATS)
def test_logits_and_greedy_tokens(answers, name: str):
    pairs, image_token = answers
    check(*pairs[name], image_token)


def test_the_cases_are_what_they_say(answers):
    """Bilinear ones shrink, the others do not; greedy tokens vary."""
    pairs, image_token = answers
    counts = {name: pairs[name][0][0].count(image_token) for name in CHATS}
    assert counts["text only"] == 0
    assert counts["two images"] == 2 * (36 + 1)
    assert counts["square"] == 36 + 6 * 7
    assert 36 + 18 * 17 <= counts["bilinear"] <= 36 + 19 * 18  # not 36 * 37
    assert len({tuple(pairs[name][0][2]) for name in CHATS}) > len(CHATS) // 2


@pytest.mark.slow
@needs_data("qwen2_tokenizer", "vocab.json")
def test_full_size(tmp_path, capsys):
    """SigLIP-so400m/14-384 (26 blocks) and Qwen2-0.5B shapes, random weights, the real tokenizer, one image."""
    tokenizer = AutoTokenizer.from_pretrained(DATA_ROOT / "qwen2_tokenizer")
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    pinpoints = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
    text = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    chat = Chat(("What is shown in this image?",), (((500, 380),),))
    theirs = torch_model(vision, text, pinpoints, image_token)
    theirs.save_pretrained(tmp_path / "torch")
    image_processor = torch_image_processor(384, pinpoints)
    expected = torch_answer(theirs, tokenizer, image_processor, chat)
    del theirs
    import_checkpoint(tmp_path / "torch", tmp_path / "ours", report=lambda line: None)
    model = load_model(tmp_path / "ours")
    plain = AutoTokenizer.from_pretrained(DATA_ROOT / "qwen2_tokenizer")
    (found,) = our_answers(model, Processor(plain, model.config), [chat.conversation()])
    difference = check(expected, found, image_token)
    with capsys.disabled():
        print(
            f"\nfull size: {len(expected[0])} tokens, largest |logit| {np.abs(expected[1]).max():.2f}, "
            f"largest difference {difference:.1e}, {NEW_TOKENS} greedy tokens equal"
        )
