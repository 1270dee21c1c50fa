"""`vr-jax convert import|export`: checkpoints of Hugging Face and LLaVA in and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax

from vr_jax.cli.flags import Command, Flags, Group, flag
from vr_jax.cli.shared import DType
from vr_jax.convert import SHARD_BYTES, export_checkpoint, import_adapter, import_checkpoint
from vr_jax.errors import UserError
from vr_jax.fields import PositiveFloat
from vr_jax.hub import local_folder
from vr_jax.path_text import PathText
from vr_jax.storage import check_apart


@dataclass(frozen=True, kw_only=True)
class ImportFlags(Flags):
    """The flags of `vr-jax convert import`."""

    source: PathText | None = flag(
        None,
        "Directory of an encoder (SigLIP, CLIP), a decoder (Qwen2, Qwen3, Llama, Mistral) or a LLaVA (1.5, NeXT, "
        "OneVision, or in its own layout) or a Qwen2.5-VL; or a name on the Hugging Face hub, e.g. Qwen/Qwen2-0.5B.",
        name="from",
        metavar="DIR",
    )
    to: PathText = flag(help="Model directory to write. It appears only when it is complete.", metavar="DIR")
    encoder: PathText | None = flag(
        None,
        "Directory of a SigLIP or CLIP, or of a whole model, whose encoder is taken: for what --from lacks, or alone, "
        "or together with --decoder.",
        metavar="DIR",
    )
    decoder: PathText | None = flag(
        None,
        "Directory of a Qwen2, Qwen3, Llama, Mistral or MiniCPM, or of a whole model, whose decoder is taken: for what "
        "--from lacks, or alone, or together with --encoder.",
        metavar="DIR",
    )
    base: PathText | None = flag(
        None,
        "Directory of the model that the adapter in --from (of PEFT, or of LLaVA's training with LoRA) was trained on, "
        "a model directory or a checkpoint. The adapter is merged into it.",
        metavar="DIR",
    )
    dtype: DType | None = flag(None, "Type of the parameters. The default is that of each tensor.")
    ignore: tuple[str, ...] = flag(
        (),
        "A field of the folder's JSON files, or an adapter's file, that is left out of consideration.",
        metavar="NAME",
    )
    overwrite: bool = flag(False, "Replace --to if it exists.")


@dataclass(frozen=True, kw_only=True)
class ExportFlags(Flags):
    """The flags of `vr-jax convert export`."""

    source: PathText = flag(help="Model directory.", name="from", metavar="DIR")
    to: PathText = flag(help="Directory of safetensors to write. It appears only when it is complete.", metavar="DIR")
    layout: Literal["hf", "llava"] | None = flag(
        None, "Names of the tensors. The default is hf where transformers has the model."
    )
    shard_gb: PositiveFloat = flag(SHARD_BYTES / 1e9, "Largest file, in 10^9 bytes.")
    overwrite: bool = flag(False, "Replace --to if it exists.")


def run_import(flags: ImportFlags) -> None:
    """Imports a checkpoint."""
    _prepare_process()
    source, encoder, decoder, base = (
        None if place is None else str(local_folder(place))
        for place in (flags.source, flags.encoder, flags.decoder, flags.base)
    )
    read = [place for place in (source, encoder, decoder, base) if place is not None]
    check_apart(flags.to, read, where="--to", source="--from, --base, --encoder or --decoder")
    if base is not None:
        if source is None or decoder is not None:
            raise UserError("--base is the model of the adapter in --from, and holds the decoder; leave --decoder out")
        import_adapter(
            source,
            flags.to,
            base,
            encoder=encoder,
            dtype=flags.dtype,
            ignore=flags.ignore,
            overwrite=flags.overwrite,
            report=print,
        )
        return
    import_checkpoint(
        source,
        flags.to,
        encoder=encoder,
        decoder=decoder,
        dtype=flags.dtype,
        ignore=flags.ignore,
        overwrite=flags.overwrite,
        report=print,
    )


def run_export(flags: ExportFlags) -> None:
    """Exports a model directory."""
    check_apart(flags.to, [flags.source], where="--to", source="--from")
    _prepare_process()
    export_checkpoint(
        flags.source,
        flags.to,
        layout=flags.layout,
        max_shard_bytes=int(flags.shard_gb * 1e9),
        overwrite=flags.overwrite,
        report=print,
    )


def _prepare_process() -> None:
    # Conversion is work for the host, even where there is an accelerator.
    jax.config.update("jax_platforms", "cpu")


COMMAND = Group(
    summary="Import from Hugging Face or LLaVA, or export to their formats.",
    actions={
        "import": Command(
            summary="Turn a Hugging Face or LLaVA checkpoint into a model directory.",
            flags=ImportFlags,
            run=run_import,
            examples=(
                "vr-jax convert import --from=/models/llava-onevision-qwen2-0.5b-ov-hf --to=checkpoints/ov-0.5b",
                "vr-jax convert import --from=llava-hf/llava-onevision-qwen2-0.5b-ov-hf --to=checkpoints/ov-0.5b",
                "vr-jax convert import --from=runs/lora/adapter --base=checkpoints/ov-0.5b --to=checkpoints/merged",
                "vr-jax convert import --encoder=/models/clip --decoder=/models/qwen3 --to=checkpoints/parts",
            ),
        ),
        "export": Command(
            summary="Turn a model directory into a directory of safetensors.",
            flags=ExportFlags,
            run=run_export,
            examples=("vr-jax convert export --from=checkpoints/ov-0.5b --to=exported",),
        ),
    },
)
