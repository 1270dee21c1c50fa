"""What Vision Remember adds to prefill in FLOPs, and how long the train step takes to compile. Nothing is run.

    python -m benchmarks.speed.step_cost [--size 0.5b]

1. Matrix products of the compiled prefill of one AnyRes4 image (5 tiles, 1/9) and 60 text tokens: without Vision
   Remember, with it, and with its plain form, which projects every patch. The body of a loop counts as often as it
   runs, which XLA's `cost_analysis` does not do. The goal is at most 4 % more (plain: 11.6 %).
2. Tracing, lowering and compiling phase 2's train step for one device, none of it cached. Goal: 30 s on two cores."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import platform
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from vr_jax import experiments, sharding
from vr_jax.data import anyres
from vr_jax.model.batch import Batch, BatchShape, batch_structs
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.stages import DecoderInputs, KVCache
from vr_jax.model.refusion.context import VisionContext
from vr_jax.model.refusion.vision_remember import Block, VisionRememberConfig
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.plan.hlo_costs import program_costs
from vr_jax.settings import load_config
from vr_jax.training.program import abstract_batch, build_program

TEXT_TOKENS = 60
IMAGE = (768, 768)  # pixels; fills AnyRes4's largest grid: four tiles and the base
GOAL_SHARE, GOAL_SECONDS = 0.04, 30.0


def abstract_prompt(config: VlmConfig) -> Batch:
    """A prompt about IMAGE, without padding, as shapes."""
    layout = anyres.layout(IMAGE, config.cells_per_side, config.image)
    shape = BatchShape(
        rows=1, tokens=len(layout.cell) + TEXT_TOKENS, tiles=layout.tiles, tile_size=config.image.tile_size
    )
    return batch_structs(shape, SingleDeviceSharding(jax.devices()[0]), weighted_cells=False)


def abstract_model(config: VlmConfig) -> VisionLanguageModel:
    return nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0)))


def flops_of(function, *arguments) -> float:
    """Of the matrix products in the program that `function` compiles to."""
    return program_costs(jax.jit(function).lower(*arguments).compile().as_text()).flops


def prefill_flops(config: VlmConfig) -> float:
    """From the pixels to the last token's logits and the filled cache."""

    def prefill(model: VisionLanguageModel, batch: Batch) -> tuple[jax.Array, KVCache | None]:
        hidden, cache = model(batch, model.init_cache(*batch.tokens.shape))
        return model.logits(hidden[:, -1:]), cache

    return flops_of(prefill, abstract_model(config), abstract_prompt(config))


def block_flops(config: VlmConfig) -> tuple[float, float]:
    """Cross-attention and self-attention of one insertion."""
    model, batch = abstract_model(config), abstract_prompt(config)
    levels = jax.eval_shape(VisionLanguageModel.encode_images, model, batch.tile_pixels)
    context = jax.eval_shape(VisionLanguageModel.vision_context, model, levels, batch)
    stream = jax.eval_shape(VisionLanguageModel.stream, model, levels, batch)

    def bidirectional(block: Block, stream: DecoderInputs, vision: VisionContext) -> jax.Array:
        return block.bidirectional(stream.hidden, stream, vision, *block._text_token(stream.hidden, vision))  # noqa: SLF001  # only this part is compared

    block = model.refusion.blocks[0]
    return flops_of(Block.cross, block, stream.hidden, context), flops_of(bidirectional, block, stream, context)


def prefill_report(size: str) -> str:
    baseline = experiments.BASELINE.config(experiments.DECODERS[size], "anyres4")
    remember = experiments.VISION_REMEMBER.config(experiments.DECODERS[size], "anyres4")
    base = prefill_flops(baseline)
    tokens, tiles = abstract_prompt(baseline).tokens.shape[1], abstract_prompt(baseline).tile_pixels.shape[1]
    lines = [
        f"prefill, Qwen2-{size.upper()}, {tiles} tiles, {tokens - TEXT_TOKENS} + {TEXT_TOKENS} tokens: "
        f"{base / 1e12:.3f} TFLOP without Vision Remember"
    ]
    for form in ("absorbed", "plain"):
        assert isinstance(remember.refusion, VisionRememberConfig)
        refusion = dataclasses.replace(remember.refusion, cross_attention=form)
        config = dataclasses.replace(remember, refusion=refusion)
        more = prefill_flops(config) - base
        cross, attention = block_flops(config)
        goal = f"; goal: at most {GOAL_SHARE:.0%}" if form == "absorbed" else ""
        lines.append(
            f"  {form:<9} + {more / 1e9:6.1f} GFLOP, {more / base:6.2%} ({len(refusion.insert_after)} blocks, of each "
            f"cross-attention {cross / 1e9:.2f}, self-attention {attention / 1e9:.2f}){goal}"
        )
    return "\n".join(lines)


def compile_report(size: str) -> str:
    """Wall and CPU seconds of each stage of phase 2's train step."""
    jax.config.update("jax_enable_compilation_cache", False)
    config = load_config(f"configs/llava_vr_qwen2_{size.replace('.', '_')}.py:phase2")
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    program = build_program(config, mesh, 1000)
    batch = abstract_batch(config, mesh)
    marks = [(time.perf_counter(), time.process_time())]

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    with jax.set_mesh(mesh):
        traced = program.step.trace(program.abstract, batch)
        mark()
        lowered = traced.lower()
        mark()
        lowered.compile()
        mark()
    walls = [after[0] - before[0] for before, after in itertools.pairwise(marks)]
    cpu = marks[-1][1] - marks[0][1]
    rows, tokens = batch.tokens.shape
    return (
        f"train step of phase 2, Qwen2-{size.upper()}, one device, {rows} rows of {tokens} tokens and "
        f"{batch.tile_pixels.shape[1]} tiles: compiled in {sum(walls):.1f} s (traced {walls[0]:.1f}, lowered "
        f"{walls[1]:.1f}, compiled {walls[2]:.1f}; CPU time {cpu:.1f}); goal: {GOAL_SECONDS:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(experiments.DECODERS), default="0.5b", help="of the decoder")
    size = parser.parse_args().size
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}")
    print(compile_report(size))  # first, while nothing is warm
    print(prefill_report(size))


if __name__ == "__main__":
    main()
