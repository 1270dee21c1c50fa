"""`vr-jax prepare`: writes training data as array_record files, or reads a data set once and reports on it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import ClassVar, Literal

from tqdm import tqdm

from vr_jax.cli.flags import Command, Flags, UsageError, flag
from vr_jax.cli.shared import CONFIG_HELP
from vr_jax.data.skips import summary
from vr_jax.data.sources import Source, open_source
from vr_jax.errors import EXIT_DONE, EXIT_TOO_MANY_SKIPS, UserError
from vr_jax.fields import Fraction, NoEffect, PositiveInt
from vr_jax.path_text import FileVariantText, PathsText, PathText

MAX_SKIPPED = 0.01
PAGE = "check.html"


_SPLIT = re.compile(r"[A-Za-z0-9_-]+")  # what TensorFlow Datasets can read again by this name
_SECTIONS = ("model", "init_from", "tokenizer", "data", "batch")  # what a check reads of a config


@dataclass(frozen=True, kw_only=True)
class PrepareFlags(Flags):
    """The flags of `vr-jax prepare`."""

    no_effect: ClassVar = (
        NoEffect(("beam_options",), "beam", lambda flags: not (flags.beam or flags.check), "Apache Beam reads them"),
        NoEffect(
            ("to", "records_per_shard", "beam", "beam_options"), "check", lambda flags: flags.check, "no set is written"
        ),
        NoEffect(("config", "overrides", "page"), "check", lambda flags: not flags.check, "only a check reads them"),
        NoEffect(("overrides",), "config", lambda flags: flags.config is None, "it sets a field of a config; give one"),
    )

    source: tuple[PathsText, ...] = flag(
        (), "LLaVA data: a file, a folder, a quoted pattern, or a name on the hub.", name="from", metavar="PATH"
    )
    to: PathText | None = flag(None, "Folder that the prepared set is written to.", metavar="DIR")
    images: PathText | None = flag(None, "Image folder. The default is the folder of each JSON file.", metavar="DIR")
    format: Literal["llava_json", "llava_parquet", "array_record"] | None = flag(
        None, "Format of the data. The default is chosen by the file's name."
    )
    split: str = flag("train", "Split to read where the data have several, and its name in the prepared set.")
    follow_links: bool = flag(False, "Let symbolic links point out of the image folder.")
    max_skipped: Fraction | None = flag(
        None,
        f"Share of unusable records above which nothing is written. The default is {MAX_SKIPPED}, or the config's.",
    )
    records_per_shard: PositiveInt = flag(1024, "Records in a file.")
    beam: bool = flag(False, "Generate with Apache Beam (pip install 'vr-jax[beam]').")
    beam_options: str = flag("", "Options of Apache Beam, e.g. '--runner=DataflowRunner --region=...'.")
    check: bool = flag(False, "Read the data once and report on them; no set is written.")
    config: FileVariantText | None = flag(
        None, f"With --check, the run whose data, tokens and rows are checked. {CONFIG_HELP}", metavar="FILE[:VARIANT]"
    )
    overrides: tuple[str, ...] = flag((), "Sets a field of the config.", overrides=True)
    page: PathText | None = flag(
        None, f"With --check, the HTML page to write. The default is {PAGE} in this folder.", metavar="FILE"
    )


def run(flags: PrepareFlags) -> int:
    """Writes the prepared set and says what was left out, or checks the data."""
    if not flags.source and not (flags.check and flags.config):
        raise UsageError("--from is missing: LLaVA data: a file, a folder, a quoted pattern, or a name on the hub.")
    if flags.to is None and not flags.check:
        raise UsageError("--to is missing: Folder that the prepared set is written to.")
    return _check(flags) if flags.check else _write(flags)


def _open(flags: PrepareFlags) -> Source:
    return open_source(
        flags.source, images=flags.images, format=flags.format, split=flags.split, follow_links=flags.follow_links
    )


def _write(flags: PrepareFlags) -> int:
    if not _SPLIT.fullmatch(flags.split) or flags.split == "all":
        raise UserError(
            f"--split = {flags.split!r}: expected letters, digits, '_' and '-', and not 'all', which means all splits"
        )
    source = _open(flags)
    # The import of tensorflow_datasets takes seconds, so the arguments are checked first.
    from vr_jax.data.tfds_builder import prepare

    try:
        beam_flags = shlex.split(flags.beam_options)
    except ValueError as error:
        raise UserError(f"--beam_options={flags.beam_options}: {error}") from None
    prepared = prepare(
        {flags.split: source},
        flags.to or "",
        max_skipped=MAX_SKIPPED if flags.max_skipped is None else flags.max_skipped,
        records_per_shard=flags.records_per_shard,
        in_beam=flags.beam,
        beam_flags=beam_flags,
    )
    if prepared.skips:
        print(summary(prepared.skips))
    print(f"wrote {prepared.records} of {len(source)} records to {prepared.folder}")
    return EXIT_DONE


def _check(flags: PrepareFlags) -> int:
    # Grain, and the tokenizer's library, take seconds to import.
    from vr_jax.data.check_page import write_check_page
    from vr_jax.data.checking import check_source
    from vr_jax.settings import load_config
    from vr_jax.training import open_samples

    source = _open(flags) if flags.source else None
    processor, shape, packing, workers, limit = None, None, True, 0, MAX_SKIPPED
    if flags.config is not None:
        config = load_config(flags.config, flags.overrides, sections=_SECTIONS)
        source, processor, shape = open_samples(config, source)
        packing, workers, limit = config.data.packing, config.data.workers, config.data.max_skipped
    assert source is not None
    with tqdm(total=len(source), unit="records") as progress:
        report = check_source(
            source,
            processor,
            shape,
            max_skipped=limit if flags.max_skipped is None else flags.max_skipped,
            packing=packing,
            num_workers=workers,
            on_record=progress.update,
        )
    print("\n".join(report.lines()))
    page = flags.page or PAGE
    write_check_page(page, report, source, processor)
    print(f"page: {page}")
    return EXIT_DONE if report.acceptable else EXIT_TOO_MANY_SKIPS


COMMAND = Command(
    summary="Write training data as array_record files, or check them.",
    flags=PrepareFlags,
    run=run,
    details="""The images are stored in the files as the encoded bytes they came in. Training reads the folder with
    --config.data.path=DIR. Records that cannot be used are listed and left out.

    With --check, every record is read once, as training would read it, and the report says what cannot be used and why,
    how long the samples are, how full the rows are, and shows the first samples with their tokens and targets. The exit
    code is 0 if the share of unusable records is within max_skipped, and 4 if not. Without --config only records and
    images are checked.""",
    examples=(
        "vr-jax prepare --from=data.json --images=images --to=prepared",
        "vr-jax prepare --check --from=data.json --images=images",
        "vr-jax prepare --check --config=configs/demo.py --config.data.path=data.json --config.data.images=images",
    ),
)
