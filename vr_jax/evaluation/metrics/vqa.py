"""VQA accuracy (Antol et al. 2015), the metric of TextVQA, with the text normaliser of EvalAI."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32  # The reference passes a regular-expression flag with this value as the number of replacements.
_ARTICLES = frozenset({"a", "an", "the"})
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)} | {"none": "0"}

_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_TWO_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've 'ow's'at y'all'd've
"""


def _without_one(form: str) -> list[str]:
    """Returns the word with each of its apostrophes removed in turn."""
    return [form[:i] + form[i + 1 :] for i, character in enumerate(form) if character == "'"]


_CONTRACTIONS = {
    **{form.replace("'", ""): form for form in _ONE_APOSTROPHE.split()},
    **{bare: form for form in _TWO_APOSTROPHES.split() for bare in _without_one(form)},
    "somebody'd": "somebodyd",  # This entry stands in the reference, reversed as it is.
}


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Scores a prediction by how many people gave the same answer.

    Each person is left out in turn, and the prediction earns a third for each of the other people who gave it, at most
    1. The score is the mean over the people left out. Texts are compared after `normalised`.

    Args:
        prediction: The text that the model answered.
        answers: The answers of several people (ten in TextVQA).

    Returns:
        A score from 0 to 1. Without answers, 0.

    Source: docs/design/benchmarks.md#textvqa; lmms-eval 0.7.3, `lmms_eval/tasks/textvqa/utils.py`.
    """
    if not answers:
        return 0.0
    found = normalised(prediction)
    same = [normalised(answer) == found for answer in answers]
    accuracies = [min(1.0, (sum(same) - one) / 3) for one in same]
    return statistics.mean(accuracies)


def normalised(text: str) -> str:
    """Normalises an answer: lower case, no articles, digits for number words, contractions with their apostrophes.

    Source: docs/design/benchmarks.md#vqa-normaliser; lmms-eval 0.7.3,
    `lmms_eval/tasks/_task_utils/vqa_eval_metric.py:EvalAIAnswerProcessor`.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    text = _without_punctuation(text)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Deletes a punctuation mark everywhere if it stands beside a space somewhere, and else makes it a space."""
    beside_space = {mark for mark in _PUNCTUATION if f"{mark} " in text or f" {mark}" in text}
    table = str.maketrans({mark: "" if mark in beside_space else " " for mark in _PUNCTUATION})
    return _FULL_STOP.sub("", text.translate(table), count=_FULL_STOPS)
