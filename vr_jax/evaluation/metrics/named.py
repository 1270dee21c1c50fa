"""The metrics that score questions of one's own, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vr_jax.errors import UserError
from vr_jax.evaluation.metrics.anls import anls
from vr_jax.evaluation.metrics.contains import contains
from vr_jax.evaluation.metrics.exact import exact_match
from vr_jax.evaluation.metrics.letters import LETTERS, extract_letter
from vr_jax.evaluation.metrics.mmmu import chosen_option, open_answer_is_right
from vr_jax.evaluation.metrics.relaxed import relaxed_match
from vr_jax.evaluation.metrics.vqa import vqa_accuracy

Match = Callable[[str, str], bool]
# With fewer equal answers, no reply can get the whole score of VQA accuracy.
_VOTERS = 4


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: The name by which it is chosen.
        rule: What counts as right, in one sentence.
        score: Scores a reply from 0 to 1, given the reference answers and the texts of the choices.
        choices: Whether questions have choices. The reference answers are then their letters.
        problem: Says what is wrong with the reference answers of a question, or returns None.
        unparsed: Whether the metric finds no answer at all in a reply, given the texts of the choices.
    """

    name: str
    rule: str
    score: Callable[[str, Sequence[str], Sequence[str]], float]
    choices: bool = False
    problem: Callable[[Sequence[str]], str | None] = lambda answers: None
    unparsed: Callable[[str, Sequence[str]], bool] = lambda reply, choices: False


def _any(match: Match) -> Callable[[str, Sequence[str], Sequence[str]], float]:
    def score(reply: str, answers: Sequence[str], choices: Sequence[str]) -> float:
        del choices
        return float(any(match(reply, answer) for answer in answers))

    return score


def _too_few(answers: Sequence[str]) -> str | None:
    if len(answers) >= _VOTERS:
        return None
    return (
        f"the metric vqa compares a reply with the answers of several people, found {len(answers)}: expected at least "
        f"{_VOTERS}, and ten in VQA's data; use exact for questions with one answer"
    )


def _no_letter(answers: Sequence[str]) -> str | None:
    wrong = [answer for answer in answers if answer.strip().upper() not in LETTERS]
    if not wrong:
        return None
    return (
        f"the metric letter expects one of the letters {', '.join(LETTERS)} as the answer, found {wrong[0]!r}; use "
        "choice for a question with a list of choices, or exact"
    )


_ALL = (
    Metric(
        "exact",
        "the reply equals an answer, whatever the case and ASCII punctuation",
        _any(exact_match),
    ),
    Metric(
        "relaxed",
        "a number within 5 % of an answer, or the same text whatever the case",
        _any(relaxed_match),
    ),
    Metric(
        "anls",
        "the similarity to the closest answer by edit distance, 0 below 0.5",
        lambda reply, answers, choices: anls(reply, answers),
    ),
    Metric(
        "vqa",
        "how many of several people gave the same answer",
        lambda reply, answers, choices: vqa_accuracy(reply, answers),
        problem=_too_few,
    ),
    Metric(
        "contains",
        "the reply contains an answer, whatever the case",
        _any(contains),
    ),
    Metric(
        "open",
        "the part of the reply that concludes contains an answer, or a number equal to it to two decimals",
        _any(open_answer_is_right),
    ),
    Metric(
        "letter",
        "the reply names the letter A to D of the answer; the question itself lists the options",
        _any(lambda reply, answer: extract_letter(reply) == answer.strip().upper()),
        problem=_no_letter,
        unparsed=lambda reply, choices: extract_letter(reply) == "",
    ),
    Metric(
        "choice",
        "the reply names the letter or the text of the right choice",
        lambda reply, answers, choices: float(chosen_option(reply, choices) in answers),
        choices=True,
        unparsed=lambda reply, choices: chosen_option(reply, choices) is None,
    ),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def get_metric(name: str, where: str = "metric") -> Metric:
    """Returns a metric.

    Args:
        name: A key of `METRICS`.
        where: What names the metric, for the message.

    Raises:
        UserError: The metric is unknown. The message lists the known ones.
    """
    if name in METRICS:
        return METRICS[name]
    near = difflib.get_close_matches(name, METRICS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"{where}: unknown metric {name!r}; {hint}known: {', '.join(METRICS)}")
