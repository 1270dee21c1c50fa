"""`python -m vr_jax.convert import|export`: see docs/convert.md."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import jax

from vr_jax.convert.errors import ConvertError
from vr_jax.convert.exporting import SHARD_BYTES, export_model
from vr_jax.convert.importing import import_checkpoint
from vr_jax.model.config import ConfigError
from vr_jax.model_directory import ModelDirectoryError


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with the reason on stderr."""
    options = _parser().parse_args(arguments)
    # Conversion is work for the host, even where there is an accelerator.
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what we report
    try:
        options.run(options)
    except (ConvertError, ConfigError, ModelDirectoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or options.to}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vr_jax.convert", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="import|export")

    incoming = commands.add_parser("import", help="Hugging Face or LLaVA directory -> vr_jax model directory")
    incoming.add_argument(
        "--from",
        dest="source",
        type=Path,
        help="directory of SigLIP, Qwen2, LLaVA-OneVision, LLaVA-NeXT or a LLaVA in its own layout",
    )
    incoming.add_argument(
        "--encoder", type=Path, help="SigLIP directory, for what --from lacks, or with --decoder alone"
    )
    incoming.add_argument("--decoder", type=Path, help="Qwen2 directory, likewise")
    incoming.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: that of each tensor")
    incoming.set_defaults(
        run=lambda o: import_checkpoint(
            o.source, o.to, encoder=o.encoder, decoder=o.decoder, dtype=o.dtype, overwrite=o.overwrite
        )
    )

    outgoing = commands.add_parser("export", help="vr_jax model directory -> safetensors directory")
    outgoing.add_argument("--from", dest="source", type=Path, required=True, help="model directory")
    outgoing.add_argument("--layout", choices=("hf", "llava"), help="default: hf where transformers has the model")
    outgoing.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 1e9, help="largest file, default %(default)g")
    outgoing.set_defaults(
        run=lambda o: export_model(
            o.source, o.to, layout=o.layout, max_shard_bytes=int(o.shard_gb * 1e9), overwrite=o.overwrite
        )
    )
    for command in (incoming, outgoing):
        command.add_argument("--to", type=Path, required=True, help="appears only when complete")
        command.add_argument("--overwrite", action="store_true", help="replace --to if it exists")
    return parser


def _without_cancelled_writes(unraisable: sys.UnraisableHookArgs) -> None:
    """When one write fails, Orbax closes its event loop and every other pending write complains about that."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    sys.unraisablehook = _without_cancelled_writes
    sys.exit(main())
