"""The part of the lmms-eval model that needs no lmms-eval: settings, images, batches of mixed requests, likelihoods.

`test_lmms_eval_host.py` runs it inside the real package."""

from __future__ import annotations

import dataclasses
import io
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.inference import tiny
from vr_jax.data.collate import collate
from vr_jax.data.images import open_image
from vr_jax.data.processor import Processor
from vr_jax.data.texts import place_images
from vr_jax.data.types import Conversation
from vr_jax.errors import UserError
from vr_jax.evaluation.lmms_eval import likelihood
from vr_jax.evaluation.lmms_eval.answers import Answerer, grouped
from vr_jax.evaluation.lmms_eval.options import Options
from vr_jax.evaluation.lmms_eval.questions import (
    MOST_NEW_TOKENS,
    Question,
    Settings,
    capped,
    encoded,
    settings_of,
    without_effect,
)
from vr_jax.inference import Generator, Sampling, user_turn
from vr_jax.model.batch import BatchShape
from vr_jax.model.pruning.fastv import FastVConfig

NEW_TOKENS = 6
GREEDY = Settings(NEW_TOKENS, Sampling())
WARM = Settings(NEW_TOKENS, Sampling(temperature=0.8, top_p=0.9, seed=3))


# --- settings


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"max_new_tokens": 16, "temperature": 0, "do_sample": False}, Settings(16, Sampling())),
        ({"max_new_tokens": 16.0, "temperature": 0.7, "do_sample": False, "num_beams": 1}, Settings(16, Sampling())),
        ({"until": ["\n\n"], "do_sample": False}, Settings(1024, Sampling())),
        ({"temperature": 0.7, "top_p": 0.9}, Settings(1024, Sampling(0.7, 0.9, 5))),
        ({"temperature": 0.7, "top_p": None, "do_sample": True}, Settings(1024, Sampling(0.7, 1.0, 5))),
        # as lmms-eval's models: the temperature decides
        ({"do_sample": True}, Settings(1024, Sampling())),
        ({"temperature": None, "top_p": 0.3}, Settings(1024, Sampling())),
        ({"temperature": 1.0, "top_p": 0}, Settings(1024, Sampling())),
        ({"max_gen_toks": 8}, Settings(8, Sampling())),
        ({"max_new_tokens": 49152}, Settings(MOST_NEW_TOKENS, Sampling())),
    ],
)
def test_generation_kwargs(kwargs, expected):
    assert settings_of(kwargs, seed=5) == expected


def test_options_win_over_the_task():
    kwargs = {"max_new_tokens": 16, "until": ["\n\n", "", "."]}
    assert settings_of(kwargs, max_new_tokens=9000).max_new_tokens == 9000
    cut = settings_of(kwargs, cut_at_until=True)
    assert cut.until == ("\n\n", ".")
    assert [cut.cut(text) for text in ("a. b\n\nc", "a\n\nb.", "none", ".")] == ["a", "a", "none", ""]
    assert settings_of({"until": "END"}, cut_at_until=True).until == ("END",)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: expected a whole number of at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens = 1.5"),
        ({"max_new_tokens": "many"}, "max_new_tokens = 'many'"),
        ({"temperature": -1}, r"temperature = -1\.0: expected"),
        ({"temperature": 1, "top_p": 2}, r"top_p = 2\.0: expected"),
    ],
)
def test_settings_without_sense_are_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        settings_of(kwargs)


def test_settings_that_vr_jax_does_not_have_are_told():
    kwargs = {"max_new_tokens": 20000, "num_beams": 5, "top_k": 50, "until": ["x"], "image_aspect_ratio": "original"}
    assert without_effect(kwargs) == {"num_beams": 5, "top_k": 50}
    assert capped(kwargs) == 20000
    assert not without_effect({"num_beams": 1, "repetition_penalty": 1.0, "temperature": 0, "do_sample": False})
    assert capped({"max_new_tokens": 16}) is None


def test_equal_settings_share_batches():
    cold = settings_of({"temperature": 0, "top_p": 0.5, "max_new_tokens": 6})
    assert grouped([GREEDY, WARM, cold, WARM]) == {GREEDY: [0, 2], WARM: [1, 3]}


# --- arguments


