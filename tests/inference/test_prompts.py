"""Questions and conversations are written in the chat format of the model, wherever they are asked."""

import dataclasses
import io
import json
import types

import numpy as np
import pytest
from PIL import Image

from tests.data.prompts.small_tokenizers import MINICPM, sentencepiece
from tests.evaluation import words
from tests.inference import tiny
from tests.tiny import tiny_decoder
from vr_jax.data.processor import Processor
from vr_jax.data.types import IMAGE, Conversation, Turn
from vr_jax.evaluation import batching
from vr_jax.evaluation.interface import Item
from vr_jax.inference import Piece, Sampling, question, read_questions, user_turn
from vr_jax.inference.chat import Chat
from vr_jax.model.batch import NO_CELL


@pytest.fixture(scope="module")
def tokenizer():
    made = sentencepiece("first", specials=MINICPM)
    made.add_tokens(["\n"])
    return made


def processor_of(tokenizer, template: str) -> Processor:
    config = tiny.config(vision_remember=False)
    decoder = tiny_decoder(vocab_size=len(tokenizer) + 5, num_layers=3)
    return Processor(tokenizer, dataclasses.replace(config, decoder=decoder, template=template))


def text_of(tokenizer, example) -> str:
    """The text of a prompt, with one | for the vision tokens of each image."""
    pieces, inside = [], False
    for token, cell in zip(example.tokens.tolist(), example.vision_cell.tolist(), strict=True):
        vision = cell != NO_CELL
        if not vision or not inside:
            pieces.append("|" if vision else tokenizer.convert_ids_to_tokens(token))
        inside = vision
    return tokenizer.backend_tokenizer.decoder.decode(["", *pieces[1:]]).strip()


def question_of(text: str, template: str) -> str:
    return {
        "minicpm_v": f"<用户>|\n{text}<AI>",
        "mistral_instruct": f"[INST] |\n{text} [/INST]",
    }[template]


@pytest.mark.parametrize("template", ["minicpm_v", "mistral_instruct"])
def test_every_client_asks_in_the_format_of_the_model(template, tokenizer, tmp_path):
    processor = processor_of(tokenizer, template)
    expected = question_of("What is this?", template)
    separators = processor.encoder.separators

    image = tiny.png(24, 24)
    asked = [processor.prompt(question("What is this?", [image], separators))]
    asked.append(batching.prompt_of(processor, words.Words(), Item("a", "What is this?", (), "", (image,))))
    Image.open(io.BytesIO(image)).save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "What is this?", "image": "a.png"}))
    (line,) = read_questions(tmp_path / "q.jsonl", separators)
    asked.append(processor.prompt(line.conversation))
    prompts = []
    reply = Piece("A car.", 2, "stop")
    generator = types.SimpleNamespace(pieces=lambda prompt, **_: prompts.append(prompt) or iter([reply]))
    chat = Chat(generator, processor, [tmp_path / "a.png"])
    assert list(chat.ask("What is this?", 1, Sampling())) == ["A car."]
    list(chat.ask("Red?", 1, Sampling()))
    assert [text_of(tokenizer, one) for one in (*asked, prompts[0])] == [expected] * 4
    size = batching.prompt_size(processor, words.Words(), Item("a", "What is this?", (), "", (image,)))
    assert size == (len(asked[0].tokens), len(asked[0].tile_pixels))

    more = {"minicpm_v": "A car.<用户>Red?<AI>", "mistral_instruct": " A car. </s>[INST] Red? [/INST]"}[template]
    assert text_of(tokenizer, prompts[1]) == expected + more


def test_what_separates_images_is_the_formats():
    assert user_turn("What?", 2, ("", "")) == Turn("user", IMAGE, IMAGE, "What?")
    assert question("What?", [b"a"], ("", "")) == Conversation("question", (Turn("user", IMAGE, "What?"),), (b"a",))


def test_a_training_sample_of_llavas_begins_as_its_question_does(tokenizer):
    """LLaVA's records have a newline behind the image, which MiniCPM's format writes itself."""
    processor, image = processor_of(tokenizer, "minicpm_v"), tiny.png(24, 24)
    turns = (Turn("user", IMAGE, "\nWhat is this?"), Turn("assistant", "A car."))
    sample = processor.example(Conversation("a", turns, (image,)))
    asked = processor.prompt(question("What is this?", [image], processor.encoder.separators))
    np.testing.assert_array_equal(sample.tokens[: len(asked.tokens)], asked.tokens)
