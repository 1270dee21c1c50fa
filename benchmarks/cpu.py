"""`make bench`: what Vision Remember costs on this machine, as ratios measured side by side in one run.

    python benchmarks/cpu.py [--rounds 7]

1. The local cross-attention of the paper's width (3072, 24 heads, one AnyRes4 picture of 5 tiles), absorbed
   against plain: the same function, so their difference is printed too.
2. A forward and backward pass of a small LLaVA-VR against the same model without Vision Remember.
3. Prefill and cached decoding of the same two."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from timing import report, side_by_side

from vr_jax.model.batch import Batch
from vr_jax.model.config import (
    LlavaConfig,
    ProjectorConfig,
    Qwen2Config,
    SiglipConfig,
    VisionRememberConfig,
    anyres4,
    single_tile,
)
from vr_jax.model.interludes.context import VisionContext
from vr_jax.model.interludes.vision_remember import Block
from vr_jax.model.llava import Llava


def cross_attention(rounds: int) -> str:
    paper = LlavaConfig(interlude=VisionRememberConfig(), image=anyres4())
    rng = np.random.default_rng(0)
    tiles, cells = 5, paper.cells_per_tile
    tokens = tiles * cells
    features = rng.standard_normal((1, tiles, cells, 9, 3 * paper.vision.hidden_size), np.float32)
    context = VisionContext(
        features=jnp.asarray(features),
        vision_cell=jnp.arange(tokens)[None],
        segment_ids=jnp.ones((1, tokens), jnp.int32),
        guide_mask=jnp.zeros((1, tokens), bool),
        tile_segment=jnp.ones((1, tiles), jnp.int32),
        tile_image=jnp.ones((1, tiles), jnp.int32),
        cells_per_tile=cells,
    )
    hidden = jnp.asarray(rng.standard_normal((1, tokens, paper.text.hidden_size), np.float32))
    calls, outputs, flops = {}, {}, {}
    for form in ("plain", "absorbed"):
        interlude = VisionRememberConfig(cross_attention=form, init="torch_default")
        config = dataclasses.replace(paper, interlude=interlude)
        block = Block(interlude, config, 0, dtype=jnp.float32, rngs=nnx.Rngs(0))
        compiled = jax.jit(Block.cross).lower(block, hidden, context).compile()
        calls[form] = lambda block=block, compiled=compiled: compiled(block, hidden, context)
        outputs[form] = calls[form]()
        flops[form] = compiled.cost_analysis()["flops"] / 1e9
    difference = jnp.abs(outputs["plain"] - outputs["absorbed"]).max() / jnp.abs(outputs["plain"]).max()
    table = report("local cross-attention, 5 tiles, width 3072, fp32", side_by_side(calls, rounds=rounds), "plain")
    work = ", ".join(f"{form} {value:.1f}" for form, value in flops.items())
    return f"{table}\n  GFLOP of the compiled programs: {work}; relative difference {difference:.1e}"


def small_config(remember: bool) -> LlavaConfig:
    return LlavaConfig(
        vision=SiglipConfig(
            hidden_size=96, intermediate_size=384, num_layers=6, num_heads=4, image_size=144, patch_size=12
        ),
        text=Qwen2Config(
            vocab_size=4096, hidden_size=256, intermediate_size=768, num_layers=8, num_heads=4, num_kv_heads=2
        ),
        projector=ProjectorConfig(stride=3),
        interlude=VisionRememberConfig(insert_after=(1, 4), levels=(2, 4, 6)) if remember else None,
        vision_feature_layer=6,
        image=single_tile(144),
    )


def small_batch(config: LlavaConfig, rows: int, length: int) -> Batch:
    rng = np.random.default_rng(0)
    cells = config.cells_per_tile
    cell = np.full((rows, length), -1, np.int32)
    cell[:, 8 : 8 + cells] = np.arange(cells)
    side = config.image.tile_size
    return Batch(
        tokens=jnp.asarray(rng.integers(0, config.text.vocab_size, (rows, length), np.int32)),
        positions=jnp.tile(jnp.arange(length), (rows, 1)),
        segment_ids=jnp.ones((rows, length), jnp.int32),
        loss_mask=jnp.tile(jnp.arange(length) > length - 8, (rows, 1)),
        guide_mask=jnp.tile((jnp.arange(length) > 30) & (jnp.arange(length) < length - 10), (rows, 1)),
        vision_cell=jnp.asarray(cell),
        tile_pixels=jnp.asarray(rng.integers(0, 256, (rows, 1, side, side, 3), np.uint8)),
        tile_segment=jnp.ones((rows, 1), jnp.int32),
        tile_image=jnp.ones((rows, 1), jnp.int32),
    )


def whole_model(rounds: int) -> str:
    train, prefill, decode = {}, {}, {}
    for name, remember in (("baseline", False), ("vision remember", True)):
        config = small_config(remember)
        model = Llava(config, rngs=nnx.Rngs(0))
        batch = small_batch(config, rows=8, length=64)

        def loss(model: Llava, batch: Batch) -> jax.Array:
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
        "forward and backward, 8 rows of 64 tokens": train,
        "prefill, 8 prompts": prefill,
        "decode, 8 rows": decode,
    }
    return "\n".join(report(title, side_by_side(calls, rounds=rounds), "baseline") for title, calls in parts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each alternative")
    rounds = parser.parse_args().rounds
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}")
    print(cross_attention(rounds))
    print(whole_model(rounds))


if __name__ == "__main__":
    main()
