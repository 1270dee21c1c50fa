"""AdamW, Muon or Adafactor with warm-up, cosine decay, gradient clipping, and numbers of groups of parameters.

The defaults follow LLaVA-NeXT's scripts, that is Hugging Face's Trainer (docs/design/methods.md#hyper-parameters).
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers

from vr_jax.errors import ConfigError
from vr_jax.settings import OptimizerSettings
from vr_jax.training.adafactor import scale_by_adafactor

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]
# Parameters, or arrays that belong to them, by path (docs/design/architecture.md#parameter-paths).
Params = dict[str, Array]


def matches(path: str, globs: Iterable[str]) -> bool:
    """Returns whether a parameter path matches one of the globs. A `*` matches dots too."""
    return any(fnmatch.fnmatchcase(path, glob) for glob in globs)


def decays(path: str) -> bool:
    """Returns whether a parameter is subject to weight decay. Biases and norm scales are not, as in the Trainer."""
    return not path.endswith((".bias", ".scale"))


def make_schedule(settings: OptimizerSettings, total_steps: int) -> Schedule:
    """Builds the learning rate as a function of the number of the update.

    It equals transformers' `get_cosine_schedule_with_warmup`: a linear warm-up from 0, then half a cosine to 0.

    Args:
        settings: The peak learning rate, the share of warm-up steps and the form of the decay.
        total_steps: Number of updates of the run.

    Returns:
        A function from the number of an update, 0 for the first, to its learning rate.

    Raises:
        ConfigError: All updates would be warm-up.
    """
    warmup = settings.warmup_steps(total_steps)
    decay: Schedule
    if settings.schedule == "constant":
        decay = optax.constant_schedule(settings.lr)
    else:
        decay = optax.cosine_decay_schedule(settings.lr, max(1, total_steps - warmup))
    if not warmup:
        return decay
    joined: Schedule = optax.join_schedules([optax.linear_schedule(0.0, settings.lr, warmup), decay], [warmup])
    return joined


def make_optimizer(
    settings: OptimizerSettings, schedule: Schedule, paths: Iterable[str]
) -> optax.GradientTransformation:
    """Builds the optimizer of the trained parameters.

    Args:
        settings: The optimizer's numbers, weight decay, clipping, and the learning rates and decays of groups.
        schedule: The learning rate of an update (`make_schedule`).
        paths: The paths of the trained parameters. The optimizer works on a dictionary with these keys.

    Raises:
        ConfigError: A group of `lr_groups` or `weight_decay_groups` has no effect, or all learning rates are 0.
    """
    paths = list(paths)
    check_groups(settings, paths, [])
    # The schedule is that of `lr`; a group's updates are scaled by the ratio of the two learning rates.
    factors = {path: _of_group(path, settings.lr_groups, settings.lr) / settings.lr for path in paths}
    weight_decays = {path: _of_group(path, settings.weight_decay_groups, settings.weight_decay) for path in paths}

    def scale_groups(updates: Params, params: Params | None = None) -> Params:
        del params
        return {path: update * factors[path] for path, update in updates.items()}

    def decay_mask(params: Params) -> dict[str, bool]:
        return {path: decays(path) for path in params}

    def add_decay(updates: Params, params: Params) -> Params:
        decayed = {path: not isinstance(update, optax.MaskedNode) for path, update in updates.items()}
        return {
            path: update + weight_decays[path] * params[path] if decayed[path] else update
            for path, update in updates.items()
        }

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        _scale(settings),
        optax.masked(optax.stateless(add_decay), decay_mask),
        optax.stateless(scale_groups),
        optax.scale_by_learning_rate(schedule),
    )


def _of_group(path: str, groups: Iterable[tuple[str, float]], default: float) -> float:
    """The number of the first group that a parameter belongs to, or that of the parameters in none."""
    return next((number for glob, number in groups if matches(path, [glob])), default)


def _scale(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Turns gradients into updates of about the root mean square 1, before the learning rate."""
    if settings.name == "adafactor":
        return scale_by_adafactor(settings.decay_rate, settings.clipping_threshold)
    dtype = jnp.dtype(settings.first_moment_dtype)
    adam = optax.scale_by_adam(settings.b1, settings.b2, settings.eps, mu_dtype=dtype)
    if settings.name == "muon":
        return optax.partition({"muon": _scale_by_muon(settings), "adam": adam}, _labels)
    return adam


def is_matrix(path: str, shape: Sequence[int]) -> bool:
    """Returns whether a parameter is the matrix of a linear layer, which Muon can update.

    The vocabulary's matrices are none, since their rows are used one by one, and depthwise convolutions have no matrix.
    """
    return path.endswith(".kernel") and not path.startswith("decoder.lm_head") and min(shape[-2:]) > 1


def _labels(params: Params) -> dict[str, str]:
    return {path: "muon" if is_matrix(path, leaf.shape) else "adam" for path, leaf in params.items()}


