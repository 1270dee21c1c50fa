"""The demo set: deterministic, disjoint splits, answers that the pixels really show, short token sequences."""

import io
import json
import pickle
from collections import Counter
from random import Random

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from vr_jax.data.demo.drawing import draw_text, text_mask
from vr_jax.data.demo.export import write_chartqa, write_llava
from vr_jax.data.demo.images import COLUMN_LETTERS, INKS, PAPER, ROW_LETTERS, SHADE, SUBJECTS, TEXT, WORDS
from vr_jax.data.demo.source import HELD_OUT_SHARE, DemoSource, encode_png, is_held_out
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.types import IMAGE_PLACEHOLDER


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer()


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


# --- source


def test_records_depend_on_split_seed_and_index_alone():
    source = DemoSource("train", 40, seed=3, turns=2)
    in_order = [source[i] for i in range(40)]
    clone = pickle.loads(pickle.dumps(source))
    assert [clone[i] for i in reversed(range(40))] == in_order[::-1]
    assert DemoSource("train", 7, seed=3, turns=2)[6] == in_order[6]
    assert DemoSource("train", 40, seed=4, turns=2)[6] != in_order[6]
    assert DemoSource("held_out", 40, seed=3, turns=2)[6].images != in_order[6].images
    assert len({conversation.id for conversation in in_order}) == 40


def test_first_images_are_the_recorded_ones():
    """Guards the fixed seed: a change of Python's or of our drawing of lots would change every number of the demo."""
    samples = [DemoSource("train", 3, seed=0).sample(i) for i in range(3)]
    assert [sample.subject for sample in samples] == ["chart", "table", "word"]
    assert [(q.kind, q.text, q.answer) for sample in samples for q in sample.questions] == [
        ("chart_shortest", "Which colour is the shortest bar?", "blue"),
        ("table_cell", "What is in row A, column X?", "4"),
        ("word_read", "What is the word?", "cat"),
    ]


def test_conversation_has_the_contract_of_real_records():
    conversation = DemoSource("train", 12, turns=4)[0]
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"] * 4
    assert conversation.turns[0].text.startswith(f"{IMAGE_PLACEHOLDER}\n")
    assert sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in conversation.turns) == len(conversation.images) == 1
    assert len({turn.text for turn in conversation.turns if turn.role == "user"}) == 4


@pytest.mark.parametrize("name", SUBJECTS)
def test_splits_share_no_content(name):
    """The rule decides on the content alone, so disjointness holds for any seeds; here it is seen on real records."""
    subject = SUBJECTS[name]
    rng = Random(0)
    contents = [subject.content(rng) for _ in range(4000)]
    share = np.mean([is_held_out(content) for content in contents])
    assert abs(share - 1 / HELD_OUT_SHARE) < 0.03
    # Same content, other looks: still the same split.
    content = contents[0]
    assert subject.questions(content) == subject.questions(content)

    images = {
        split: {DemoSource(split, 600, seed).sample(i).png for seed in (0, 1) for i in range(600)}
        for split in ("train", "held_out")
    }
    assert not images["train"] & images["held_out"]


def test_every_kind_and_no_dominant_answer():
    source = DemoSource("held_out", 1500)
    questions = [source.sample(i).questions[0] for i in range(1500)]
    kinds = Counter(question.kind for question in questions)
    assert set(kinds) == {q.kind for s in SUBJECTS.values() for q in s.questions(s.content(Random(0)))}
    assert {kind.split("_")[0] for kind in kinds} == set(SUBJECTS)
    assert min(kinds.values()) > 1500 * 0.05
    answer, count = Counter(question.answer for question in questions).most_common(1)[0]
    assert count <= 0.15 * 1500, f"answer {answer!r} is {count / 15:.1f} %: the majority baseline would be too good"


def test_errors_name_what_was_given():
    with pytest.raises(ValueError, match="'test': expected 'train' or 'held_out'"):
        DemoSource("test", 3)
    with pytest.raises(ValueError, match="turns = 0"):
        DemoSource("train", 3, turns=0)
    with pytest.raises(IndexError, match=r"record 3: the train split has records 0\.\.2"):
        DemoSource("train", 3)[3]
    with pytest.raises(ValueError, match="leaves the 8 x 8 canvas"):
        draw_text(np.zeros((8, 8, 3), np.uint8), "wolf", 20, 0, 0, TEXT)


# --- images: the answer can be read from the pixels


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
    """Whether `text` in this colour stands somewhere on this paper, pixel for pixel (to one grey level)."""
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


# --- tokenizer


def test_tokenizer_is_small_lossless_and_has_chatml(tokenizer):
    assert len(tokenizer) <= 512
    for text in ("What is the word?", "concatenated", "naïve 猫\n\t x  ", "".join(map(chr, range(1, 300)))):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.encode("", add_special_tokens=False) == []
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ids = tokenizer.convert_tokens_to_ids(specials)
    assert [tokenizer.encode(name, add_special_tokens=False) for name in specials] == [[i] for i in ids]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""
    assert len(tokenizer.encode("\n", add_special_tokens=False)) == 1


def test_questions_and_answers_are_short(tokenizer):
    rng = Random(0)
    for subject in SUBJECTS.values():
        for _ in range(50):
            for question in subject.questions(subject.content(rng)):
                assert len(tokenizer.encode(question.text, add_special_tokens=False)) <= 5
                assert len(tokenizer.encode(question.answer, add_special_tokens=False)) == 1


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nWhat is the value of the red bar?<|im_end|>\nnaïve"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.get_vocab() == demo_tokenizer().get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    clone = pickle.loads(pickle.dumps(tokenizer))
    assert clone.encode(text) == tokenizer.encode(text)


# --- writers


def test_llava_files(tmp_path):
    source = DemoSource("train", 5, turns=2)
    path = write_llava(source, tmp_path / "set")
    records = json.loads(path.read_text())
    assert len(records) == 5
    for record, conversation in zip(records, (source[i] for i in range(5)), strict=True):
        assert set(record) == {"id", "image", "conversations"}
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * 2
        assert [turn["value"] for turn in record["conversations"]] == [turn.text for turn in conversation.turns]
        assert (tmp_path / "set" / "images" / record["image"]).read_bytes() == conversation.images[0]
    with pytest.raises(FileExistsError, match="exists already"):
        write_llava(source, tmp_path / "set")


def test_chartqa_files(tmp_path):
    source = DemoSource("held_out", 6)
    path = write_chartqa(source, tmp_path / "set")
    assert path.name == "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    samples = [source.sample(i) for i in range(6)]
    assert [(r["type"], r["question"], r["answer"]) for r in rows] == [
        (q.kind, q.text, q.answer) for sample in samples for q in sample.questions
    ]
    for row, sample in zip(rows, samples, strict=True):
        assert row["image"] == f"images/{row['imgname']}"
        assert (path.parent / row["image"]).read_bytes() == sample.png


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(DemoSource, "sample", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_chartqa(DemoSource("train", 2), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_png_is_lossless():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels_of(encode_png(pixels)), pixels)


def test_words_can_be_told_apart():
    assert len(set(WORDS)) == len(WORDS) >= 12
    assert len({word[0] for word in WORDS}) >= 8