def test_arguments_of_lmms_eval():
    options = Options.of(
        {"pretrained": "models/", "batch_size": "8", "fsdp": -1.0, "max_batch_size": None, "dtype": "auto"}
    )
    assert (str(options.checkpoint), options.batch_size, options.fsdp, options.dtype) == ("models", 8, -1, None)
    assert Options.of({"checkpoint": 12, "batch_size": "auto:4"}).batch_size == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "the checkpoint is missing: set --model_args checkpoint=DIR"),
        ({"checkpoint": "a", "pretrained": "b"}, "two names of one argument"),
        ({"checkpoint": "a", "max_tokens": 3}, r"unknown names \['max_tokens'\]; known: checkpoint, dtype"),
        ({"checkpoint": "a", "batch_size": 0}, "batch_size = 0: expected at least 1"),
        ({"checkpoint": "a", "tensor": 1.5}, r"tensor = 1\.5: expected a whole number"),
        ({"checkpoint": "a", "max_new_tokens": "all"}, "max_new_tokens = 'all': expected a whole number"),
        ({"checkpoint": "a", "cut_at_until": "maybe"}, "cut_at_until = 'maybe': expected true or false"),
    ],
)
def test_mistakes_in_the_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        Options.of(arguments)


def test_arguments_without_effect_are_told(caplog):
    Options.of({"checkpoint": "a", "device": "cuda:0", "batch_size": 1})
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "device=cuda",
        "the batch size is 1, the default of lmms-eval; --batch_size 16 is faster",
    ]


# --- images


def files() -> dict[str, bytes]:
    """The same noise in the modes and formats of the benchmarks."""
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    rgb = rgba.convert("RGB")
    images = {
        "png": (rgb, "PNG", {}),
        "jpeg": (rgb, "JPEG", {}),
        "webp": (rgb, "WEBP", {}),
        "alpha": (rgba, "PNG", {}),
        "grey": (rgb.convert("L"), "PNG", {}),
        "black-and-white": (rgb.convert("1"), "PNG", {}),
        "palette": (rgb.convert("P"), "PNG", {"transparency": 3}),
        "cmyk": (rgb.convert("CMYK"), "JPEG", {}),
    }
    found = {}
    for name, (image, kind, options) in images.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found[name] = buffer.getvalue()
    return found


@pytest.mark.parametrize("converted", [False, True], ids=["as-opened", "converted"])
@pytest.mark.parametrize("name", files())
def test_images_keep_every_pixel(name, converted):
    """A task hands out the opened image, or its RGB version; vr_jax's own benchmarks read the file."""
    file = files()[name]
    image = Image.open(io.BytesIO(file))
    if converted:
        image = image.convert("RGB")
    with open_image(encoded(image)) as reopened:
        again = np.asarray(reopened)
    np.testing.assert_array_equal(again, np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))

    processor = Processor(tiny.TOKENIZER, tiny.config(vision_remember=False))
    own, hosted = (
        processor.prompt(Conversation("x", (user_turn("What?", 1),), (source,))) for source in (file, encoded(image))
    )
    for part in ("tokens", "vision_cell", "tile_pixels"):
        np.testing.assert_array_equal(getattr(own, part), getattr(hosted, part))


# --- answers


@pytest.fixture(scope="module")
def generator():
    return Generator(tiny.model(tiny.config(vision_remember=False)), tiny.TOKENIZER, tiny.BUCKETS)


@pytest.fixture(scope="module")
def processor():
    return Processor(tiny.TOKENIZER, tiny.config(vision_remember=False))


@pytest.fixture(scope="module")
def answerer(generator, processor):
    return Answerer(generator, processor, batch_size=4, progress=False)


def image(seed: int, width: int = 30, height: int = 15) -> Image.Image:
    return Image.open(io.BytesIO(tiny.png(width, height, seed)))


def raises():
    raise KeyError("no such column")


LONG = "Which colour is the tallest bar? abcdefghijkl"
GOOD = {
    "short": ("What?", lambda: [image(1)]),
    "long": (LONG, lambda: [image(2)]),
    "text": ("What is the word?", lambda: None),
    "two": ("Which?", lambda: [image(3, 24, 24), image(4)]),
    "inside": ("Here <image> and <image>?", lambda: [image(5, 24, 24), image(6, 24, 24)]),
    "none": ("What is it?", lambda: []),
    "another": ("What is it?", lambda: image(7)),
}
BAD = {
    "too-long": ("x" * 500, lambda: [image(1)], "too_long"),
    "placeholders": ("<image> <image>?", lambda: [image(1)], "image_count"),
    "video": ("What?", lambda: ["clip.mp4"], "malformed_record: expected an image, found str"),
    "raises": ("What?", raises, "malformed_record: doc_to_visual raised KeyError: 'no such column'"),
    "truncated": ("What?", lambda: [Image.open(io.BytesIO(tiny.png(30, 15)[:200]))], "broken_image"),
}


