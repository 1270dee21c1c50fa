"""The pages to read: their captions and questions say what is highlighted, their splits share no content, and the files
that `write_reading` writes are read by the training and evaluation sources."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vr_jax.data import Processor, open_source
from vr_jax.data.demo.pages import BLOCK, HIGHLIGHT, KINDS
from vr_jax.data.demo.reading import (
    CAPTIONS,
    HELD_OUT,
    PAGE,
    PLACES,
    QUESTIONS,
    SUFFIX,
    TRAIN,
    ReadingSource,
    conversations,
    place_of,
    write_reading,
)
from vr_jax.data.demo.tokenizer import reading_tokenizer
from vr_jax.errors import UserError
from vr_jax.evaluation.benchmarks import get_benchmark
from vr_jax.settings import load_config


@pytest.fixture(scope="module")
def samples():
    return [ReadingSource("train", 20, turns=4).sample(index) for index in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_reading(tmp_path_factory.mktemp("reading") / "data", pages=10, held_out=5, turns=3)


def test_a_place_is_a_block_of_patches_with_at_most_one_highlighted_patch(samples):
    assert len(PLACES) == (PAGE.grid // BLOCK) ** 2 == len(set(PLACES))
    for sample in samples:
        places = [place_of(mark) for mark in sample.marks]
        assert len(set(places)) == len(places) >= 3
        pixels = np.asarray(Image.open(io.BytesIO(sample.png)))
        assert pixels.shape == (PAGE.side, PAGE.side, 3)
        yellow = (pixels == HIGHLIGHT).all(-1)
        for row, name in enumerate(PLACES):
            side = BLOCK * PAGE.patch
            block = yellow[row // 3 * side :, row % 3 * side :][:side, :side]
            # A page is shifted by at most two pixels, so a highlight can reach so far into the next block.
            assert block[2:-2, 2:-2].any() == (name in places), (sample.id, name)


@pytest.mark.parametrize("side", [3, 4])
def test_a_window_holds_one_highlighted_patch_at_most(samples, side):
    """The windows are those of the vision tokens that stand for a ninth or a sixteenth of the patches."""
    for sample in samples:
        windows = [(mark.row // side, mark.column // side) for mark in sample.marks]
        assert len(set(windows)) == len(windows)


def test_captions_and_questions_say_what_the_marks_say(samples):
    for sample in samples:
        answers = {place_of(mark): mark.answer for mark in sample.marks}
        assert dict(part.split(": ") for part in sample.caption.split(", ")) == answers
        for question in sample.questions:
            (place,) = [name for name in PLACES if f"at the {name}?" in question.text]
            assert answers[place] == question.answer
            assert question.kind == sample.subject
    assert [sample.subject for sample in samples[: len(KINDS)]] == list(KINDS)


def test_a_page_depends_on_split_seed_and_index_alone():
    source = ReadingSource("train", 9, seed=3, turns=2)
    assert source.sample(7) == ReadingSource("train", 100, seed=3, turns=2).sample(7)
    assert source.sample(7).png != ReadingSource("train", 9, seed=4, turns=2).sample(7).png
    assert source.sample(7).png != ReadingSource("held_out", 9, seed=3, turns=2).sample(7).png


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "test", "size": 1}, "have no split 'test'; choose 'train' or 'held_out'"),
        ({"split": "train", "size": -1}, "size = -1 with turns = 1; expected size >= 0 and turns >= 1"),
        ({"split": "train", "size": 1, "turns": 0}, "size = 1 with turns = 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ReadingSource(**fields)


def test_every_answer_and_place_is_one_token_and_texts_are_short(samples):
    tokenizer = reading_tokenizer()

    def length(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    assert len(tokenizer) <= load_config("configs/reading.py").model.decoder.vocab_size
    assert {length(name) for name in PLACES} == {1}
    for sample in samples:
        assert {length(question.answer) for question in sample.questions} == {1}
        assert {length(question.text + SUFFIX) for question in sample.questions} == {3}
        assert length(sample.caption) == 4 * len(sample.marks) - 1


@pytest.mark.parametrize(("name", "phase"), [(CAPTIONS, "phase1"), (QUESTIONS, "phase2")])
def test_the_written_files_are_the_samples(folder, name, phase):
    """The training source and the processor of the demo's configs read them; rows of the configs hold them."""
    config = load_config(f"configs/reading.py:vision_remember_9_{phase}")
    source = open_source(folder / TRAIN / name)
    processor = Processor(reading_tokenizer(), config.model, template=config.data.template, label_quirk=False)
    assert len(source) == 10
    expected = ReadingSource("train", 10, turns=3)
    for index in range(10):
        example = processor.example(source[index])
        wanted = processor.example(conversations(expected.sample(index))[name == QUESTIONS])
        np.testing.assert_array_equal(example.tokens, wanted.tokens)
        np.testing.assert_array_equal(example.loss_mask, wanted.loss_mask)
        np.testing.assert_array_equal(example.tile_pixels, wanted.tile_pixels)
        assert len(example.tokens) <= config.batch.tokens


def test_the_held_out_file_is_a_benchmark(folder):
    benchmark = get_benchmark("chartqa")
    items = benchmark.items(folder / HELD_OUT)
    source = ReadingSource("held_out", 5)
    for index, item in enumerate(items):
        (question,) = source.sample(index).questions
        assert benchmark.prompt(item) == question.text + SUFFIX
        assert (item.answers, item.category, item.problem) == ((question.answer,), question.kind, None)
        assert benchmark.score(question.answer, item) == 1
    assert json.loads((folder / HELD_OUT / "test.jsonl").read_text().splitlines()[0])["type"] == KINDS[0]
