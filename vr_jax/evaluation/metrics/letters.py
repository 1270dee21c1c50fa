"""The letter of a multiple-choice reply (lmms-eval since April 2026: RealWorldQA and MMStar)."""

from __future__ import annotations

LETTERS = ("A", "B", "C", "D")

# A phrase with "the" is found with and without it: both entries give the same candidates.
PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is"),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_STRIPPED = (",", ".", "!", "?", ";", ":", "'", '"')  # one pass, in this order
_FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_PHRASE, _START, _END = 7, 10, 9


def extract_letter(reply: str) -> str:
    """One of A-D (upper-case only), or "" if there is none.

    A letter may stand in several forms; the one of the highest weight counts, among equals the last in the text."""
    text = reply.strip()
    for mark in _STRIPPED:
        text = text.strip(mark)
    bare = text.strip()
    if not bare:
        return ""
    text = f" {text} "
    found: list[tuple[int, int, str]] = []  # weight, position, letter
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
            found += [(_PHRASE, position, letter) for position, letter in positions if position >= 0]
    found += [(_START, 0, letter) for letter in LETTERS if bare[0] == letter and not bare[1:2].isalpha()]
    found += [(_END, len(text) - 1, letter) for letter in LETTERS if bare[-1] == letter and not bare[-2:-1].isalpha()]
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in LETTERS if letter in text]
    return max(found, key=lambda one: one[:2], default=(0, 0, ""))[2]
