"""RealWorldQA (xAI 2024) as lmms-eval scores it.

Data: `lmms-lab/RealWorldQA`, split test, 765 rows of question (with its options and its own instruction), answer (a
letter, a number or a word), image. The profiles read replies in different ways.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vr_jax.evaluation.benchmarks.published import PublishedBenchmark, letter
from vr_jax.evaluation.metrics.exact import exact_match
from vr_jax.evaluation.metrics.letters import LETTERS, extract_letter
from vr_jax.evaluation.tables import Column, text
from vr_jax.evaluation.types import Item, Published

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)}
_OPTION = re.compile(r"\b[A-Z]\.\s+([^\n]*)")
_PUNCTUATION = re.compile(r"[^\w\s]")


class RealWorldQA(PublishedBenchmark):
    name = "realworldqa"
    title = "RealWorldQA"
    headline = "exact_match"
    group = "General"
    published = Published("lmms-lab/RealWorldQA", "test")
    columns = (Column("question", text), Column("answer", text))

    def category_of(self, record: Mapping[str, Any]) -> str:
        return "letter" if any(_is_letter(answer) for answer in self.answers_of(record)) else "open"

    def prompt(self, item: Item) -> str:
        return item.question.strip()

    def clean(self, reply: str) -> str:
        # 0.5.0 looks number words up before it strips a reply, so that " two" is none.
        words = self.profile == "v0.5" and reply.strip().lower() in _NUMBERS
        return reply if words else reply.strip()

    def score(self, prediction: str, item: Item) -> float:
        right = _is_right_v05 if self.profile == "v0.5" else _is_right
        return float(any(right(prediction, answer, item.question) for answer in item.answers))

    def unparsed(self, prediction: str, item: Item) -> bool:
        return self.profile != "v0.5" and item.category == "letter" and extract_letter(prediction) == ""


def _is_letter(answer: str) -> bool:
    return answer.strip().upper() in LETTERS


def _is_right(prediction: str, answer: str, question: str) -> bool:
    if _is_letter(answer):
        return extract_letter(prediction) == answer.strip().upper()
    return prediction.lower().strip().rstrip(".") == answer.strip().lower()


def _is_right_v05(prediction: str, answer: str, question: str) -> bool:
    """lmms-eval up to 0.6: a number word is its digit, the text of an option its letter."""
    found = _PUNCTUATION.sub("", _NUMBERS.get(prediction.lower(), prediction)).strip()
    options = [option.strip() for option in _OPTION.findall(question)]
    letters = {option: letter(number) for number, option in enumerate(options)}
    match = re.search("|".join(map(re.escape, options)), found)
    if match and match[0] in letters:
        found = letters[match[0]]
    return exact_match(found, answer)