def _scale_by_muon(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Muon with updates of about the root mean square that Adam's have.

    Source: optax.contrib.muon; the scale 0.2 * sqrt(max(in, out)) is that of Liu et al. 2025, arXiv 2502.16982.
    """

    def dimensions(updates: Params) -> Any:
        # The axes before the last two stack layers, heads or blocks, of which each is orthogonalised for itself.
        return jax.tree.map(lambda leaf: MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), updates)

    def scale(updates: Params, params: Params | None = None) -> Params:
        del params
        scaled: Params = jax.tree.map(lambda leaf: leaf * (0.2 * max(leaf.shape[-2:]) ** 0.5), updates)
        return scaled

    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=0.95,
            eps=settings.eps,
            mu_dtype=jnp.dtype(settings.first_moment_dtype),
            weight_dimension_numbers=dimensions,
        ),
        optax.stateless(scale),
    )


def no_match(field: str, glob: str, paths: Sequence[str], *, endings_only: bool = False) -> ConfigError:
    """Returns the error of a glob that matches none of the model's parameters, with the nearest names.

    Args:
        field: The field that has the glob.
        glob: The glob.
        paths: The parameters that it may match.
        endings_only: Whether the message lists the last names of the paths instead of the first ones. Layers differ in
            the last ones.
    """
    parts = [path.split(".") for path in paths]
    beginnings = dict.fromkeys(".".join(part[:length]) for part in parts for length in range(1, len(part)))
    endings = dict.fromkeys(f"*.{'.'.join(part[-length:])}" for part in parts for length in range(1, len(part)))
    known = [*(f"{begin}.*" for begin in beginnings), *endings, *paths]
    near = difflib.get_close_matches(glob, known, 3, cutoff=0.7)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    tops = sorted({f"*.{'.'.join(part[-3:])}" if endings_only else ".".join(part[:2]) for part in parts})
    return ConfigError(f"{field}: {glob!r} matches no parameter; {hint}there are {', '.join(tops)}")


def check_groups(settings: OptimizerSettings, trained: list[str], frozen: list[str]) -> None:
    """Checks that every group of parameters has an effect and that something is trained.

    Args:
        settings: The learning rates and weight decays.
        trained: The paths of the trained parameters.
        frozen: The paths of the other parameters.

    Raises:
        ConfigError: A group of `lr_groups` or `weight_decay_groups` has no effect, or all learning rates are 0.
    """
    left = _check_globs("config.optimizer.lr_groups", settings.lr_groups, trained, frozen)
    if not left and not any(lr for _, lr in settings.lr_groups):
        raise ConfigError(
            "config.optimizer.lr_groups gives every trained parameter the learning rate 0: nothing would be trained"
        )
    where = "config.optimizer.weight_decay_groups"
    _check_globs(where, settings.weight_decay_groups, trained, frozen)
    for glob, _ in settings.weight_decay_groups:
        if not any(matches(path, [glob]) and decays(path) for path in trained):
            raise ConfigError(
                f"{where}: {glob!r} has no effect, because it matches biases and norm scales only, which are never "
                "decayed; drop it"
            )


def _check_globs(where: str, groups: Iterable[tuple[str, float]], trained: list[str], frozen: list[str]) -> list[str]:
    """Checks that every glob counts for a trained parameter, and returns the parameters that no glob matches."""
    left = trained
    for glob, _ in groups:
        if not any(matches(path, [glob]) for path in [*trained, *frozen]):
            raise no_match(where, glob, [*trained, *frozen])
        if not any(matches(path, [glob]) for path in trained):
            raise ConfigError(
                f"{where}: {glob!r} matches frozen parameters only; add what it should match to config.trainable, or "
                "drop it"
            )
        if not any(matches(path, [glob]) for path in left):
            raise ConfigError(
                f"{where}: {glob!r} has no effect, because globs before it match all its parameters and the first "
                "match counts; put it before them"
            )
        left = [path for path in left if not matches(path, [glob])]
    return left


def optimizer_shardings(
    optimizer: optax.GradientTransformation,
    params: dict[str, jax.ShapeDtypeStruct],
    shardings: dict[str, jax.sharding.NamedSharding],
    replicated: jax.sharding.NamedSharding,
) -> optax.OptState:
    """Returns the shardings of the optimizer's state.

    Args:
        optimizer: The optimizer.
        params: The trained parameters without arrays, by path.
        shardings: Their shardings. Each moment is laid out like its parameter, and the factors of a second moment along
            the axes that they share with it.
        replicated: The sharding of the counters.
    """

    def of(path: Any, leaf: Any) -> jax.sharding.NamedSharding:
        del leaf
        names = (key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        name = next((name for name in names if name in shardings), None)
        if name is None:
            return replicated
        whole, without = shardings[name], _REDUCED.get(_field(path))
        if without is None:
            return whole
        axes = [*whole.spec, *[None] * (len(params[name].shape) - len(whole.spec))]
        del axes[without]
        return jax.sharding.NamedSharding(whole.mesh, jax.sharding.PartitionSpec(*axes))

    found: optax.OptState = jax.tree_util.tree_map_with_path(of, jax.eval_shape(optimizer.init, params))
    return found


# The fields of optimizers' states that hold moments, and the axis of the parameter that a factor of them lacks.
_FIRST, _SECOND, _REDUCED = ("mu",), ("nu", "rows", "columns", "full"), {"rows": -1, "columns": -2}


def _field(path: Any) -> str:
    """The innermost named field of a state that a path of a leaf goes through."""
    return next((key.name for key in reversed(path) if isinstance(key, jax.tree_util.GetAttrKey)), "")


def moments(state: optax.OptState) -> tuple[list[Any], list[Any]]:
    """Returns the first and the second moments in an optimizer's state, which holds besides them only counters.

    Args:
        state: The state, as arrays or as their shapes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    first, second = ([leaf for path, leaf in leaves if _field(path) in fields] for fields in (_FIRST, _SECOND))
    return first, second