def own_prompt(processor, name):
    text, visuals = GOOD[name]
    found = visuals() or []
    images = tuple(encoded(one) for one in (found if isinstance(found, list) else [found]))
    return processor.prompt(Conversation(name, (user_turn(place_images([text], len(images))[0], len(images)),), images))


@pytest.fixture(scope="module")
def mixed():
    """Good and bad requests, greedy and not, in no order."""
    names = [name for pair in zip([*GOOD], [*BAD, None, None], strict=True) for name in pair if name]
    table = {**{name: (text, visuals) for name, (text, visuals, _) in BAD.items()}, **GOOD}
    questions = [Question(f"task/test/{name}", *table[name]) for name in names]
    return names, questions, [WARM if name in ("two", "short") else GREEDY for name in names]


@pytest.mark.slow  # Greedy and sampled requests are compiled.
def test_answers_come_in_the_order_of_the_requests(generator, processor, answerer, mixed, caplog):
    names, questions, settings = mixed
    with caplog.at_level(logging.WARNING):
        answers = answerer.answer(questions, settings)
    for number, (name, answer, chosen) in enumerate(zip(names, answers, settings, strict=True)):
        if name in BAD:
            assert answer.text == ""
            assert answer.problem.startswith(BAD[name][2])
            continue
        prompt = own_prompt(processor, name)
        alone = generator.generate_rows(
            {number: prompt}, max_new_tokens=NEW_TOKENS, sampling=chosen.sampling, rows=answerer.rows
        )[number]
        assert answer.text == alone.text, name
        assert (answer.input_tokens, answer.output_tokens) == (len(prompt.tokens), len(alone.tokens))
        assert answer.problem is None
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(BAD) + 1, lines
    for name, (_, _, problem) in BAD.items():
        assert any(line.startswith(f"task/test/{name} was not answered: {problem}") for line in lines)
    assert lines[-1] == (
        f"{len(BAD)} of {len(names)} requests were not answered: "
        "{'too_long': 1, 'image_count': 1, 'malformed_record': 2, 'broken_image': 1}"
    )


def test_sizes_are_measured_without_decoding(processor, answerer, mixed, monkeypatch):
    names, questions, _ = mixed

    def decoded(*args):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image.Image, "convert", decoded)
    monkeypatch.setattr("vr_jax.evaluation.lmms_eval.questions.decode_rgb", decoded)
    sizes = answerer.sizes(questions)
    monkeypatch.undo()
    for number, name in enumerate(names):
        if name in GOOD:
            prompt = own_prompt(processor, name)
            assert sizes[number] == (len(prompt.tokens), len(prompt.tile_pixels))
        elif name in ("video", "raises", "placeholders"):
            assert sizes[number] == (0, 0)


def test_replies_are_cut_only_where_asked(answerer, mixed):
    _, questions, _ = mixed
    (whole,) = answerer.answer(questions[:1], [GREEDY])
    stop = whole.text[2]
    (cut,) = answerer.answer(questions[:1], [dataclasses.replace(GREEDY, until=(stop,))])
    assert cut.text == whole.text[: whole.text.index(stop)] != whole.text


def test_no_requests(answerer):
    assert answerer.answer([], []) == []
    assert answerer.score([], []) == []


# --- likelihoods


def through_the_cache(model, prompts, replies):
    """Log-probabilities (tokens, vocabulary) in float64 for each prompt and reply, token by token as generation
    decodes them."""
    most = max(map(len, replies))
    shape = BatchShape(rows=1, tokens=tiny.BUCKETS.max_tokens, tiles=tiny.BUCKETS.max_tiles, tile_size=24)
    prefill = jax.jit(lambda model, batch: model(batch, model.init_cache(1, shape.tokens + most)))
    decode = jax.jit(lambda model, *step: model.decode(*step))
    found = []
    for prompt, tokens in zip(prompts, replies, strict=True):
        host = collate([[prompt]], shape, pad_side="left", optional=model.config.batch_fields)
        hidden, cache = prefill(model, host.batch)
        rows = []
        for step, token in enumerate(tokens):
            logits = np.asarray(hidden[0, -1], np.float64) @ np.asarray(model.head_kernel(), np.float64)
            rows.append(logits - logits.max() - math.log(np.sum(np.exp(logits - logits.max()))))
            position = np.asarray([[len(prompt.tokens) + step]], np.int32)
            hidden, cache = decode(model, np.asarray([[token]], np.int32), position, cache)
        found.append(np.stack(rows))
    return found


