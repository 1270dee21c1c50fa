"""`vr-jax app`: serves a page to talk to one or two checkpoints about images."""

from __future__ import annotations

import dataclasses
import ipaddress
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from vr_jax.app import Checkpoint, Example, Loader, Models, ModelThread, PageOptions, Settings, Variant
from vr_jax.cli.flags import Command, flag
from vr_jax.cli.shared import MAX_NEW_TOKENS, AnswerFlags, load_generator
from vr_jax.cli.signals import cleaned_up_on_signals
from vr_jax.data.demo.pages import KINDS
from vr_jax.data.demo.reading import ReadingSource, conversations
from vr_jax.errors import ConfigError, UserError
from vr_jax.fields import NoEffect, Range
from vr_jax.hub import local_folder
from vr_jax.inference import Sampling, with_pruning
from vr_jax.model.config import VlmConfig
from vr_jax.model.registry import names
from vr_jax.model_directory import read_config, read_generation
from vr_jax.path_text import PathText

EXAMPLES = len(KINDS)  # one of each kind of page of the demo
Port = Annotated[int, Range(1, 65535)]


@dataclass(frozen=True, kw_only=True)
class AppFlags(AnswerFlags):
    """The flags of `vr-jax app`. Those of an answer are what the page starts with; it can change them."""

    no_effect: ClassVar[tuple[NoEffect, ...]] = ()  # the page can set another temperature

    compare: PathText | None = flag(
        None, "A second checkpoint, whose answers and heat maps stand beside those of the first.", metavar="DIR"
    )
    compare_pruning: str | None = flag(None, "The pruner of the second checkpoint, as --pruning.", metavar="NAME|JSON")
    host: str = flag(
        "127.0.0.1", "Address to listen at. The default is reached from this machine only; 0.0.0.0 is all networks."
    )
    port: Port | None = flag(None, "Port to listen at. The default is the first free one from 7860.")


def run(flags: AppFlags) -> None:
    """Loads the checkpoints and serves the page until Ctrl-C."""
    from vr_jax.app import page  # Without gradio this ends with a line that says what to install.

    if flags.compare_pruning is not None and flags.compare is None:
        raise UserError("--compare_pruning has no effect without --compare; give a second checkpoint")
    chosen = [flags]
    if flags.compare is not None:
        chosen.append(dataclasses.replace(flags, checkpoint=flags.compare, pruning=flags.compare_pruning))
    options = page_options(chosen)
    thread = ModelThread([loader(one) for one in chosen])
    with cleaned_up_on_signals(), tempfile.TemporaryDirectory(prefix="vr_jax_app_") as folder:
        page.keep_uploads_in(Path(folder, "uploads"))  # they are gone when the page ends
        examples = Path(folder, "examples")
        examples.mkdir()
        options = dataclasses.replace(options, examples=tuple(write_examples(examples)))
        try:
            for line in thread.run(lambda models: warm(models, options)):
                print(line, flush=True)
            blocks = page.Page(thread, options).blocks
            url = page.launch(blocks, flags.host, flags.port, folder=examples)
            print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
            if not is_loopback(flags.host):
                print(f"warning: --host={flags.host} lets everyone who reaches this machine ask and upload", flush=True)
            try:
                stay()
            finally:
                blocks.close(verbose=False)
        finally:
            thread.close()


def stay() -> None:
    """Waits until Ctrl-C."""
    threading.Event().wait()


def loader(flags: AppFlags) -> Loader:
    """Returns what loads the checkpoint of some flags in any variant."""
    return lambda variant: load_generator(dataclasses.replace(flags, pruning=variant.pruning, dtype=variant.dtype))


def page_options(chosen: Sequence[AppFlags]) -> PageOptions:
    """Returns what the page shows of checkpoints, and what it starts with.

    Args:
        chosen: The flags of each checkpoint.

    Raises:
        UserError: A checkpoint has no config, or cannot have the pruner of its flags.
    """
    first = chosen[0]
    length = first.max_new_tokens or read_generation(local_folder(first.checkpoint)).max_new_tokens or MAX_NEW_TOKENS
    sampling = Sampling(first.temperature, first.top_p, first.seed)
    variants = tuple(Variant(one.pruning, one.dtype) for one in chosen)
    paths = [one.checkpoint for one in chosen]
    titles = paths if len(set(paths)) == len(paths) else [f"{path} ({k + 1})" for k, path in enumerate(paths)]
    checkpoints = tuple(checkpoint(one, title) for one, title in zip(chosen, titles, strict=True))
    return PageOptions(checkpoints, Settings(length, sampling, variants))


def checkpoint(flags: AppFlags, title: str) -> Checkpoint:
    """Returns what the page says of the checkpoint of some flags.

    Raises:
        UserError: It has no config, or cannot have the pruner of the flags.
    """
    config = read_config(local_folder(flags.checkpoint))
    with_pruning(config, flags.pruning)
    if config.refusion is not None:
        return Checkpoint(title, (), "Pruners drop the tokens that re-fusion blocks re-read.")
    if config.pruning is not None:
        return Checkpoint(title, (), f"Its config has the pruner {config.pruning.name}.")
    own = [flags.pruning] if flags.pruning else []
    fitting = tuple(dict.fromkeys([*own, *(name for name in names("pruning") if fits(config, name))]))
    note = "Another choice loads the model anew." if fitting else "No pruner fits this model."
    return Checkpoint(title, fitting, note)


def fits(config: VlmConfig, pruner: str) -> bool:
    """Whether a model can have a pruner with its default settings."""
    try:
        with_pruning(config, pruner)
    except ConfigError:
        return False
    return True


def warm(models: Models, options: PageOptions) -> Iterator[str]:
    """Loads every checkpoint as the page starts, so that one that cannot be loaded ends the command.

    Args:
        models: The checkpoints.
        options: What the page starts with.

    Yields:
        One line for each checkpoint that is loaded.

    Raises:
        UserError: A checkpoint cannot be loaded.
    """
    for number, (one, variant) in enumerate(zip(options.checkpoints, options.settings.variants, strict=True)):
        with models.use(number, variant):
            yield f"{one.title} is loaded"


def write_examples(folder: Path) -> Iterator[Example]:
    """Writes pages of the demo, each with a question.

    Args:
        folder: The folder for the image files.
    """
    source = ReadingSource("held_out", EXAMPLES)
    for number in range(EXAMPLES):
        _, conversation = conversations(source.sample(number))
        image, turn = conversation.images[0], conversation.turns[0]
        assert isinstance(image, bytes)
        path = folder / f"example{number + 1}.png"
        path.write_bytes(image)
        yield Example("".join(part for part in turn.parts if isinstance(part, str)).strip(), str(path))


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


COMMAND = Command(
    summary="Serve a page to talk to a checkpoint, with heat maps.",
    flags=AppFlags,
    run=run,
    details="""The page shows beside each answer what Vision Remember re-read of the images, and the tokens, the time to
    the first token and the tokens per second. It needs the extra `app`: pip install 'vr-jax[app]'.

    It is reached from this machine only unless --host says otherwise, and asks for no password. Nothing is sent to
    other hosts.""",
    examples=(
        "vr-jax app --checkpoint=runs/demo/model",
        "vr-jax app --checkpoint=runs/demo/model --compare=runs/pooling/model --port=8000",
    ),
)
