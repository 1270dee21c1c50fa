"""`vr-jax generate`: answers a JSONL file of questions and images in batches."""

from __future__ import annotations

from dataclasses import dataclass

from tqdm import tqdm

from vr_jax.cli.flags import Command, flag
from vr_jax.cli.shared import MAX_NEW_TOKENS, AnswerFlags, load_generator
from vr_jax.fields import PositiveInt
from vr_jax.inference import Sampling, answer_file, read_questions
from vr_jax.path_text import PathText
from vr_jax.storage import check_apart


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(AnswerFlags):
    """The flags of `vr-jax generate`."""

    input: PathText = flag(help="JSONL file of questions.", metavar="FILE.jsonl")
    output: PathText = flag(help="JSONL file to write. It appears when it is complete.", metavar="FILE.jsonl")
    batch_size: PositiveInt = flag(16, "Questions in a batch, over all devices.")


def run(flags: GenerateFlags) -> None:
    """Answers the questions, and says how many could not be asked."""
    check_apart(flags.output, [flags.input, flags.checkpoint], where="--output", source="--input or --checkpoint")
    sampling = Sampling(flags.temperature, flags.top_p, flags.seed)
    total = len(read_questions(flags.input))  # a malformed line is reported before the model is loaded
    with (
        load_generator(flags, all_devices=True) as (generator, processor),
        tqdm(total=total, unit="questions") as progress,
    ):
        summary = answer_file(
            generator,
            processor,
            flags.input,
            flags.output,
            batch_size=flags.batch_size,
            max_new_tokens=flags.max_new_tokens or generator.settings.max_new_tokens or MAX_NEW_TOKENS,
            sampling=sampling,
            on_batch=progress.update,
        )
    print(f"wrote {summary.answers} answers to {flags.output}")
    if summary.errors:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(summary.errors.items()))
        print(f"{summary.errors.total()} of {total} questions could not be asked ({reasons}); 'error' says why")


COMMAND = Command(
    summary="Answer a JSONL file of questions and images in batches.",
    flags=GenerateFlags,
    run=run,
    details="""A line of the input is {"id": ..., "question": ..., "image": PATH}. Several images are "images": [PATH,
    ...], and a conversation is "turns": [{"role": "user", "text": ...}, {"role": "assistant", "text": ...}, ...] in
    place of the question. Paths are relative to the folder of the file; an image may
    also be a data URI or base64.

    A line of the output is {"id": ..., "answer": ..., "finish": "stop" or "length", "tokens": ...}, or {"id": ...,
    "error": ...} where the question could not be asked, e.g. because its image is missing. A malformed line of the
    input ends the command before anything is answered.""",
    examples=("vr-jax generate --checkpoint=runs/demo/model --input=questions.jsonl --output=answers.jsonl",),
    interrupted="interrupted; nothing was written",
)
