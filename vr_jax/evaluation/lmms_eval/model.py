"""The model class that lmms-eval loads. This module can only be imported where lmms-eval and torch are installed."""

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
    """A vr_jax model directory as a "simple" model of lmms-eval.

    lmms-eval writes the prompts, provides the images and scores the replies. One process drives all devices.
    """

    is_simple = True

    def __init__(self, **arguments: Any):
        """Loads the checkpoint.

        Args:
            arguments: The fields of `Options`, and what lmms-eval adds from its own flags.

        Raises:
            UserError: An argument is wrong, there are several processes, or the checkpoint cannot be loaded.
        """
        super().__init__()
        self.options = Options.of(arguments)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or jax.process_count() > 1:
            raise UserError(
                "vr_jax drives all devices of a machine from one process; start lmms_eval with python, not with "
                "torchrun or accelerate launch (on several hosts, use vr-jax eval)"
            )
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every step of a restore.
        directory = self.options.checkpoint
        config = with_pruning(read_config(directory), self.options.pruning)
        self.mesh = make_mesh(self.options.replica, self.options.fsdp, self.options.tensor)
        loaded = load_for_inference(directory, self.mesh, config=config, dtype=self.options.dtype)
        with jax.set_mesh(self.mesh):
            generator = Generator(loaded.model, loaded.tokenizer, settings=loaded.generation)
            self.answerer = Answerer(generator, loaded.processor, batch_size=self.options.batch_size)
        self._warned: set[str] = set()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> VrJax:
        """Builds the model from the text of --model_args. lmms-eval calls this method.

        Wrong arguments end the program with one line. Otherwise lmms-eval would print a traceback and exit with status
        0, and it would fail for an argument that is in --model_args and is also one of its own flags.

        Args:
            arg_string: The text of --model_args, which wins over the flags.
            additional_config: The flags of lmms-eval that are set.
        """
        try:
            return cls(**dict(additional_config or {}) | simple_parse_args_string(arg_string))
        except UserError as error:
            raise SystemExit(f"lmms_eval: vr_jax: {error}") from error

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Returns the replies in the order of the requests.

        A request that cannot be asked gets an empty reply, and the log says why.
        """
        questions, settings = [], []
        for request in requests:
            text, kwargs, visuals, doc_id, task, split = request.args
            settings.append(self._settings(task, kwargs))
            questions.append(self._question(text, visuals, doc_id, task, split))
        with jax.set_mesh(self.mesh):
            answers = self.answerer.answer(questions, settings)
        return [GenerationResult(one.text, TokenCounts(one.input_tokens, one.output_tokens)) for one in answers]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Returns the loss of each request and whether it is greedy, as the LLaVA classes of lmms-eval do.

        `Likelihood` explains why the loss is returned and not the log-probability.
        """
        questions, continuations = [], []
        for request in requests:
            # The requests for unconditional likelihoods (acc_mutual_info) have only two arguments.
            text, target, *rest = request.args
            visuals, doc_id, task, split = rest or (None, request.doc_id, request.task_name, "")
            target = target(self.task_dict[task][split][doc_id]) if callable(target) else target
            questions.append(self._question(text, visuals, doc_id, task, split))
            continuations.append(str(target))
        with jax.set_mesh(self.mesh):
            scores = self.answerer.score(questions, continuations)
        # lmms-eval 0.7.3 converts a plain pair to a text (`unwrap_generation_output`), on which its scoring then fails.
        return [GenerationResult((one.loss, one.greedy)) for one in scores]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuses tasks of several rounds.

        Raises:
            NotImplementedError: Always; lmms-eval expects this class.
        """
        tasks = sorted({str(request.task_name) for request in requests})
        raise NotImplementedError(
            f"vr_jax does not answer tasks of several rounds ({', '.join(tasks)}); leave them out, or have a "
            "conversation by hand with vr-jax chat"
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
            self._warn(f"{task}: the generation settings {ignored} have no effect, because vr_jax does not have them")
        if options.max_new_tokens is None and (asked := capped(kwargs)):
            self._warn(
                f"{task} asks for up to {asked} new tokens, but at most {settings.max_new_tokens} are generated; "
                "--model_args max_new_tokens=N sets another limit"
            )
        return settings

    def _warn(self, text: str) -> None:
        """Logs a warning once, and not again for every request."""
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)
