"""The training state: trained and frozen parameters, the optimizer's moments and the step, as one sharded pytree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from vr_jax import distributed, sharding
from vr_jax.errors import ConfigError
from vr_jax.model.adaptation import (
    ADAPTER,
    CODES,
    KERNEL,
    QUANTISED,
    SCALES,
    Adaptation,
    adapt,
    initial_adapter,
    merged_kernel,
)
from vr_jax.model.config import VlmConfig
from vr_jax.model.parameters import flatten_params
from vr_jax.model.quantization import KINDS, quantise
from vr_jax.model.vlm import VisionLanguageModel, abstract_model
from vr_jax.pytree import array_dataclass
from vr_jax.training.optimizer import Params, matches, no_match, optimizer_shardings


@array_dataclass
class TrainState:
    """Everything that changes from one update to the next.

    Gradients and moments exist only for the trained parameters (docs/design/decisions.md#decision-9).

    Attributes:
        step: Number of updates done.
        params: Trained parameters by path, in float32; adapters among them.
        frozen: Frozen parameters by path, in `config.frozen_dtype`. A kernel that is quantised is two of them.
        opt_state: State of the optimizer of `params`.
    """

    step: Int[Array, ""]
    params: Params
    frozen: Params
    opt_state: optax.OptState


class ModelTree:
    """The parameters of a model as a dictionary by dot-joined path, and the way back to the model.

    Attributes:
        config: The model's config.
        adaptation: Which linear layers have adapters or quantised kernels.
        shapes: Shape and type of every parameter by path, in the model's order.
    """

    def __init__(self, config: VlmConfig, adaptation: Adaptation | None = None):
        """Builds the model without arrays.

        Args:
            config: The model's config.
            adaptation: Which linear layers are not plain; by default all are.

        Raises:
            ConfigError: The model cannot be built, or it has a pruner and therefore cannot be trained.
        """
        if config.pruning is not None:
            raise ConfigError(
                f"config.model.pruning = {config.pruning.name!r}: pruners act at inference only; train without one, "
                "then evaluate with --pruning"
            )
        self.config, self.adaptation = config, adaptation or Adaptation()
        abstract = adapt(abstract_model(config), self.adaptation)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)
        self._treedef: Any = treedef
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {sharding.path_of(path): leaf for path, leaf in leaves}

    def flatten(self, model: VisionLanguageModel) -> Params:
        """Returns the parameters of a model of this config by path."""
        return dict(zip(self.shapes, jax.tree.leaves(model), strict=True))

    def build(self, params: Mapping[str, Any]) -> VisionLanguageModel:
        """Returns the model with the given parameters. Every path must be there; further ones are ignored."""
        model: VisionLanguageModel = self._treedef.unflatten([params[path] for path in self.shapes])
        return model

    def trainable(self, globs: Iterable[str]) -> tuple[str, ...]:
        """Returns the paths that match one of the globs, in the model's order.

        Raises:
            ConfigError: A glob matches no parameter.
        """
        globs = list(globs)
        for glob in globs:
            if not any(matches(path, [glob]) for path in self.shapes):
                raise no_match("config.trainable", glob, list(self.shapes))
        return tuple(path for path in self.shapes if matches(path, globs))

    def kept_type(self, path: str, frozen_dtype: str) -> DTypeLike:
        """Returns the type in which a frozen parameter is kept.

        Args:
            path: The parameter's path.
            frozen_dtype: `config.frozen_dtype`, or the type of what is not quantised.
        """
        kept: DTypeLike = "bfloat16" if frozen_dtype in KINDS else frozen_dtype
        if path.endswith(QUANTISED):
            kept = self.shapes[path].dtype
        return kept


def abstract_state(
    tree: ModelTree,
    optimizer: optax.GradientTransformation,
    trainable: Iterable[str],
    mesh: Mesh,
    frozen_dtype: str = "bfloat16",
) -> TrainState:
    """Returns the shapes, types and shardings of the state.

    A checkpoint is restored to them, whatever mesh it was written from.

    Args:
        tree: The model's parameters.
        optimizer: The optimizer of the trained parameters.
        trainable: Paths of the trained parameters, which are float32.
        mesh: The devices.
        frozen_dtype: Type of the frozen parameters.
    """
    trainable = set(trainable)
    layout = sharding.param_shardings(tree.shapes, mesh)
    replicated = sharding.replicated(mesh)

    def initial_state() -> TrainState:
        def zeros(path: str, dtype: DTypeLike) -> Array:
            return jnp.zeros(tree.shapes[path].shape, dtype)

        params = {path: zeros(path, jnp.float32) for path in tree.shapes if path in trainable}
        frozen = {
            path: zeros(path, tree.kept_type(path, frozen_dtype)) for path in tree.shapes if path not in trainable
        }
        return TrainState(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params))

    state = jax.eval_shape(initial_state)
    param_layout = {path: layout[path] for path in state.params}
    shardings = (
        replicated,
        param_layout,
        {path: layout[path] for path in state.frozen},
        optimizer_shardings(optimizer, state.params, param_layout, replicated),
    )
    structs = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        (state.step, state.params, state.frozen, state.opt_state),
        shardings,
    )
    # The constructor takes arrays only; a tree of shapes is put together from its leaves.
    abstract: TrainState = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(structs))
    return abstract


def parameter_count(params: Mapping[str, Any]) -> int:
    """Returns the number of parameters in a dictionary by path. A quantised kernel counts as the kernel that it is."""

    def count(path: str, leaf: Any) -> int:
        pairs = path.endswith(CODES) and leaf.dtype == jnp.uint8  # two codes in a byte
        return 0 if path.endswith(SCALES) else math.prod(leaf.shape) * (2 if pairs else 1)

    return sum(count(path, leaf) for path, leaf in params.items())


def shardings_of(abstract: Any) -> Any:
    """Returns the shardings of a pytree of arrays, or of their shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def create_state(
    tree: ModelTree,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    model: VisionLanguageModel,
    *,
    seed: int = 0,
) -> TrainState:
    """Returns the state at step 0.

    Args:
        tree: The model's parameters.
        optimizer: The optimizer of the trained parameters.
        abstract: The shapes, types and shardings of the state.
        model: The plain model with the initial parameters (`vr_jax.model_directory.warm_start`).
        seed: Seed of the adapters.
    """
    values = flatten_params(model)
    del model
    placed: Params = {}
    for path, target in (abstract.params | abstract.frozen).items():
        # Parameters are taken out one by one, so that no more than one of them exists in both types.
        stem, dot, name = path.rpartition(".")
        if path in values:
            placed[path] = jax.device_put(values.pop(path).astype(target.dtype), target.sharding)
        elif dot + name in ADAPTER:
            draw = partial(initial_adapter, path, target.shape, seed)
            placed[path] = jax.jit(draw, out_shardings=target.sharding)()
        elif path not in placed:
            names = [stem + suffix for suffix in QUANTISED]
            wheres = tuple(abstract.frozen[one].sharding for one in names)
            store = jax.jit(partial(quantise, kind=tree.adaptation.kind), out_shardings=wheres)
            placed |= zip(names, store(values.pop(stem + KERNEL)), strict=True)
    params, frozen = ({path: placed[path] for path in part} for part in (abstract.params, abstract.frozen))
    opt_state = jax.jit(optimizer.init, out_shardings=shardings_of(abstract.opt_state))(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)
    return TrainState(step=step, params=params, frozen=frozen, opt_state=opt_state)


def mesh_of(array: Array) -> Mesh:
    """Returns the devices that an array of the state lies on."""
    assert isinstance(array.sharding, NamedSharding)
    mesh = array.sharding.mesh
    assert isinstance(mesh, Mesh)
    return mesh


def merged_model(tree: ModelTree, state: TrainState) -> VisionLanguageModel:
    """Returns the plain model that a state stands for: adapters are merged, and quantised kernels are computed.

    Such a kernel is kept in float32 where the frozen parameters are, and otherwise in bfloat16. The parameters lie on
    the host if this is the only process: a device that holds a quantised base may have no room for the plain one.

    Args:
        tree: The model's parameters.
        state: The state.
    """
    plain, params = ModelTree(tree.config), {**state.frozen, **state.params}
    if not tree.adaptation:
        return plain.build(params)
    changed, mesh = tree.adaptation.adapted | tree.adaptation.quantised, mesh_of(state.step)
    kept = {str(leaf.dtype) for path, leaf in state.frozen.items() if not path.endswith(QUANTISED)}
    dtype = jnp.float32 if kept == {"float32"} else jnp.bfloat16

    def value(path: str) -> Array:
        if path not in changed:
            return params[path]
        names = [path.removesuffix(KERNEL) + end for end in (KERNEL, *QUANTISED, *ADAPTER)]
        parts = {name: params[name] for name in names if name in params}
        spec = sharding.param_shardings({path: plain.shapes[path]}, mesh)[path]
        merge = jax.jit(lambda parts: merged_kernel(parts, path, tree.adaptation).astype(dtype), out_shardings=spec)
        merged: Array = merge(parts)
        return merged

    if distributed.process_count() == 1:
        return plain.build({path: np.asarray(value(path)) for path in plain.shapes})
    return plain.build({path: value(path) for path in plain.shapes})
