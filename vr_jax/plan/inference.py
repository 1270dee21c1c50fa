"""Plans the prefill and the decoding that `vr_jax.inference` runs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from vr_jax import sharding
from vr_jax.data import slices, tiling
from vr_jax.data.skips import SkipRecord
from vr_jax.errors import UserError
from vr_jax.inference import STOP_TOKENS, DecodeState, Generator, lay_out, unstacked_model, unstacks
from vr_jax.model.batch import Batch, BatchShape, batch_structs
from vr_jax.model.config import VlmConfig
from vr_jax.model.vlm import VisionLanguageModel, abstract_model
from vr_jax.plan.compiling import bytes_per_chip, compile_for, memory_of, roofline_of, versions, work_of
from vr_jax.plan.results import Plan
from vr_jax.plan.topology import Topology, compiling_for
from vr_jax.settings import TrainConfig
from vr_jax.training import forward_flops

Mode = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Prompts of equal length, each with one image.

    Attributes:
        batch: The number of prompts.
        image_size: The (width, height) of the image in pixels, or None for one that fills the largest grid.
        text_tokens: The tokens of a prompt that are not the image's.
        new_tokens: The tokens of an answer that the cache has room for.
        cache_tokens: The slots of the cache, or 0 for those of the prompt and of `new_tokens`.
        dtype: The type of parameters and activations.
    """

    batch: int = 1
    image_size: tuple[int, int] | None = None
    text_tokens: int = 64
    new_tokens: int = 128
    cache_tokens: int = 0
    dtype: str = "bfloat16"


class _Vocabulary:
    """A tokenizer with the few methods that `Generator` needs to build its programs."""

    def __init__(self, size: int) -> None:
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        """Returns the ids of the stop tokens."""
        return {name: self._size - 1 - index for index, name in enumerate(STOP_TOKENS)}


def abstract_generator(model: VisionLanguageModel) -> Generator:
    """Returns a generator of a model that has shapes in place of arrays."""
    return Generator(model, _Vocabulary(model.config.decoder.vocab_size))


def trace_program(
    generator: Generator, mode: Mode, batch: Batch, where: NamedSharding, new_tokens: int
) -> tuple[jax.stages.Traced, DecodeState]:
    """Traces the program of greedy generation.

    Args:
        generator: A generator without arrays.
        mode: The program to trace.
        batch: The prompts, as shapes.
        where: The sharding of the prompts.
        new_tokens: The tokens of an answer that the cache has room for.

    Returns:
        The traced program, and the decode state as shapes.
    """
    mesh: Any = where.mesh  # The type is Any because NamedSharding also accepts abstract meshes.
    whole = sharding.replicated(mesh)

    def scalar(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), dtype, sharding=whole)

    model, greedy = generator.model, (None, None)
    numbers = jax.ShapeDtypeStruct((batch.tokens.shape[0],), jnp.int32, sharding=where)
    arrays = (model, batch, numbers, scalar(jnp.uint32), *greedy)
    static = {"new_tokens": new_tokens, "lengths": None}
    state = _laid_out(generator.prefill_program.eval_shape(*arrays, **static), where)
    if mode == "prefill":
        return generator.prefill_program.trace(*arrays, **static), state
    if unstacks():
        model = jax.eval_shape(unstacked_model, model)
    return generator.decode_program.trace(model, state, scalar(jnp.int32), *greedy), state


