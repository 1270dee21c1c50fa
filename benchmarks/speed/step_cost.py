"""Counts the FLOPs that Vision Remember adds to the prefill, and times the compilation of the train step.

    python -m benchmarks.speed.step_cost [--size 0.5b]

Nothing is run on a device; both numbers are about compiled programs:

1. The matrix products in the prefill of one image and 60 text tokens. The script compares a model without Vision
   Remember, one with it, and one with its plain form, which projects every patch. The body of a loop counts as often as
   it runs, unlike in XLA's `cost_analysis`. The image is one of AnyRes4 (5 tiles, 1/9 of the tokens), where the goal is
   at most 4 % more (the plain form adds 11.6 %). The sizes qwen2_5_vl and minicpm_v are those of the paper's Table 6
   (configs/table6): Qwen2.5-VL-3B with an image of 1344 x 896 pixels, and MiniCPM-V 2.0 with one of 1344 x 1344, which
   makes the most slices, ten.
2. The time to trace, lower and compile phase 2's train step for one device, with no compilation cache. The goal is
   30 seconds on two cores.

The size "tiny" uses the widths of configs/demo.py, which only shows that the script works.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import platform
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jax.sharding import SingleDeviceSharding

from vr_jax import experiments, sharding
from vr_jax.data import tiling
from vr_jax.model.batch import Batch, BatchShape, batch_structs
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.stages import KVCache
from vr_jax.model.refusion.vision_remember import Block, VisionRememberConfig
from vr_jax.model.vlm import VisionLanguageModel, abstract_model
from vr_jax.plan.hlo_costs import program_costs
from vr_jax.settings import load_config
from vr_jax.training import abstract_batch, build_program

TEXT_TOKENS = 60
TINY, TINY_CONFIG = "tiny", "configs/demo.py"
# The (width, height) of the image for the models of Table 6.
TABLE6 = {"qwen2_5_vl": (1344, 896), "minicpm_v": (1344, 1344)}
GOAL_SHARE, GOAL_SECONDS = 0.04, 30.0


def abstract_prompt(config: VlmConfig, size: tuple[int, int] | None = None) -> Batch:
    """The shapes of a prompt without padding: an image, and the text.

    Args:
        config: The model.
        size: The (width, height) of the image; by default it fills the largest square grid of tiles of AnyRes4.
    """
    layout = tiling.layout(size or (2 * config.image.tile_size,) * 2, config)
    shape = BatchShape(
        rows=1, tokens=len(layout.cell) + TEXT_TOKENS, tiles=layout.tiles, tile_size=config.image.tile_size
    )
    return batch_structs(shape, SingleDeviceSharding(jax.devices()[0]), config.batch_fields)


def flops_of(function: Callable[..., Any], *arguments: Any) -> float:
    """The floating-point operations of the matrix products in the program that `function` compiles to."""
    return program_costs(jax.jit(function).lower(*arguments).compile().as_text()).flops


def prefill_flops(config: VlmConfig, prompt: Batch) -> float:
    """The operations of a prefill, from the pixels to the last token's logits and the filled caches."""

    def prefill(model: VisionLanguageModel, batch: Batch) -> tuple[jax.Array, KVCache | None]:
        hidden, cache = model(batch, model.init_cache(*batch.tokens.shape))
        return model.logits(hidden[:, -1:]), cache

    return flops_of(prefill, abstract_model(config), prompt)


def block_flops(config: VlmConfig, batch: Batch) -> tuple[float, float]:
    """The operations of the cross-attention and of the rest (the self-attention) of one insertion."""
    model = abstract_model(config)
    levels = jax.eval_shape(VisionLanguageModel.encode_images, model, batch)
    context = jax.eval_shape(VisionLanguageModel.vision_context, model, levels, batch)
    inputs = jax.eval_shape(VisionLanguageModel.inputs, model, levels, batch)
    assert model.refusion is not None
    block = model.refusion.block(0)
    cross = flops_of(Block.cross, block, inputs.hidden, context)
    return cross, flops_of(Block.__call__, block, inputs, context) - cross


def prefill_models(size: str) -> tuple[VlmConfig, VlmConfig]:
    """The model without and with Vision Remember."""
    if size == TINY:
        demo = load_config(TINY_CONFIG).model
        remember = dataclasses.replace(demo, image=experiments.IMAGES["anyres4"](demo.image.tile_size))
        return dataclasses.replace(remember, refusion=None), remember
    if size in TABLE6:
        remember = load_config(f"configs/table6/{size}_vr.py:phase2").model
        # The training rows of Table 6 hold smaller images than the released Qwen2.5-VL takes.
        image = dataclasses.replace(remember.image, max_pixels=ImageConfig.max_pixels)
        remember = dataclasses.replace(remember, image=image)
        return dataclasses.replace(remember, refusion=None), remember
    baseline, remember = (
        system.config(experiments.DECODERS[size], "anyres4")
        for system in (experiments.BASELINE, experiments.VISION_REMEMBER)
    )
    return baseline, remember


def prefill_report(size: str) -> str:
    """The operations that Vision Remember adds to the prefill, as text."""
    baseline, remember = prefill_models(size)
    prompt = abstract_prompt(baseline, TABLE6.get(size))
    base = prefill_flops(baseline, prompt)
    tokens, tiles = prompt.tokens.shape[1], prompt.tile_pixels.shape[1]
    name = size if size in TABLE6 else f"Qwen2-{size.upper()}"
    lines = [
        f"prefill, {name}, {tiles} tiles, {tokens - TEXT_TOKENS} + {TEXT_TOKENS} tokens: "
        f"{base / 1e12:.3f} TFLOP without Vision Remember"
    ]
    for form in ("absorbed", "plain"):
        assert isinstance(remember.refusion, VisionRememberConfig)
        refusion = dataclasses.replace(remember.refusion, cross_attention=form)
        config = dataclasses.replace(remember, refusion=refusion)
        more = prefill_flops(config, prompt) - base
        cross, attention = block_flops(config, prompt)
        goal = f"; goal: at most {GOAL_SHARE:.0%}" if form == "absorbed" and size not in TABLE6 else ""
        lines.append(
            f"  {form:<9} + {more / 1e9:6.1f} GFLOP, {more / base:6.2%} ({len(refusion.insert_after)} blocks with "
            f"{cross / 1e9:.2f} in the cross-attention and {attention / 1e9:.2f} in the self-attention of each){goal}"
        )
    return "\n".join(lines)


def compile_report(size: str) -> str:
    """Compiles phase 2's train step and returns the seconds of each step of the compilation, as text.

    The compilation cache is off from then on.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    file = TINY_CONFIG if size == TINY else f"configs/llava_vr_qwen2_{size.replace('.', '_')}.py:phase2"
    config = load_config(file)
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


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--size",
        choices=(TINY, *sorted(experiments.DECODERS), *TABLE6),
        default="0.5b",
        help="size of the decoder, or a model of Table 6",
    )
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Compiles the programs and prints both reports; of the models of Table 6 the first one alone."""
    size = parser().parse_args(arguments).size
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}")
    if size not in TABLE6:
        print(compile_report(size))  # first, while nothing is warm
    print(prefill_report(size))


if __name__ == "__main__":
    main()
