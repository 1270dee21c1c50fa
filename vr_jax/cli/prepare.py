"""`python -m vr_jax.cli.prepare --from FILES --images FOLDER --to DIR`: LLaVA data -> array_record files."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from vr_jax.data.records import SourceError
from vr_jax.data.skips import TooManySkips, summary
from vr_jax.data.sources import FORMATS, open_source


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vr_jax.cli.prepare", description=__doc__)
    parser.add_argument(
        "--from", dest="files", nargs="+", required=True, metavar="PATH", help="files, folders, patterns"
    )
    parser.add_argument("--images", metavar="FOLDER", help="image folder (default: the folder of each JSON file)")
    parser.add_argument("--format", choices=FORMATS, help="default: by the file's name")
    parser.add_argument("--to", dest="target", required=True, metavar="DIR", help="where the prepared set is written")
    parser.add_argument("--split", default="train", help="name of the split (default: train)")
    parser.add_argument("--follow-links", action="store_true", help="symbolic links may point out of the image folder")
    parser.add_argument("--max-skipped", type=float, default=0.01, metavar="SHARE", help="unusable records allowed")
    parser.add_argument("--records-per-shard", type=int, default=1024, metavar="N", help="records in a file (1024)")
    parser.add_argument("--beam", action="store_true", help="generate with Apache Beam (pip install 'vr-jax[beam]')")
    parser.add_argument(
        "--beam-options", default="", metavar="FLAGS", help="e.g. '--runner=DataflowRunner --region=...'"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    spec = {
        "path": options.files,
        "images": options.images,
        "format": options.format,
        "follow_links": options.follow_links,
    }
    try:
        source = open_source(spec)
        from vr_jax.data.tfds_builder import prepare  # imports tensorflow_datasets: after the arguments are known good

        prepared = prepare(
            {options.split: source},
            options.target,
            max_skipped=options.max_skipped,
            records_per_shard=options.records_per_shard,
            in_beam=options.beam,
            beam_flags=shlex.split(options.beam_options),
        )
    except (SourceError, TooManySkips, FileExistsError, ModuleNotFoundError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    if prepared.skips:
        print(summary(prepared.skips))
    print(f"wrote {prepared.records} of {len(source)} records to {prepared.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
