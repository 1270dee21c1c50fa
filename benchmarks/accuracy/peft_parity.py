"""Compares a model that was trained with LoRA with what peft makes of its base and its adapter.

    python -m benchmarks.accuracy.peft_parity --base BASE --run WORKDIR

BASE is the model directory that the run began with, and WORKDIR the folder of the run, with `adapter` and `model`.
transformers has no Vision Remember, so that its part of the model alone is compared, the Qwen2 decoder: its class gets
the weights of the exported base and the adapter, which peft merges. Both answer the same random tokens. The result is
the largest difference of their logits, which float32 keeps below 2e-4.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from benchmarks import arguments
from vr_jax.convert import export_checkpoint
from vr_jax.model.batch import NO_CELL, Batch
from vr_jax.model_directory import load_model

BOUND = 2e-4
PEFT_PREFIX = "base_model.model."
ROWS, TOKENS = 2, 48


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--base", type=arguments.path, required=True, help="the model directory that the run began with")
    flags.add_argument("--run", type=arguments.path, required=True, help="the folder of the run with LoRA")
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Prints the largest difference and whether it is within the bound."""
    options = parser().parse_args(arguments)
    difference, scale = largest_difference(options.base, options.run / "adapter", options.run / "model")
    print(f"largest difference {difference:.1e}, of logits up to {scale:.1f}; at most {BOUND:.0e} is expected")
    return 0 if difference <= BOUND else 1


def largest_difference(base: Path, adapter: Path, merged: Path) -> tuple[float, float]:
    """Compares the logits of the merged model with those of peft.

    Args:
        base: The model directory that the run began with.
        adapter: The adapter in the form of PEFT that the run wrote.
        merged: The model directory that the run wrote.

    Returns:
        The largest difference of two logits, and the largest logit.
    """
    model = load_model(merged)
    vocabulary = model.config.decoder.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, (ROWS, TOKENS))
    hidden, _ = jax.jit(model)(text_batch(tokens, model.config.image.tile_size))
    ours = np.asarray(jax.jit(model.logits)(hidden))
    theirs = peft_logits(base, adapter, tokens)
    return float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())


def text_batch(tokens: Int[np.ndarray, "B N"], tile_size: int) -> Batch:
    """A batch of texts without an image; every row has one sample, and a tile slot that is not used."""
    rows, length = tokens.shape
    whole = np.ones(tokens.shape, bool)
    return Batch(
        tokens=tokens.astype(np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segment_ids=np.ones(tokens.shape, np.int32),
        loss_mask=whole,
        text_token_mask=whole,
        vision_cell=np.full(tokens.shape, NO_CELL, np.int32),
        tile_pixels=np.zeros((rows, 1, tile_size, tile_size, 3), np.uint8),
        tile_segment=np.zeros((rows, 1), np.int32),
        tile_image=np.zeros((rows, 1), np.int32),
    )


def peft_logits(base: Path, adapter: Path, tokens: Int[np.ndarray, "B N"]) -> Float[np.ndarray, "B N V"]:
    """The logits of transformers' Qwen2 with the weights of the base, into which peft has merged the adapter."""
    import torch
    from peft import PeftModel
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "base"
        export_checkpoint(base, exported, layout="llava")
        fields = Qwen2Config.from_dict({**Qwen2Config.get_config_dict(exported)[0], "model_type": "qwen2"})
        decoder = Qwen2ForCausalLM(fields).float().eval()
        in_full = tensors(adapter, "non_lora_trainables")
        weights = tensors(exported) | {name.removeprefix(PEFT_PREFIX): one for name, one in in_full.items()}
        known = decoder.state_dict()
        result = decoder.load_state_dict({name: one for name, one in weights.items() if name in known}, strict=False)
        lacking = [
            name for name in result.missing_keys if not (fields.tie_word_embeddings and name == "lm_head.weight")
        ]
        if lacking:
            raise ValueError(f"{base}: the export lacks {', '.join(lacking[:3])}")
        # A copy, because the folder of the run is not this script's to write to.
        alone = Path(shutil.copytree(adapter, Path(folder) / "adapter"))
        merged: Any = PeftModel.from_pretrained(decoder, alone).merge_and_unload()
        with torch.no_grad():
            return np.asarray(merged(torch.from_numpy(tokens)).logits)


def tensors(folder: Path, pattern: str = "*") -> dict[str, Any]:
    """The tensors of the safetensors files of a folder, by name."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(folder.glob(f"{pattern}.safetensors")):
        found |= load_file(path)
    return found


if __name__ == "__main__":
    sys.exit(main())
