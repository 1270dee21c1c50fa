"""Measures on this machine's CPU what Vision Remember costs, and how vr_jax compares with transformers.

    python -m benchmarks.speed.cpu [--rounds 7] [--quick | --tiny]

The alternatives of each part take turns within one run, so a busy machine slows them alike:

1. The local cross-attention of the paper's width (3072 channels, 24 heads, one AnyRes4 image of 5 tiles) in its
   absorbed and its plain form. Both compute the same function, so the script also prints how far their results differ.
2. A forward and backward pass of a small LLaVA-VR, against the same model without Vision Remember.
3. The prefill and one step of cached decoding of the same two models.
4. The first token and the decoding of a model with LLaVA-OneVision-0.5B's shapes, against transformers in float32 with
   as many threads. The outputs are compared. Each side runs in a process of its own. A round takes two minutes on two
   cores; with --quick the encoder and the decoder have three layers each.
5. One update of phase 2 against transformers and AdamW, with tiny shapes (`training_step` has the paper's, for a GPU).

With --tiny all parts run with tiny shapes, which only shows that they work. The exit status is 1 where the outputs or
the losses differ from those of transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.goals import goals_of, lines_of
from benchmarks.speed import generation, training_step
from benchmarks.timing import report, side_by_side
from vr_jax.model.batch import Batch
from vr_jax.model.config import VlmConfig, anyres4, single_tile
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion.context import VisionContext
from vr_jax.model.refusion.vision_remember import Block, VisionRememberConfig
from vr_jax.model.vlm import VisionLanguageModel


def cross_attention(rounds: int, *, tiny: bool = False) -> str:
    """Times the two forms of the local cross-attention and compares their results.

    Args:
        rounds: Timed calls of each form.
        tiny: Whether the model of `small_config` and one tile replace the paper's widths and five tiles.

    Returns:
        A table of times, the FLOPs of the compiled programs, and the relative difference of the results.
    """
    whole = small_config(remember=True) if tiny else VlmConfig(refusion=VisionRememberConfig(), image=anyres4())
    assert isinstance(whole.refusion, VisionRememberConfig)
    rng = np.random.default_rng(0)
    tiles, cells = 1 if tiny else 5, whole.cells_per_tile
    tokens = tiles * cells
    features = rng.standard_normal((1, tiles, cells, 9, 3 * whole.encoder.hidden_size), np.float32)
    context = VisionContext(
        features=jnp.asarray(features),
        vision_cell=jnp.arange(tokens)[None],
        segment_ids=jnp.ones((1, tokens), jnp.int32),
        text_token_mask=jnp.zeros((1, tokens), bool),
        tile_segment=jnp.ones((1, tiles), jnp.int32),
        tile_image=jnp.ones((1, tiles), jnp.int32),
        cells_per_tile=cells,
    )
    hidden = jnp.asarray(rng.standard_normal((1, tokens, whole.decoder.hidden_size), np.float32))
    calls, outputs, flops = {}, {}, {}
    for form in ("plain", "absorbed"):
        refusion = dataclasses.replace(whole.refusion, cross_attention=form, init="torch_default")
        spec = dataclasses.replace(whole, refusion=refusion).spec
        block = refusion.build(spec, 0, rngs=nnx.Rngs(0))
        compiled = jax.jit(Block.cross).lower(block, hidden, context).compile()
        calls[form] = lambda block=block, compiled=compiled: compiled(block, hidden, context)
        outputs[form] = calls[form]()
        flops[form] = compiled.cost_analysis()["flops"] / 1e9
    difference = jnp.abs(outputs["plain"] - outputs["absorbed"]).max() / jnp.abs(outputs["plain"]).max()
    width = whole.refusion.inner_width(whole.spec)
    title = f"local cross-attention, {tiles} tiles, width {width}, float32"
    table = report(title, side_by_side(calls, rounds=rounds), "plain")
    work = ", ".join(f"{form} {value:.1f}" for form, value in flops.items())
    return f"{table}\n  GFLOP of the compiled programs: {work}; relative difference {difference:.1e}"


def small_config(*, remember: bool) -> VlmConfig:
    """A model of a few million parameters, with Vision Remember after two layers if `remember` is set."""
    return VlmConfig(
        encoder=SiglipConfig(
            hidden_size=96, intermediate_size=384, num_layers=6, num_heads=4, image_size=144, patch_size=12
        ),
        decoder=TransformerConfig(
            vocab_size=4096, hidden_size=256, intermediate_size=768, num_layers=8, num_heads=4, num_kv_heads=2
        ),
        projector=PoolConfig(stride=3),
        refusion=VisionRememberConfig(insert_after=(1, 4), levels=(2, 4, 6)) if remember else None,
        vision_feature_layer=6,
        image=single_tile(144),
    )


def small_batch(config: VlmConfig, rows: int, length: int) -> Batch:
    """Random rows of `length` tokens, each with one image of one tile between text."""
    rng = np.random.default_rng(0)
    cells = config.cells_per_tile
    cell = np.full((rows, length), -1, np.int32)
    cell[:, 8 : 8 + cells] = np.arange(cells)
    side = config.image.tile_size
    return Batch(
        tokens=jnp.asarray(rng.integers(0, config.decoder.vocab_size, (rows, length), np.int32)),
        positions=jnp.tile(jnp.arange(length), (rows, 1)),
        segment_ids=jnp.ones((rows, length), jnp.int32),
        loss_mask=jnp.tile(jnp.arange(length) > length - 8, (rows, 1)),
        text_token_mask=jnp.tile((jnp.arange(length) > 30) & (jnp.arange(length) < length - 10), (rows, 1)),
        vision_cell=jnp.asarray(cell),
        tile_pixels=jnp.asarray(rng.integers(0, 256, (rows, 1, side, side, 3), np.uint8)),
        tile_segment=jnp.ones((rows, 1), jnp.int32),
        tile_image=jnp.ones((rows, 1), jnp.int32),
    )


def whole_model(rounds: int, *, rows: int = 8) -> str:
    """Times training, prefill and decoding of a small model with and without Vision Remember.

    Args:
        rounds: Timed calls of each model.
        rows: Rows of the batch, with 64 tokens each.

    Returns:
        One table for each of the three programs.
    """
    train, prefill, decode = {}, {}, {}
    for name, remember in (("baseline", False), ("vision remember", True)):
        config = small_config(remember=remember)
        model = VisionLanguageModel(config, rngs=nnx.Rngs(0))
        batch = small_batch(config, rows=rows, length=64)

        def loss(model: VisionLanguageModel, batch: Batch) -> jax.Array:
            logits = model.logits(model(batch)[0])[:, :-1]
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[:, 1:, None], axis=-1)[..., 0]
            return -jnp.mean(picked, where=batch.loss_mask[:, 1:])

        step = jax.jit(jax.grad(loss))
        first = jax.jit(lambda m, b: m(b, m.init_cache(b.tokens.shape[0], b.tokens.shape[1] + 16)))
        after = jax.jit(lambda m, t, p, c: m.decode(t, p, c)[0])
        _, cache = first(model, batch)
        token, position = batch.tokens[:, :1], batch.positions[:, -1:] + 1
        train[name] = lambda step=step, model=model, batch=batch: step(model, batch)
        prefill[name] = lambda first=first, model=model, batch=batch: first(model, batch)[0]
        decode[name] = lambda f=after, m=model, t=token, p=position, c=cache: f(m, t, p, c)
    parts = {
        f"forward and backward, {rows} rows of 64 tokens": train,
        f"prefill, {rows} prompts": prefill,
        f"decode, {rows} rows": decode,
    }
    return "\n".join(report(title, side_by_side(calls, rounds=rounds), "baseline") for title, calls in parts.items())


def against_transformers(size: str, rounds: int) -> tuple[str, bool]:
    """Compares the generation of LLaVA-OneVision's shapes with transformers.

    Args:
        size: "0.5b", "quick" or "tiny" (see `onevision`).
        rounds: Timed runs of each side.

    Returns:
        The ratios and goals as text, and whether the outputs agree.
    """
    found = generation.against_torch(size, dtype="float32", rounds=rounds, new_tokens=4 if size == "tiny" else 16)
    ratio = found["ratio"].get("torch", {})
    goals = goals_of(
        [
            ("first token against transformers", ">=", 2.0, ratio.get("first")),
            ("decode against transformers", ">=", 1.3, ratio.get("decode")),
        ]
    )
    shown = [generation.text_of(found), *([] if size == "tiny" else [f"  {line}" for line in lines_of(goals)])]
    return "\n".join(shown), bool(found.get("agreement", {}).get("agree"))


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=7, help="timed calls of each alternative")
    flags.add_argument("--quick", action="store_true", help="part 4 with 3 layers in the encoder and the decoder")
    flags.add_argument("--tiny", action="store_true", help="all parts with tiny shapes, to see that they work")
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Runs all parts and prints their results."""
    options = parser().parse_args(arguments)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}")
    print(cross_attention(options.rounds, tiny=options.tiny))
    print(whole_model(options.rounds, rows=1 if options.tiny else 8))
    size = "tiny" if options.tiny else "quick" if options.quick else "0.5b"
    text, agree = against_transformers(size, min(options.rounds, 3))
    print(text)
    training = training_step.training_report("tiny", rounds=options.rounds, dtype="float32")
    print(training_step.text_of(training))
    return 0 if agree and training["agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