def _laid_out(state: DecodeState, where: NamedSharding) -> DecodeState:
    """Returns the state with the shardings that generation gives it."""
    mesh: Any = where.mesh  # The type is Any because NamedSharding also accepts abstract meshes.

    def place(leaf: Any, *names: str | None) -> jax.ShapeDtypeStruct:
        spec = sharding.activation_spec(leaf.shape, *names, mesh=mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return lay_out(state, place)


def plan_inference(
    name: str, config: TrainConfig, topology: Topology, mode: Mode, request: Request, *, effort: str | None = None
) -> Plan:
    """Plans the prefill of prompts, or one decoded token for each, with images in the config's largest layout.

    Args:
        name: The config's name in the plan.
        config: The settings; their mesh and model are used.
        topology: The devices to plan for.
        mode: The program to plan.
        request: The prompts.
        effort: XLA's optimization level; see `compile_for`.

    Raises:
        UserError: The request, the mesh or the model does not fit, or the compiler fails.
    """
    if min(request.batch, request.text_tokens, request.new_tokens) < 1:
        raise UserError("--batch, --text_tokens and --new_tokens must be positive")
    model_config = dataclasses.replace(config.model, dtype=request.dtype, remat="none")  # type: ignore[arg-type]  # the config checks the string
    sizes = config.mesh.to_dict()
    sizes["slices"] = sizes["slices"] or topology.slices
    mesh = sharding.make_mesh(**sizes, devices=topology.devices)
    tiles, vision = _image(model_config, request.image_size)
    length = vision + request.text_tokens
    new_tokens = request.new_tokens
    if request.cache_tokens:
        if request.cache_tokens <= length:
            raise UserError(f"--cache_tokens={request.cache_tokens}: the prompt alone has {length} tokens")
        new_tokens = request.cache_tokens - length
    model = _abstract_model(model_config, mesh, request.dtype)
    divides = request.batch % sharding.batch_shards(mesh) == 0
    where = sharding.batch_sharding(mesh) if divides else sharding.replicated(mesh)
    shape = BatchShape(rows=request.batch, tokens=length, tiles=tiles, tile_size=model_config.image.tile_size)
    batch = batch_structs(shape, where, model_config.batch_fields)
    with compiling_for(topology, mesh):
        traced, state = trace_program(abstract_generator(model), mode, batch, where, new_tokens)
    compiled = compile_for(topology, mesh, traced, effort)
    needed = _prefill_flops(model_config, request, tiles, length) if mode == "prefill" else 0.0
    if mode == "decode":
        needed = _token_flops(model_config, length + new_tokens) * request.batch
    work = roofline = None
    if compiled.costs is not None:
        work = work_of(topology, mesh, traced, compiled.costs, needed)
        roofline = roofline_of(topology, work)
    notes = []
    if not divides and mesh.size > 1:
        notes.append(
            f"{request.batch} prompts do not divide over {sharding.batch_shards(mesh)} pieces: each runs all of them"
        )
    cache = bytes_per_chip(state.cache) if mode == "decode" else 0
    return Plan(
        config=name,
        mode=mode,
        topology=topology.name,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        settings={
            "batch": request.batch,
            "prompt_tokens": length,
            "vision_tokens": vision,
            "tiles": tiles,
            "cache_tokens": length + new_tokens,
            "dtype": request.dtype,
            "attention": model_config.attention,
            "optimization_level": effort or "default",
        },
        notes=notes,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model)),
        trained_parameters=0,
        tokens=request.batch * (length if mode == "prefill" else 1),
        samples=request.batch,
        memory=memory_of(
            compiled,
            frozen=bytes_per_chip(model),
            cache=cache,
            inputs=bytes_per_chip(batch) if mode == "prefill" else bytes_per_chip(state) - cache,
        ),
        work=work,
        roofline=roofline,
        schedule=None,
        compile_seconds=compiled.seconds,
        versions=versions(topology),
    )


def _abstract_model(config: VlmConfig, mesh: Mesh, dtype: str) -> VisionLanguageModel:
    model = abstract_model(config)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where),
        model,
        sharding.param_shardings(model, mesh),
    )


def _image(config: VlmConfig, size: tuple[int, int] | None) -> tuple[int, int]:
    """Returns the tiles and tokens of an image, markers and newlines included.

    Args:
        config: The model.
        size: The (width, height) of the image. None is one that fills the largest grid, or that is cut into
            the most pieces.

    Raises:
        UserError: The model has no largest image, or no tiles for an image of this size.
    """
    if size is None and config.image.aspect_ratio == "slices":
        size = slices.largest_size(config.image)
    if size is not None:
        try:
            layout = tiling.layout(size, config)
        except SkipRecord as error:
            raise UserError(f"--image_size={size[0]}x{size[1]}: {error.detail}") from error
        return layout.tiles, len(layout.cell)
    if config.image.aspect_ratio == "native":
        raise UserError("the model keeps the sizes of images: give the size to plan for, --image_size=WIDTHxHEIGHT")
    side, cells = config.cells_per_side, config.cells_per_tile
    if not config.image.is_anyres:
        return 1, cells
    width, height = max(config.image.grids, key=lambda grid: (grid[0] * grid[1], -abs(grid[0] - grid[1])))
    return width * height + 1, cells + height * side * (width * side + 1)


def _prefill_flops(config: VlmConfig, request: Request, tiles: int, length: int) -> float:
    """Returns the operations that the model needs; only the last position is projected to the vocabulary."""
    forward = forward_flops(config)
    per_prompt = (
        config.encoder.flops_per_image(max(config.feature_levels), tiles)
        + tiles * (forward["projector"] + forward["refusion"])
        + length * forward["decoder"]
        + length * (length + 1) / 2 * forward["attention"]
        + forward["head"]
    )
    return request.batch * per_prompt


def _token_flops(config: VlmConfig, length: int) -> float:
    """Returns the operations for one token that attends to a full cache."""
    forward = forward_flops(config)
    return forward["decoder"] + length * forward["attention"] + forward["head"]
