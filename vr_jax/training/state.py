"""The training state: what is trained, what is frozen, optimizer moments, step and key, as one sharded pytree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Int, UInt32

from vr_jax import sharding
from vr_jax.errors import ConfigError
from vr_jax.model.config import VlmConfig
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.pytree import array_dataclass
from vr_jax.training.optimizer import matches, optimizer_shardings

Params = dict[str, Array]  # by dot-joined path (docs/architecture.md)


class TrainableError(ValueError):
    """A choice of trainable parameters that cannot be meant; one line for the user."""


@array_dataclass
class TrainState:
    """Everything that changes from step to step, and the frozen parameters. Gradients and moments exist only for
    `params` (design decision 6)."""

    step: Int[Array, ""]  # updates done
    params: Params  # trained, float32 master weights
    frozen: Params
    opt_state: optax.OptState
    key: UInt32[Array, " 2"]  # for what is random in a step; fold in `step`


class ModelTree:
    """A Llava of one config as a dict path -> parameter, and back."""

    def __init__(self, config: VlmConfig):
        """Raises ConfigError for a config that cannot be built, or not be trained. Allocates nothing."""
        if config.pruning is not None:
            raise ConfigError(
                f"config.model.pruning = {config.pruning.name!r}: pruners act at inference only; train without one, "
                "then evaluate with --pruning"
            )
        self.config = config
        abstract = nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0)))
        leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)
        self._treedef: Any = treedef
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {sharding.path_of(path): leaf for path, leaf in leaves}

    def flatten(self, model: VisionLanguageModel) -> Params:
        return dict(zip(self.shapes, jax.tree.leaves(model), strict=True))

    def build(self, params: Mapping[str, Any]) -> VisionLanguageModel:
        """The model with these parameters; all paths must be there."""
        return self._treedef.unflatten([params[path] for path in self.shapes])

    def trainable(self, globs: Iterable[str]) -> list[str]:
        """Paths that match one of `globs`, in model order. Raises TrainableError for a glob that matches nothing."""
        globs = list(globs)
        for glob in globs:
            if not any(matches(path, [glob]) for path in self.shapes):
                tops = sorted({".".join(path.split(".")[:2]) for path in self.shapes})
                raise TrainableError(f"config.trainable: {glob!r} matches no parameter; there are {', '.join(tops)}")
        if not globs:
            raise TrainableError("config.trainable is empty: nothing to train")
        return [path for path in self.shapes if matches(path, globs)]


def abstract_state(
    tree: ModelTree,
    optimizer: optax.GradientTransformation,
    trainable: Iterable[str],
    mesh: Mesh,
    frozen_dtype: str = "bfloat16",
) -> TrainState:
    """Shapes, types and shardings of the state: where to restore a checkpoint to, whatever mesh wrote it.

    Trained parameters are float32, frozen ones `frozen_dtype`."""
    trainable = set(trainable)
    layout = sharding.param_shardings(tree.shapes, mesh)
    whole = sharding.replicated(mesh)

    def struct(path: str, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tree.shapes[path].shape, dtype, sharding=layout[path])

    params = {path: struct(path, jnp.float32) for path in tree.shapes if path in trainable}
    moments = optimizer_shardings(optimizer, params, {path: layout[path] for path in params}, whole)
    fields: dict[str, Any] = {
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        "params": params,
        "frozen": {path: struct(path, frozen_dtype) for path in tree.shapes if path not in trainable},
        "opt_state": jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            jax.eval_shape(optimizer.init, params),
            moments,
        ),
        "key": jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole),
    }
    return TrainState(**fields)


def shardings_of(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def create_state(
    tree: ModelTree,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    model: VisionLanguageModel,
    seed: int,
) -> TrainState:
    """A state at step 0 from a model (`model_directory.warm_start`), laid out and typed as `abstract` says."""
    values = tree.flatten(model)

    def place(targets: Params) -> Params:
        return {
            path: jax.device_put(values.pop(path).astype(target.dtype), target.sharding)
            for path, target in targets.items()
        }

    params, frozen = place(abstract.params), place(abstract.frozen)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings_of(abstract.opt_state))(params)
    step, key = jax.device_put(
        (jnp.zeros((), jnp.int32), jax.random.PRNGKey(seed)), (abstract.step.sharding, abstract.key.sharding)
    )
    return TrainState(step=step, params=params, frozen=frozen, opt_state=opt_state, key=key)
