"""Which linear layers of a model have adapters or quantised kernels, and the parameters that these have.

A model is built plain, and `adapt` gives the layers of its abstract form their other parameters. The layers are those
that `vr_jax.model.layers.linear` makes, wherever they stand: a stage, whose layers `lax.scan` runs, has the adapters
and the codes of all its layers stacked along their leading axis, as it has the kernels. Whether a layer is adapted is a
static attribute of it, so that two models of one config and one adaptation have equal tree structures.

qwix has providers for both, which replace operations of JAX while a model's method runs. They are not used: for a whole
model they skip what runs inside `lax.scan`; applied to single layers they make a class for every build, whose models
have different tree structures, and keep adapters in the type of the base.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vr_jax.model.linear import Linear, merged_update
from vr_jax.model.parameters import flatten_params, unflatten_params
from vr_jax.model.quantization import Kind, dequantise, nf4_block, quantise, quantised_structs
from vr_jax.model.vlm import VisionLanguageModel, abstract_model
from vr_jax.sharding import param_shardings, product_axes

KERNEL, CODES, SCALES = ".kernel", ".kernel_codes", ".kernel_scale"
LORA_A, LORA_B = ".lora_a", ".lora_b"
QUANTISED = (CODES, SCALES)
ADAPTER = (LORA_A, LORA_B)
# Matrices that stay as they are: transformers and peft keep the head out of `all-linear` and of what is quantised, and
# what embeds patches is a convolution there.
_KEPT = ("decoder.lm_head", "encoder.patch_embed")


@dataclass(frozen=True)
class Adaptation:
    """The layers of a model that are not plain, by the paths of their kernels.

    Attributes:
        adapted: Kernels with an adapter.
        rank: Rank of the adapters.
        scale: What the product of an adapter's matrices is multiplied by.
        quantised: Kernels that are quantised.
        kind: How these are stored.
    """

    adapted: frozenset[str] = frozenset()
    rank: int = 0
    scale: float = 1.0
    quantised: frozenset[str] = frozenset()
    kind: Kind = "int8"

    def __bool__(self) -> bool:
        """Returns whether any layer is not plain."""
        return bool(self.adapted or self.quantised)


def linear_kernels(model: VisionLanguageModel) -> dict[str, tuple[int, ...]]:
    """Returns the kernels that can have an adapter or be quantised, with their shapes, by path.

    These are the kernels of all linear layers but the output head and the embedding of patches.

    Args:
        model: A plain model, abstract or not.
    """
    return {f"{path}{KERNEL}": layer.kernel.get_value().shape for path, layer in _layers(model).items()}


def quantisable(shape: tuple[int, ...], kind: Kind) -> bool:
    """Returns whether a kernel of a shape can be stored in a kind; `nf4` needs pairs of input channels."""
    return kind == "int8" or nf4_block(shape[-2]) is not None


def _layers(model: VisionLanguageModel) -> dict[str, Linear]:
    found = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}
    return {path: layer for path, layer in found.items() if not path.startswith(_KEPT)}


def adapt(model: VisionLanguageModel, adaptation: Adaptation) -> VisionLanguageModel:
    """Gives an abstract model the parameters of an adaptation. The model is changed.

    Args:
        model: A plain model with shapes in place of arrays.
        adaptation: The layers that are not plain.

    Returns:
        The same model.
    """
    for path, layer in _layers(model).items():
        kernel = layer.kernel.get_value()
        *lead, inputs, outputs = kernel.shape
        if path + KERNEL in adaptation.adapted:
            rank = adaptation.rank
            layer.lora_a = nnx.Param(jax.ShapeDtypeStruct((*lead, inputs, rank), jnp.float32))
            layer.lora_b = nnx.Param(jax.ShapeDtypeStruct((*lead, rank, outputs), jnp.float32))
            layer.lora_scale = adaptation.scale
        if path + KERNEL in adaptation.quantised:
            codes, scales = quantised_structs(kernel.shape, adaptation.kind)
            layer.kernel = None  # type: ignore[assignment]  # nnx.Linear always has one
            layer.kernel_axes = product_axes(path + KERNEL, len(kernel.shape))
            layer.kernel_codes, layer.kernel_scale = nnx.Param(codes), nnx.Param(scales)
    return model


def quantised_model(model: VisionLanguageModel, kind: Kind, mesh: Mesh | None = None) -> VisionLanguageModel:
    """Returns a model for inference whose linear layers have quantised kernels. The given model must not be used again.

    Args:
        model: A plain model.
        kind: How the kernels are stored.
        mesh: The devices that the parameters are sharded over; None where the model lies on one device.

    Raises:
        UserError: qwix is not installed.
    """
    kernels = frozenset(path for path, shape in linear_kernels(model).items() if quantisable(shape, kind))
    target = adapt(abstract_model(model.config), Adaptation(quantised=kernels, kind=kind))
    params = flatten_params(model)
    del model
    wheres = None if mesh is None else param_shardings(flatten_params(target), mesh)
    for path in kernels:
        names = [path.removesuffix(KERNEL) + end for end in QUANTISED]
        where = None if wheres is None else tuple(wheres[name] for name in names)
        store = jax.jit(partial(quantise, kind=kind), out_shardings=where)
        params |= zip(names, store(params.pop(path)), strict=True)
    return unflatten_params(target, params)


def initial_adapter(path: str, shape: tuple[int, ...], seed: int) -> Float[Array, "*L I O"]:
    """Returns the initial value of a parameter of an adapter.

    A is drawn uniformly between -1 and 1 over sqrt(in), which is torch's kaiming_uniform with a = sqrt(5), and B is
    zero, so that an adapter changes nothing at first (peft `tuners/lora/layer.py`, `reset_lora_parameters`).

    Args:
        path: The parameter's path; each has its own random numbers.
        shape: Its shape.
        seed: Seed of the run.
    """
    if path.endswith(LORA_B):
        return jnp.zeros(shape, jnp.float32)
    bound = shape[-2] ** -0.5
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def merged_kernel(params: Mapping[str, Array], path: str, adaptation: Adaptation) -> Float[Array, "*L I O"]:
    """Returns the kernel of a layer as one array, with its adapter added; float32 unless it is plain.

    Args:
        params: The parameters of the adapted model, by path.
        path: The path of the kernel.
        adaptation: The layers that are not plain.
    """
    stem = path.removesuffix(KERNEL)
    codes = path in adaptation.quantised
    kernel = dequantise(params[stem + CODES], params[stem + SCALES]) if codes else params[path]
    if path in adaptation.adapted:
        kernel = kernel.astype(jnp.float32) + merged_update(
            params[stem + LORA_A], params[stem + LORA_B], adaptation.scale
        )
    return kernel
