"""The demo's records are deterministic, and its two splits share no content."""

import pickle
from collections import Counter
from random import Random

import numpy as np
import pytest

from vr_jax.data.demo.images import SUBJECTS
from vr_jax.data.demo.source import HELD_OUT_SHARE, DemoSource, encode_png, is_held_out
from vr_jax.data.images import decode_rgb, open_image
from vr_jax.data.types import IMAGE
from vr_jax.errors import UserError


def test_a_record_depends_on_split_seed_and_index_alone():
    source = DemoSource("train", 40, seed=3, turns=2)
    in_order = [source[i] for i in range(40)]
    clone = pickle.loads(pickle.dumps(source))
    assert [clone[i] for i in reversed(range(40))] == in_order[::-1]
    assert DemoSource("train", 7, seed=3, turns=2)[6] == in_order[6]
    assert DemoSource("train", 40, seed=4, turns=2)[6] != in_order[6]
    assert DemoSource("held_out", 40, seed=3, turns=2)[6].images != in_order[6].images
    assert len({conversation.id for conversation in in_order}) == 40


def test_the_first_records_are_the_recorded_ones():
    """A change of Python's random numbers, or of the order in which they are drawn, would change every demo result."""
    samples = [DemoSource("train", 3, seed=0).sample(i) for i in range(3)]
    assert [sample.subject for sample in samples] == ["chart", "table", "word"]
    assert [(q.kind, q.text, q.answer) for sample in samples for q in sample.questions] == [
        ("chart_shortest", "Which colour is the shortest bar?", "blue"),
        ("table_cell", "What is in row A, column X?", "4"),
        ("word_read", "What is the word?", "cat"),
    ]


def test_a_conversation_has_the_form_of_real_records():
    conversation = DemoSource("train", 12, turns=4)[0]
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"] * 4
    assert conversation.turns[0].parts[0] is IMAGE
    assert sum(turn.images for turn in conversation.turns) == len(conversation.images) == 1
    assert len({turn.text for turn in conversation.turns if turn.role == "user"}) == 4


@pytest.mark.parametrize("name", SUBJECTS)
def test_about_one_content_in_eight_is_held_out(name):
    subject = SUBJECTS[name]
    rng = Random(0)
    contents = [subject.content(rng) for _ in range(4000)]
    share = np.mean([is_held_out(content) for content in contents])
    assert abs(share - 1 / HELD_OUT_SHARE) < 0.03


def test_the_splits_share_no_image():
    """Splits are disjoint in content, hence for any seeds; this looks at real records of two seeds."""
    images = {
        split: {DemoSource(split, 600, seed).sample(i).png for seed in (0, 1) for i in range(600)}
        for split in ("train", "held_out")
    }
    assert not images["train"] & images["held_out"]


def test_every_kind_occurs_and_no_answer_dominates():
    source = DemoSource("held_out", 1500)
    questions = [source.sample(i).questions[0] for i in range(1500)]
    kinds = Counter(question.kind for question in questions)
    assert set(kinds) == {q.kind for s in SUBJECTS.values() for q in s.questions(s.content(Random(0)))}
    assert {kind.split("_")[0] for kind in kinds} == set(SUBJECTS)
    assert min(kinds.values()) > 1500 * 0.05
    answer, count = Counter(question.answer for question in questions).most_common(1)[0]
    assert count <= 0.15 * 1500, f"answer {answer!r} is {count / 15:.1f} %: the majority baseline would be too good"


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="no split 'test'; choose 'train' or 'held_out'"):
        DemoSource("test", 3)
    with pytest.raises(UserError, match="size = 3 with turns = 0"):
        DemoSource("train", 3, turns=0)
    with pytest.raises(IndexError, match=r"record 3: the train split has records 0\.\.2"):
        DemoSource("train", 3)[3]


def test_png_is_lossless():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    with open_image(encode_png(pixels)) as image:
        np.testing.assert_array_equal(np.asarray(decode_rgb(image)), pixels)
