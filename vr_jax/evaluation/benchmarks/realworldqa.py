"""RealWorldQA (xAI 2024): questions about photographs of everyday scenes.

The data are `lmms-lab/RealWorldQA`, split test, with 765 rows. A row has a question that contains its options and its
instruction, an answer (a letter, a number or a word), and an image. Prompts and scores are those of lmms-eval; the two
profiles read replies in different ways (docs/design/benchmarks.md#realworldqa).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, override

from vr_jax.evaluation.benchmarks.published import PublishedBenchmark, letter
from vr_jax.evaluation.interface import Item, Published
from vr_jax.evaluation.metrics.exact import exact_match
from vr_jax.evaluation.metrics.letters import LETTERS, extract_letter
from vr_jax.evaluation.tables import Column, text

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)}
_OPTION = re.compile(r"\b[A-Z]\.\s+([^\n]*)")
_PUNCTUATION = re.compile(r"[^\w\s]")


class RealWorldQA(PublishedBenchmark):
    """Questions whose answer is a letter (category "letter") or another text ("open")."""

    name = "realworldqa"
    title = "RealWorldQA"
    headline = "exact_match"
    group = "General"
    published = Published("lmms-lab/RealWorldQA", "test")
    columns = (Column("question", text), Column("answer", text))

    @override
    def category_of(self, record: Mapping[str, Any]) -> str:
        return "letter" if any(_is_letter(answer) for answer in self.answers_of(record)) else "open"

    @override
    def prompt(self, item: Item) -> str:
        return item.question.strip()

    @override
    def clean(self, reply: str) -> str:
        # lmms-eval 0.5.0 replaces number words before it strips the reply, and therefore leaves " two" as it is.
        is_number_word = self.profile == "v0.5" and reply.strip().lower() in _NUMBERS
        return reply if is_number_word else reply.strip()

    @override
    def score(self, prediction: str, item: Item) -> float:
        right = _is_right_v05 if self.profile == "v0.5" else _is_right
        return float(any(right(prediction, answer, item.question) for answer in item.answers))

    @override
    def unparsed(self, prediction: str, item: Item) -> bool:
        return self.profile != "v0.5" and item.category == "letter" and extract_letter(prediction) == ""


def _is_letter(answer: str) -> bool:
    return answer.strip().upper() in LETTERS


def _is_right(prediction: str, answer: str, question: str) -> bool:
    if _is_letter(answer):
        return extract_letter(prediction) == answer.strip().upper()
    return prediction.lower().strip().rstrip(".") == answer.strip().lower()


def _is_right_v05(prediction: str, answer: str, question: str) -> bool:
    """Applies the rule of lmms-eval up to 0.6: a number word becomes its digit, and an option becomes its letter."""
    found = _PUNCTUATION.sub("", _NUMBERS.get(prediction.lower(), prediction)).strip()
    options = [option.strip() for option in _OPTION.findall(question)]
    letters = {option: letter(number) for number, option in enumerate(options)}
    match = re.search("|".join(map(re.escape, options)), found)
    if match and match[0] in letters:
        found = letters[match[0]]
    return exact_match(found, answer)
