"""The metrics by themselves: known identities, independent formulations, and texts of any kind and length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vr_jax.evaluation.benchmarks import PAPER, get_benchmark
from vr_jax.evaluation.interface import PROFILES
from vr_jax.evaluation.metrics.anls import anls
from vr_jax.evaluation.metrics.exact import exact_match
from vr_jax.evaluation.metrics.letters import extract_letter
from vr_jax.evaluation.metrics.mmmu import chosen_option, numbers_in, open_answer_is_right
from vr_jax.evaluation.metrics.vqa import normalised, vqa_accuracy

TEXTS = st.text(st.characters(), max_size=30) | st.text("ABCD().: \n,'a1-%e", max_size=30)  # surrogates included
LONG = 100_000
RECORDS = {
    "gqa": {"question": "q", "answer": "left"},
    "mme": {"question": "q", "question_id": "1", "category": "count", "answer": "Yes"},
    "realworldqa": {"question": "Which?\n\nA. left\nB. right (now)\n", "answer": "B"},
    "scienceqa": {"question": "q", "choices": ["a", "b"], "answer": 1},
    "ai2d": {"question": "q", "options": ["a", "b"], "answer": "1"},
    "mmmu": {
        "id": "validation_Art_1",
        "question": "q",
        "options": "['a cat', 'b']",
        "question_type": "multiple-choice",
        "answer": "B",
    },
    "mmstar": {"question": "q", "answer": "B", "category": "c", "l2_category": "d"},
    "chartqa": {"type": "human_test", "question": "q", "answer": "12.5%"},
    "docvqa": {"question": "q", "answers": ["ITC Limited", "ITC"]},
    "textvqa": {"question": "q", "answers": ["stop"] * 10},
    "ocrbench": {"dataset": "HME100k", "question": "q", "question_type": "t", "answer": ["x ^ 2"]},
}


def test_every_benchmark_of_the_paper_has_a_record_here():
    assert set(RECORDS) == set(PAPER)


@pytest.mark.parametrize("profile", PROFILES)
@given(prediction=TEXTS)
@example(prediction="")
@example(prediction="\ud800 A")
@settings(max_examples=60, deadline=None)
def test_any_text_is_scored_between_0_and_1(profile, prediction):
    for name, record in RECORDS.items():
        benchmark = get_benchmark(name, profile)
        item = benchmark.item("0", record)
        cleaned = benchmark.clean(prediction)
        score = benchmark.score(cleaned, item)
        assert isinstance(score, float)
        assert 0 <= score <= 1
        if benchmark.unparsed(cleaned, item):
            assert score == 0


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    "piece",
    [
        "1",
        "1,",
        "1,111,",
        "1.1e",
        "-",
        ".",
        "A ",
        "(A",
        " ",
        "\n",
        "is ",
        "= ",
        "a",
        "\u017f",
        "answer is ",
        "'",
        "9" * 999 + "x",
    ],
)
def test_enormous_replies_take_linear_time(profile, piece):
    """A pattern that reads on from each character again would take hours; one copy of the reply takes nothing."""
    prediction = piece * (LONG // len(piece))
    for name, record in RECORDS.items():
        benchmark = get_benchmark(name, profile)
        items = [benchmark.item("0", record)]
        if name == "mmmu":
            items += [benchmark.item("1", record | {"question_type": "open"})]
        assert all(0 <= benchmark.score(benchmark.clean(prediction), item) <= 1 for item in items)


def edit_distance(a: str, b: str) -> int:
    """Fills the textbook table of edit distances between the prefixes of two texts."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, one in enumerate(a, 1):
        for j, other in enumerate(b, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (one != other))
    return int(table[-1, -1])


def reference_anls(prediction: str, answers: list[str]) -> float:
    """Computes ANLS step by step, as lmms-eval does."""
    distances = []
    for answer in answers:
        folded = [" ".join(one.strip().lower().split()) for one in (answer, prediction)]
        length = max(len(answer.upper()), len(prediction.upper()))
        distances.append(0.0 if length == 0 else edit_distance(*folded) / length)
    similarity = 1 - min(distances)
    return 0.0 if similarity < 0.5 else similarity


SIMILAR = st.text("abAB ß\t", max_size=12)  # Texts of few characters are often similar enough to score.


@given(prediction=SIMILAR | TEXTS, answers=st.lists(SIMILAR | TEXTS, min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_anls_equals_the_reference(prediction, answers):
    assert anls(prediction, answers) == reference_anls(prediction, answers)


def test_anls_of_long_texts():
    text = "abcdefghij" * 500
    assert anls(text, [text]) == 1
    assert anls(text[:100] + "X" + text[100:-1], [text]) == 1 - 2 / 5000
    assert anls("", [text]) == 0


def test_anls_divides_by_the_raw_length_and_keeps_one_half():
    assert anls("ab", ["abcd"]) == 0.5
    assert anls("ab", ["abcde"]) == 0
    assert anls("ITC  limited", ["itc limited"]) == 1
    assert anls("a  x", ["a y"]) == 1 - 1 / 4  # two spaces count in the length only
    assert anls("ab", []) == anls("", ["a"]) == 0
    assert anls("", [""]) == 1


def test_exact_match_folds_ascii_case_and_punctuation_only():
    assert exact_match("Traffic-Light.", "trafficlight")
    assert not exact_match("traffic light", "traffic-light")
    assert not exact_match("it\u2019s", "its")
    assert not exact_match("left ;", "left")
    assert exact_match("a\0", "a")  # NumPy's strings have no NUL at the end


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("", ""),
        ("b", ""),
        ("A or B", "A"),
        ("The best option is B, not A", "A"),
        ("Bananas", "B"),
        ("(C) because of A.", "A"),
        ("(C) because of A and so on", "C"),
        ("정답은 D 입니다", "D"),
        ("'C'", "C"),
        (".,", ""),
    ],
)
def test_letters(reply, letter):
    assert extract_letter(reply) == letter


def test_vqa_accuracy_leaves_one_out():
    for said, accuracy in [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]:
        assert vqa_accuracy("STOP", ["stop"] * said + ["go"] * (10 - said)) == pytest.approx(accuracy)
    assert vqa_accuracy("stop", []) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  cat's, two toys?", "cat 's 2 toys"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("its", "its"),
        ("a/b", "b"),  # the slash becomes a space, and "a" an article
        ("a/ b/c", "bc"),  # beside a space somewhere: deleted everywhere
        ("3.14 pm.", "3.14 pm"),
        ("." * 40, "." * 8),
    ],
)
def test_vqa_normaliser(text, expected):
    assert normalised(text) == expected


def test_mmmu_numbers_of_all_notations():
    assert numbers_in("1,234 and 1.5e3, -7 or .5") == ["1,234", "1.5e3", "234", "1", "-7", ".5"]
    assert numbers_in("x" * 10) == []


def test_mmmu_options():
    options = ["left hand", "right hand", "both"]
    assert chosen_option("(A) or (B)", options) == "B"
    assert chosen_option("C", options) == "C"
    assert chosen_option("I would say that it is the right hand", options) == "B"
    assert chosen_option("right hand", options) is None  # five words or fewer
    assert chosen_option("", options) is None


def test_mmmu_open_answers():
    assert open_answer_is_right("The answer is 3.141", "3.14")
    assert open_answer_is_right("so x = 1,000", "1000")
    assert not open_answer_is_right("31", "3")
    assert open_answer_is_right("It is a blue bird.", "Blue bird")
    assert not open_answer_is_right("abc", "b")  # a single character stands alone
