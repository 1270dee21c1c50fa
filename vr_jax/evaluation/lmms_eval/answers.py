"""Answers and likelihoods for the requests of any tasks, computed in batches of one length bucket."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from vr_jax.data.processor import Processor
from vr_jax.data.types import Example
from vr_jax.evaluation import batching
from vr_jax.evaluation.lmms_eval.likelihood import Likelihood
from vr_jax.evaluation.lmms_eval.questions import AsAsked, Question, QuestionItems, Settings, header
from vr_jax.evaluation.runner import rows_per_process
from vr_jax.inference import Generator

logger = logging.getLogger("vr_jax.evaluation")


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        text: The reply of the model, or an empty text if the question cannot be asked.
        input_tokens: The number of tokens of the prompt, vision tokens included.
        output_tokens: The number of tokens of the reply.
        problem: The reason why the question cannot be asked, or None.
    """

    text: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Score:
    """The likelihood of a continuation.

    Attributes:
        loss: The mean negative log-probability of its tokens in nats. It is infinite if the question cannot be asked.
        greedy: Whether the model would answer with exactly this continuation.
    """

    loss: float
    greedy: bool


class Answerer:
    """Answers requests with one model.

    Under `jax.set_mesh(mesh)` the rows of a batch are sharded over the axes "replica" and "fsdp".
    """

    def __init__(self, generator: Generator, processor: Processor, *, batch_size: int, progress: bool = True):
        """Prepares a model for requests.

        Args:
            generator: The model.
            processor: The processor of the model.
            batch_size: The number of requests in a batch, which is rounded up to fill the mesh.
            progress: Whether progress bars are shown on standard error.
        """
        buckets = generator.buckets
        self.generator = generator
        self.processor = dataclasses.replace(processor, max_tokens=buckets.max_tokens, max_tiles=buckets.max_tiles)
        self.rows = rows_per_process(batch_size)
        self.progress = progress
        self.workers = min(16, os.cpu_count() or 1)
        self._benchmark = AsAsked()
        self.likelihood = Likelihood(generator.model, processor.encoder.reply("A")[1])

    def answer(self, questions: Sequence[Question], settings: Sequence[Settings]) -> list[Answer]:
        """Answers questions.

        Args:
            questions: The questions.
            settings: The generation settings of each question.

        Returns:
            The answers in the order of the questions. A question that cannot be asked has an empty answer, and the log
            says why.
        """
        items = QuestionItems(questions)
        sizes = self.sizes(questions)
        answers: dict[int, Answer] = {}
        with self._bar("answers", len(items)) as bar:
            for chosen, numbers in grouped(settings).items():
                for prepared in self._prepared(items, {number: sizes[number] for number in numbers}):
                    prompts, problems = _split(prepared)
                    answers |= {number: Answer(problem=problem) for number, problem in problems.items()}
                    replies = (
                        self.generator.generate_rows(
                            prompts, max_new_tokens=chosen.max_new_tokens, sampling=chosen.sampling, rows=self.rows
                        )
                        if prompts
                        else {}
                    )
                    for number, reply in replies.items():
                        text = chosen.cut(reply.text)
                        answers[number] = Answer(text, len(prompts[number].tokens), len(reply.tokens))
                    bar.update(len(prepared))
        self._log(questions, {number: answer.problem for number, answer in answers.items() if answer.problem})
        return [answers[number] for number in range(len(questions))]

    def score(self, questions: Sequence[Question], continuations: Sequence[str]) -> list[Score]:
        """Computes the likelihood of one continuation per question; see `Likelihood`.

        Args:
            questions: The questions.
            continuations: The continuation of each question.

        Returns:
            The likelihoods in the order of the questions.

        Raises:
            UserError: The model has a pruner.
        """
        self.likelihood.check()
        items = QuestionItems(questions)
        tokens = [self.likelihood.tokens(self.processor, text) for text in continuations]
        sizes = self.sizes(questions)
        longer = {number: (size[0] + len(tokens[number]), size[1]) for number, size in sizes.items()}
        scores: dict[int, Score] = {}
        found: dict[int, str] = {}
        with self._bar("likelihoods", len(items)) as bar:
            for prepared in self._prepared(items, longer):
                prompts, problems = _split(prepared)
                for number, prompt in list(prompts.items()):
                    if len(prompt.tokens) + len(tokens[number]) > self.generator.buckets.max_tokens:
                        problems[number] = f"too_long: the prompt and its continuation have {longer[number][0]} tokens"
                        del prompts[number]
                found |= problems
                scores |= {number: Score(float("inf"), False) for number in problems}
                chosen = [(prompts[number], tokens[number]) for number in prompts]
                rows = self.likelihood(chosen, self.rows, self.generator.buckets) if chosen else []
                scores |= {number: Score(*row) for number, row in zip(prompts, rows, strict=True)}
                bar.update(len(prepared))
        self._log(questions, found)
        return [scores[number] for number in range(len(questions))]

    def _bar(self, what: str, total: int) -> Any:
        return tqdm(total=total, unit="request", desc=f"vr_jax: {what}", disable=not self.progress)

    def sizes(self, questions: Sequence[Question]) -> dict[int, tuple[int, int]]:
        """Computes the number of tokens and tiles of every prompt, by its place, without decoding an image."""
        items = QuestionItems(questions, header)

        def size(number: int) -> tuple[int, int]:
            return batching.prompt_size(self.processor, self._benchmark, items[number])

        with (
            ThreadPoolExecutor(self.workers, thread_name_prefix="measure") as pool,
            self._bar("sizes", len(items)) as bar,
        ):
            sizes = {}
            for number, found in enumerate(pool.map(size, range(len(items)))):
                sizes[number] = found
                bar.update()
        return sizes

    def _prepared(
        self, items: QuestionItems, sizes: Mapping[int, tuple[int, int]]
    ) -> Iterator[dict[int, Example | str]]:
        batches = batching.batches(sizes, self.generator.buckets, self.rows)
        return batching.prepared(self.processor, self._benchmark, items, batches, workers=self.workers)

    def _log(self, questions: Sequence[Question], problems: Mapping[int, str]) -> None:
        problems = dict(sorted(problems.items()))
        for number, problem in problems.items():
            logger.warning("%s was not answered: %s", questions[number].name, " ".join(problem.split()))
        if problems:
            reasons = dict(Counter(problem.split(":")[0] for problem in problems.values()))
            logger.warning("%d of %d requests were not answered: %s", len(problems), len(questions), reasons)


def grouped(settings: Sequence[Settings]) -> dict[Settings, list[int]]:
    """Groups requests with equal settings, by their numbers, in the order in which the settings first appear."""
    groups: dict[Settings, list[int]] = {}
    for number, one in enumerate(settings):
        groups.setdefault(one, []).append(number)
    return groups


def _split(prepared: Mapping[int, Example | str]) -> tuple[dict[int, Example], dict[int, str]]:
    """Separates the prompts from the reasons why others cannot be asked."""
    prompts = {number: one for number, one in prepared.items() if isinstance(one, Example)}
    problems = {number: one for number, one in prepared.items() if isinstance(one, str)}
    return prompts, problems
