"""`vr-jax prepare`: writes training data as array_record files."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Annotated, Literal

from vr_jax.cli.flags import Command, Flags, flag
from vr_jax.data.skips import summary
from vr_jax.data.sources import open_source
from vr_jax.errors import UserError
from vr_jax.fields import Range
from vr_jax.path_text import PathsText, PathText


@dataclass(frozen=True, kw_only=True)
class PrepareFlags(Flags):
    """The flags of `vr-jax prepare`."""

    source: tuple[PathsText, ...] = flag(
        help="LLaVA data: a file, a folder, or a quoted pattern.", name="from", metavar="PATH"
    )
    to: PathText = flag(help="Folder that the prepared set is written to.", metavar="DIR")
    images: PathText | None = flag(None, "Image folder. The default is the folder of each JSON file.", metavar="DIR")
    format: Literal["llava_json", "llava_parquet", "array_record"] | None = flag(
        None, "Format of the data. The default is chosen by the file's name."
    )
    split: str = flag("train", "Name of the split.")
    follow_links: bool = flag(False, "Let symbolic links point out of the image folder.")
    max_skipped: Annotated[float, Range(0, 1)] = flag(0.01, "Share of unusable records above which nothing is written.")
    records_per_shard: Annotated[int, Range(1)] = flag(1024, "Records in a file.")
    beam: bool = flag(False, "Generate with Apache Beam (pip install 'vr-jax[beam]').")
    beam_options: str = flag("", "Options of Apache Beam, e.g. '--runner=DataflowRunner --region=...'.")


def run(flags: PrepareFlags) -> None:
    """Writes the prepared set and says what was left out."""
    source = open_source(flags.source, images=flags.images, format=flags.format, follow_links=flags.follow_links)
    # The import of tensorflow_datasets takes seconds, so the arguments are checked first.
    from vr_jax.data.tfds_builder import prepare

    try:
        prepared = prepare(
            {flags.split: source},
            flags.to,
            max_skipped=flags.max_skipped,
            records_per_shard=flags.records_per_shard,
            in_beam=flags.beam,
            beam_flags=shlex.split(flags.beam_options),
        )
    except OSError as error:
        raise UserError(str(error)) from error
    if prepared.skips:
        print(summary(prepared.skips))
    print(f"wrote {prepared.records} of {len(source)} records to {prepared.folder}")


COMMAND = Command(
    summary="Write training data as array_record files.",
    flags=PrepareFlags,
    run=run,
    details="""The images are stored in the files as the encoded bytes they came in. Training reads the folder with
    --config.data.path=DIR.""",
    examples=("vr-jax prepare --from=data.json --images=images --to=prepared",),
)
