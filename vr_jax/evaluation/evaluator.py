"""The evaluation of parameters that another part of the program holds, such as those of a running training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vr_jax.data.processor import Processor
from vr_jax.evaluation.interface import Benchmark, Item, ItemResult
from vr_jax.evaluation.runner import Evaluation, evaluate_items
from vr_jax.inference import Buckets, Generator, memory_errors
from vr_jax.model.vlm import VisionLanguageModel, abstract_model
from vr_jax.model_directory import GenerationSettings
from vr_jax.storage import Path


class Evaluator:
    """Answers and scores items with parameters as they lie on the devices.

    The parameters are neither copied nor cast nor moved: the compiled programs take the arrays themselves. While the
    decode program runs, its temporaries hold the decoder's parameters in the type of the activations if they are stored
    in another one, because XLA casts them once in front of the loop. Compiled for one TPU v5e, these are 0.84 GiB for
    the 494 million parameters of Qwen2-0.5B in float32, less than the gradients of an update, which do not exist then.

    The programs are compiled at the first call for each size of prompts, and later calls with other parameters use them
    again. Between calls, no parameter is referred to.

    Attributes:
        processor: The processor of the model.
    """

    def __init__(
        self,
        processor: Processor,
        *,
        buckets: Buckets | None = None,
        settings: GenerationSettings | None = None,
    ):
        """Prepares the evaluation of models of one config; nothing is compiled or allocated.

        Args:
            processor: The processor of the model, whose config is that of the models.
            buckets: The static sizes that prompts are padded to; by default `Buckets.of` the model.
            settings: The tokens that end a reply, and what changes the logits; by default those that end a reply in the
                model's chat format, and nothing.

        Raises:
            UserError: The tokenizer has no stop token.
        """
        self.processor = processor
        self._generator = Generator(
            abstract_model(processor.config), processor.tokenizer, buckets, settings=settings, unstack=False
        )

    @property
    def programs(self) -> int:
        """The number of programs that were compiled so far."""
        return sum(self._generator.compilations.values())

    def evaluate(
        self,
        model: VisionLanguageModel,
        benchmark: Benchmark,
        items: Sequence[Item],
        *,
        output: Path | None = None,
        batch_size: int = 16,
        max_new_tokens: int | None = None,
        overwrite: bool = True,
        progress: bool = False,
        on_batch: Callable[[Sequence[ItemResult]], None] | None = None,
    ) -> Evaluation:
        """Answers items by greedy decoding and scores the answers; see `evaluate_items`.

        All processes call it together, under `jax.set_mesh` of the mesh that the parameters are sharded over.

        Args:
            model: The parameters, e.g. `ModelTree.build` of those of a training state. They must not be donated to
                another program before the function returns.
            benchmark: The benchmark.
            items: Its items, which have different ids.
            output: A folder for the results. None writes nothing.
            batch_size: The number of items in a batch, over all processes. It is rounded up to fill the mesh.
            max_new_tokens: The largest number of tokens of a reply. None is the benchmark's own.
            overwrite: Whether results in `output` are replaced. Otherwise an interrupted evaluation with the same
                settings continues, and the caller answers for the parameters being the same.
            progress: Whether the first process shows a progress bar on standard error.
            on_batch: A function that the first process calls with the results of each batch.

        Returns:
            The results and the summary, on every process. `summary["score"]` is the score from 0 to 100, or None where
            the items have no reference answers, and `summary["metrics"]` has the metrics by name.

        Raises:
            UserError: There are no items, or the memory of the devices does not suffice.
            NothingAsked: None of the items can be asked.
            ValueError: The config of the model is not that of the processor.
        """
        with memory_errors():
            return evaluate_items(
                self._generator.with_model(model),
                self.processor,
                benchmark,
                items,
                output,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                overwrite=overwrite,
                progress=progress,
                on_batch=on_batch,
            )
