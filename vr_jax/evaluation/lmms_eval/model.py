"""The model class that lmms-eval loads. Importing it needs lmms-eval (and the torch it imports)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string

from vr_jax.errors import UserError
from vr_jax.evaluation.lmms_eval.answers import Answerer
from vr_jax.evaluation.lmms_eval.options import Options
from vr_jax.evaluation.lmms_eval.questions import Question, Settings, capped, settings_of, without_effect
from vr_jax.inference import Generator, load_for_inference, with_pruning
from vr_jax.model_directory import read_config
from vr_jax.sharding import make_mesh

logger = logging.getLogger("vr_jax.evaluation")


class VrJax(lmms):
    """A vr_jax model directory as a "simple" model: lmms-eval writes the prompt, hands out the images and scores.

    Arguments: see `Options`, plus what lmms-eval adds from its own flags. One process drives all devices. Raises
    UserError with a text for the user."""

    is_simple = True

    def __init__(self, **arguments: Any):
        super().__init__()
        self.options = Options.of(arguments)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or jax.process_count() > 1:
            raise UserError(
                "vr_jax drives all devices of a machine from one process: start lmms_eval with python, not with "
                "torchrun or accelerate launch (several hosts: use eval.py)"
            )
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates each restore
        directory = self.options.checkpoint
        config = with_pruning(read_config(directory), self.options.pruning)
        self.mesh = make_mesh(self.options.replica, self.options.fsdp, self.options.tensor)
        loaded = load_for_inference(directory, self.mesh, config=config, dtype=self.options.dtype)
        with jax.set_mesh(self.mesh):
            generator = Generator(loaded.model, loaded.tokenizer)
            self.answerer = Answerer(generator, loaded.processor, batch_size=self.options.batch_size)
        self._warned: set[str] = set()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> VrJax:
        """What lmms-eval calls with --model_args and its own flags, which --model_args win over (it always has a
        --batch_size).

        Wrong arguments end the program with one line and exit status 1: lmms-eval would print a traceback, exit with
        0, and for an argument in both places complain of Python."""
        try:
            return cls(**dict(additional_config or {}) | simple_parse_args_string(arg_string))
        except (UserError, OSError) as error:
            raise SystemExit(f"lmms_eval: vr_jax: {error}") from error

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Replies in the order of the requests; an empty one, and a line in the log, for a request that cannot be
        asked."""
        questions, settings = [], []
        for request in requests:
            text, kwargs, visuals, doc_id, task, split = request.args
            settings.append(self._settings(task, kwargs))
            questions.append(self._question(text, visuals, doc_id, task, split))
        with jax.set_mesh(self.mesh):
            answers = self.answerer.answer(questions, settings)
        return [GenerationResult(one.text, TokenCounts(one.input_tokens, one.output_tokens)) for one in answers]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """(loss, greedy) per request: the *loss*, as lmms-eval's own LLaVA classes return; see `Likelihood`."""
        questions, continuations = [], []
        for request in requests:
            # Two arguments only for the unconditional likelihoods of acc_mutual_info.
            text, target, *rest = request.args
            visuals, doc_id, task, split = rest or (None, request.doc_id, request.task_name, "")
            target = target(self.task_dict[task][split][doc_id]) if callable(target) else target
            questions.append(self._question(text, visuals, doc_id, task, split))
            continuations.append(str(target))
        with jax.set_mesh(self.mesh):
            scores = self.answerer.score(questions, continuations)
        # lmms-eval 0.7.3 turns a bare pair into a text (`unwrap_generation_output`), on which its scoring then fails.
        return [GenerationResult((one.loss, one.greedy)) for one in scores]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        tasks = sorted({str(request.task_name) for request in requests})
        raise NotImplementedError(
            f"vr_jax does not answer tasks of several rounds ({', '.join(tasks)}): leave them out; for a conversation "
            "by hand use vr-jax chat"
        )

    def _question(self, text: Any, visuals: Any, doc_id: Any, task: str, split: str) -> Question:
        def images() -> Any:
            return None if visuals is None else visuals(self.task_dict[task][split][doc_id])

        return Question(f"{task}/{split}/{doc_id}", str(text[0] if isinstance(text, list) else text), images)

    def _settings(self, task: str, kwargs: Mapping[str, Any]) -> Settings:
        options = self.options
        settings = settings_of(
            kwargs, max_new_tokens=options.max_new_tokens, seed=options.seed, cut_at_until=options.cut_at_until
        )
        if ignored := without_effect(kwargs):
            self._warn(f"{task}: vr_jax has no {ignored}; these generation settings have no effect")
        if options.max_new_tokens is None and (asked := capped(kwargs)):
            self._warn(
                f"{task} asks for {asked} new tokens, {settings.max_new_tokens} are generated; "
                "--model_args max_new_tokens=N sets another limit"
            )
        return settings

    def _warn(self, text: str) -> None:
        """Once, not for every request."""
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)
