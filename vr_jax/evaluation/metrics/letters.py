"""The letter that a reply to a multiple-choice question names, for RealWorldQA and MMStar."""

from __future__ import annotations

LETTERS = ("A", "B", "C", "D")

# lmms-eval lists a phrase with and without its leading "the". Both entries find the same letters.
PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is"),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_STRIPPED = (",", ".", "!", "?", ";", ":", "'", '"')  # The reference strips them once, in this order.
_FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_START_WEIGHT, _END_WEIGHT, _PHRASE_WEIGHT, _ANYWHERE_WEIGHT = 10, 9, 7, 0


def extract_letter(reply: str) -> str:
    """Finds the letter that a reply names.

    A letter may appear in several forms, e.g. at the start, at the end, after "the answer is", or as "(B)". The form of
    the highest weight decides. Among letters in forms of the same weight, the last one in the text decides.

    Args:
        reply: The reply of the model. Only upper-case letters A to D are found.

    Returns:
        One of `LETTERS`, or "" if the reply names none.

    Source: docs/design/benchmarks.md#letter-extractor; lmms-eval 0.7.3, `lmms_eval/tasks/_task_utils/mcq_extract.py`.
    """
    text = reply.strip()
    for mark in _STRIPPED:
        text = text.strip(mark)
    bare = text.strip()
    if not bare:
        return ""
    text = f" {text} "
    found: list[tuple[int, int, str]] = []  # (weight, position, letter)
    for form, weight in _FORMS:
        for letter in LETTERS:
            position = text.rfind(form.format(letter))
            if position >= 0:
                found.append((weight, position, letter))
    lower = text.lower()
    for phrase in PHRASES:
        start = lower.find(phrase)
        if start >= 0:
            positions = ((text.find(letter, start + len(phrase)), letter) for letter in LETTERS)
            found += [(_PHRASE_WEIGHT, position, letter) for position, letter in positions if position >= 0]
    at_start = [letter for letter in LETTERS if bare[0] == letter and not bare[1:2].isalpha()]
    at_end = [letter for letter in LETTERS if bare[-1] == letter and not bare[-2:-1].isalpha()]
    found += [(_START_WEIGHT, 0, letter) for letter in at_start]
    found += [(_END_WEIGHT, len(text) - 1, letter) for letter in at_end]
    if not found:
        found = [(_ANYWHERE_WEIGHT, text.rfind(letter), letter) for letter in LETTERS if letter in text]
    return max(found, key=lambda one: one[:2], default=(0, 0, ""))[2]
