"""The answer to every demo question can be read from the pixels of its image."""

from random import Random

import numpy as np
import pytest

from vr_jax.data.demo.drawing import draw_text, text_mask
from vr_jax.data.demo.images import COLUMN_LETTERS, INKS, PAPER, ROW_LETTERS, SHADE, SUBJECTS, TEXT, WORDS


def test_chart_shows_its_answers():
    subject = SUBJECTS["chart"]
    rng = Random(5)
    for _ in range(30):
        content = subject.content(rng)
        pixels = subject.draw(content, rng)
        floor = pixels.shape[0] - 13
        tops = {}
        for colour, value in content:
            column = np.flatnonzero((pixels[floor] == INKS[colour]).all(-1))
            assert column.size == 8
            tops[colour] = int((pixels[:, column[column.size // 2]] == INKS[colour]).all(-1).sum())
            assert found(pixels[:, max(column[0] - 4, 0) : column[-1] + 5], value, subject.text_size, TEXT)
        answers = {question.text: question.answer for question in subject.questions(content)}
        assert answers["Which colour is the tallest bar?"] == max(tops, key=tops.get)
        assert answers["Which colour is the shortest bar?"] == min(tops, key=tops.get)
        assert answers["How many bars are there?"] == str(len(tops))
        for colour, value in content:
            assert answers[f"What is the value of the {colour} bar?"] == value


def test_table_shows_its_answers():
    subject = SUBJECTS["table"]
    rng = Random(5)
    for _ in range(10):
        content = subject.content(rng)
        rows, columns = ROW_LETTERS, COLUMN_LETTERS
        pixels = subject.draw(content, rng)
        height, width = pixels.shape[0] // (len(rows) + 1), pixels.shape[1] // (len(columns) + 1)
        answers = {question.text: question.answer for question in subject.questions(content)}
        assert len(answers) == len(rows) * len(columns)
        for i, row in enumerate(rows):
            assert found(pixels[height * (i + 1) : height * (i + 2), :width], row, subject.text_size, TEXT, paper=SHADE)
            for j, column in enumerate(columns):
                cell = pixels[height * (i + 1) : height * (i + 2), width * (j + 1) : width * (j + 2)]
                assert found(cell, answers[f"What is in row {row}, column {column}?"], subject.text_size, TEXT)


def test_word_shows_its_answers():
    subject = SUBJECTS["word"]
    rng = Random(5)
    for _ in range(30):
        content = subject.content(rng)
        word, ink = content[:2]
        pixels = subject.draw(content, rng)
        assert found(pixels, word, subject.text_size, INKS[ink])
        answers = {question.kind: question.answer for question in subject.questions(content)}
        assert answers["word_read"] == word
        assert answers["word_colour"] == ink


def found(pixels: np.ndarray, text: str, size: int, colour, paper=PAPER) -> bool:
    """Searches for a text in this colour on this background, pixel for pixel with a tolerance of 1.5 grey levels."""
    mask = text_mask(text, size)
    height, width = mask.shape[:2]
    glyph = np.asarray(paper) + (np.asarray(colour) - np.asarray(paper, np.float32)) * mask
    windows = np.lib.stride_tricks.sliding_window_view(pixels.astype(np.float32), (height, width, 3))
    return bool((np.abs(windows[:, :, 0] - glyph).max((-1, -2, -3)) <= 1.5).any())


def test_the_search_for_text_can_fail():
    subject = SUBJECTS["word"]
    content = ("cat", "red", 10, 20)
    pixels = subject.draw(content, Random(0))
    assert found(pixels, "cat", subject.text_size, INKS["red"])
    assert not found(pixels, "cat", subject.text_size, INKS["blue"])
    assert not found(pixels, "cow", subject.text_size, INKS["red"])


def test_words_can_be_told_apart():
    assert len(set(WORDS)) == len(WORDS) >= 12
    assert len({word[0] for word in WORDS}) >= 8


def test_text_that_leaves_the_canvas_is_refused():
    with pytest.raises(ValueError, match="leaves the 8 x 8 canvas"):
        draw_text(np.zeros((8, 8, 3), np.uint8), "wolf", 20, 0, 0, TEXT)
