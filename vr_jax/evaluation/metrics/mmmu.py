"""Reading of replies to MMMU's questions (Yue et al. 2024): the chosen option, and open answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

_STRIPPED = (",", ".", "!", "?", ";", ":", "'")  # The reference strips them once, in this order.
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_FEW_WORDS = 5

# These patterns match what the reference's patterns match. They are written such that a long run of digits is not read
# again from each of its digits, which would take quadratic time.
_COMMA_NUMBER = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?(?<!\d)\d++(?:\.\d++)?[eE][+-]?\d++")
_PLAIN = re.compile(r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d)(?![,\d])")


def chosen_option(reply: str, options: Sequence[str]) -> str | None:
    """Finds the option that a reply to a multiple-choice question names.

    Letters in parentheses count first, then letters before a space, then letters before a full stop. If no letter is
    found and the reply has more than five words, the texts of the options are looked for. Where several options are
    named, the last one in the reply counts.

    Args:
        reply: The reply of the model.
        options: The texts of the options, in the order of their letters.

    Returns:
        The option's letter ("A" for the first), or None if the reply names no option. There, lmms-eval draws an option
        at random.

    Source: docs/design/benchmarks.md#mmmu; lmms-eval 0.7.3,
    `lmms_eval/tasks/mmmu/utils.py:parse_multi_choice_response`.
    """
    for mark in _STRIPPED:
        reply = reply.strip(mark)
    text = f" {reply} "
    letters = [chr(ord("A") + number) for number in range(len(options))]
    # The form in which letters are looked for, and the form whose position orders them if there are several.
    for searched, ordered_by in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        candidates = [letter for letter in letters if searched.format(letter) in text]
        if candidates:
            return max(candidates, key=lambda letter: text.rfind(ordered_by.format(letter)))
    if len(text.split()) <= _FEW_WORDS:
        return None
    lower = text.lower()
    places = {letter: lower.rfind(option.lower()) for letter, option in zip(letters, options, strict=True)}
    return max((letter for letter in letters if places[letter] >= 0), key=places.__getitem__, default=None)


def open_answer_is_right(reply: str, answer: str) -> bool:
    """Says whether a reply to an open question contains the answer.

    A numeric answer is compared with the numbers in the reply, rounded to two decimals. Another answer must occur
    inside one of the candidate texts of the reply.

    Source: docs/design/benchmarks.md#mmmu; lmms-eval 0.7.3, `lmms_eval/tasks/mmmu/utils.py:parse_open_response`.
    """
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
    """Returns the parts of a reply that may be the answer, and all numbers in these parts.

    A part is what follows the last indicator ("so ", "is ", ...) of a line. Without any indicator, the whole reply is
    the only part.
    """
    reply = reply.strip().strip(".").lower()
    lines = reply.split("\n")
    tails = []
    for number, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        shortest = ""
        for indicator in indicators:
            if indicator in line:
                tail = line.rpartition(indicator)[2].strip()
                # As in the reference, an empty tail is replaced by that of the next indicator.
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in _TRIVIAL:
            tails.append(shortest)
    texts = tails or [reply]
    return texts + [number for text in texts for number in numbers_in(text)]


def numbers_in(text: str) -> list[str]:
    """Finds numbers with comma-separated thousands, then those in scientific notation, then plain ones."""
    return [number for pattern in (_COMMA_NUMBER, _SCIENTIFIC, _PLAIN) for number in pattern.findall(text)]


def _comparable(text: str) -> list[str | float]:
    """Converts a text to a number rounded to two decimals, or else to lower case.

    A single character becomes two texts with a space before or after it, so that it is not found inside a word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