@pytest.mark.slow  # Likelihoods are compiled for every length; make test-lmms-eval asks for them inside lmms-eval.
def test_likelihoods_are_those_of_decoding_token_by_token(generator, processor, answerer):
    names = ["two", "text", "short"]
    replies = ["orange", "", " a longer reply"]
    scores = answerer.score([Question(name, *GOOD[name]) for name in names], replies)
    tokenised = [tiny.TOKENIZER.encode(f"{reply}<|im_end|>\n", add_special_tokens=False) for reply in replies]
    expected = through_the_cache(generator.model, [own_prompt(processor, name) for name in names], tokenised)
    for score, tokens, rows in zip(scores, tokenised, expected, strict=True):
        assert score.loss == pytest.approx(-np.mean(rows[np.arange(len(tokens)), tokens]), rel=1e-5)
        assert score.greedy == (rows.argmax(axis=-1)[:-1].tolist() == tokens[:-1])


@pytest.mark.slow  # Another bucket is compiled.
def test_a_reply_that_fills_the_largest_bucket(generator, processor, answerer):
    """The next power of two after its length would not fit."""
    most = generator.buckets.max_tokens
    prompt = processor.prompt(Conversation("a", (user_turn("W?", 0),), ()))
    length = most - len(prompt.tokens)
    assert 1 << (length - 1).bit_length() >= most
    tokens = tiny.TOKENIZER.encode("x" * length, add_special_tokens=False)[:length]
    ((loss, _),) = answerer.likelihood([(prompt, tokens)], answerer.rows, generator.buckets)
    (rows,) = through_the_cache(generator.model, [prompt], [tokens])
    assert loss == pytest.approx(-np.mean(rows[np.arange(length), tokens]), rel=1e-5)


def test_greedy_is_what_the_model_would_say(generator, processor, answerer):
    """On the model's own tokens, whatever they are, and with each of them changed. The last does not count: it stands
    for the newline behind <|im_end|>."""
    prompt = own_prompt(processor, "short")
    (reply,) = generator.generate([prompt], max_new_tokens=NEW_TOKENS, rows=answerer.rows)
    tokens = list(reply.tokens)
    assert len(tokens) >= 4
    changed = [[*tokens[:k], (tokens[k] + 1) % len(tiny.TOKENIZER), *tokens[k + 1 :]] for k in (0, 2, len(tokens) - 1)]
    rows = answerer.likelihood([(prompt, each) for each in (tokens, *changed)], answerer.rows, generator.buckets)
    assert [greedy for _, greedy in rows] == [True, False, False, True]


def test_likelihoods_of_what_cannot_be_asked(answerer, caplog):
    questions = [Question("a", *BAD["video"][:2]), Question("b", *GOOD["text"]), Question("c", *GOOD["text"])]
    scores = answerer.score(questions, ["x", "x", "x" * 400])
    assert [math.isinf(score.loss) for score in scores] == [True, False, True]
    assert caplog.records[-1].getMessage().startswith("2 of 3 requests were not answered")


def test_likelihoods_with_a_pruner_are_refused(processor):
    config = dataclasses.replace(tiny.config(vision_remember=False), pruning=FastVConfig(layer=1, keep=0.5))
    answerer = Answerer(Generator(tiny.model(config), tiny.TOKENIZER), processor, batch_size=1, progress=False)
    with pytest.raises(UserError, match="likelihoods are not defined with the pruner 'fastv'"):
        answerer.score([Question("a", *GOOD["text"])], ["x"])


def test_the_tokens_behind_the_end_of_a_reply_do_not_count_for_greedy():
    """In ChatML a newline stands behind the end of a reply; in other formats nothing does."""

    class Predicting:
        """Predicts the tokens 1, 2, 3 wherever it is asked."""

        def __call__(self, batch):
            return jnp.asarray([[[0.0], [1.0], [2.0], [3.0], [0.0]]]), None

        def logits(self, hidden):
            return 9 * jax.nn.one_hot(hidden[..., 0].astype(jnp.int32), 8)

    for last, behind_end, expected in ((3, 0, True), (4, 0, False), (4, 1, True)):
        targets = jnp.asarray([[1, 2, last]])
        _, greedy = likelihood._rows(Predicting(), None, targets, behind_end=behind_end)  # noqa: SLF001
        assert bool(greedy[0]) is expected
