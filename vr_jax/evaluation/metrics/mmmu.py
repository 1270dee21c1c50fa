"""What MMMU (Yue et al. 2024) reads out of a reply, as lmms-eval 0.7.3 does."""

from __future__ import annotations

import re
from collections.abc import Sequence

_STRIPPED = (",", ".", "!", "?", ";", ":", "'")  # one pass, in this order
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")

# The reference's patterns, written so that long runs of digits are not read again from each of their digits.
_COMMA_NUMBER = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?(?<!\d)\d++(?:\.\d++)?[eE][+-]?\d++")
_PLAIN = re.compile(r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d)(?![,\d])")


def chosen_option(reply: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a reply to a multiple-choice question names (the last one named), or None if it
    names none: there the reference draws one at random."""
    for mark in _STRIPPED:
        reply = reply.strip(mark)
    text = f" {reply} "
    letters = [chr(ord("A") + number) for number in range(len(options))]
    # How a letter is found, and where it counts as standing if several are.
    for found, standing in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        candidates = [letter for letter in letters if found.format(letter) in text]
        if candidates:
            return max(candidates, key=lambda letter: text.rfind(standing.format(letter)))
    if len(text.split()) <= 5:
        return None
    lower = text.lower()
    places = {letter: lower.rfind(option.lower()) for letter, option in zip(letters, options, strict=True)}
    return max((letter for letter in letters if places[letter] >= 0), key=places.__getitem__, default=None)


def open_answer_is_right(reply: str, answer: str) -> bool:
    """Whether a reply to an open question holds the answer: as a number, rounded to two decimals, or inside a text."""
    wanted = _comparable(answer)
    texts = [one for one in wanted if isinstance(one, str)]
    for candidate in (one for part in _candidates(reply) for one in _comparable(part)):
        if isinstance(candidate, str):
            if any(text in candidate for text in texts):
                return True
        elif candidate in wanted:
            return True
    return False


def _candidates(reply: str) -> list[str]:
    """What may be the answer: the end of each line after its last indicator (else the whole reply), and all numbers
    in these."""
    reply = reply.strip().strip(".").lower()
    lines = reply.split("\n")
    tails = []
    for number, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        shortest = ""
        for indicator in indicators:
            if indicator in line:
                tail = line.rpartition(indicator)[2].strip()
                if not shortest or len(tail) < len(shortest):  # an empty tail gives way to the next one
                    shortest = tail
        if shortest and shortest not in _TRIVIAL:
            tails.append(shortest)
    texts = tails or [reply]
    return texts + [number for text in texts for number in numbers_in(text)]


def numbers_in(text: str) -> list[str]:
    """All numbers: with comma-separated thousands, in scientific notation, plain."""
    return [number for pattern in (_COMMA_NUMBER, _SCIENTIFIC, _PLAIN) for number in pattern.findall(text)]


def _comparable(text: str) -> list[str | float]:
    """A number to two decimals, or a text in lower case; a single character must have a space at its side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
