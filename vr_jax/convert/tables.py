"""Rules that pair the tensors of foreign formats with our parameters; import and export use the same ones.

In the name of a foreign tensor `{n}` stands for the index on our parameter's leading axis (a layer or a level), and
`{i}` for a number that both names hold (a block). Our paths are those of the merged layout (`vr_jax.model.parameters`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vr_jax.errors import UserError


@dataclass(frozen=True)
class Transform:
    """A change of axes between a foreign tensor and one of our arrays.

    Attributes:
        to_ours: Makes our array of the foreign tensor, or of its share where a tensor is packed.
        to_theirs: The inverse.
    """

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _flatten_patch(kernel: np.ndarray) -> np.ndarray:
    """Turns a convolution of stride p, (D, 3, p, p), into a matrix (p * p * 3, D) for pixels (row, column, channel)."""
    return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def _unflatten_patch(kernel: np.ndarray) -> np.ndarray:
    """Inverts `_flatten_patch`."""
    side = round((kernel.shape[0] / 3) ** 0.5)
    return kernel.reshape(side, side, 3, kernel.shape[1]).transpose(3, 2, 0, 1)


KEEP = Transform(lambda x: x, lambda x: x)
TRANSPOSE = Transform(lambda x: x.T, lambda x: x.T)  # torch's kernels are (out, in)
PATCH = Transform(_flatten_patch, _unflatten_patch)


@dataclass(frozen=True)
class Rule:
    """One foreign tensor for each value of `{n}` and `{i}`.

    Attributes:
        theirs: Name of the foreign tensor.
        ours: Path of our parameter. Where there are several, the foreign tensor holds them one after another along its
            first axis, as torch's packed projections do.
        transform: The change of axes.
    """

    theirs: str
    ours: tuple[str, ...]
    transform: Transform = KEEP


Table = tuple[Rule, ...]


def norm(theirs: str, ours: str, *, bias: bool = True) -> Table:
    """Returns the rules of a normalisation's scale and bias."""
    scale = Rule(f"{theirs}.weight", (f"{ours}.scale",))
    return (scale, Rule(f"{theirs}.bias", (f"{ours}.bias",))) if bias else (scale,)


def linear(theirs: str, ours: str, *, bias: bool = True) -> Table:
    """Returns the rules of a linear layer."""
    kernel = Rule(f"{theirs}.weight", (f"{ours}.kernel",), TRANSPOSE)
    return (kernel, Rule(f"{theirs}.bias", (f"{ours}.bias",))) if bias else (kernel,)


def packed_attention(theirs: str, ours: str) -> Table:
    """Returns the rules of a `torch.nn.MultiheadAttention`."""
    return (
        Rule(f"{theirs}.in_proj_weight", tuple(f"{ours}.{x}.kernel" for x in "qkv"), TRANSPOSE),
        Rule(f"{theirs}.in_proj_bias", tuple(f"{ours}.{x}.bias" for x in "qkv")),
        *linear(f"{theirs}.out_proj", f"{ours}.out"),
    )


def _deformable_attention(theirs: str, ours: str) -> Table:
    """Returns the rules of Deformable-DETR's `MSDeformAttn`."""
    return (
        *linear(f"{theirs}.sampling_offsets", f"{ours}.offsets"),
        *linear(f"{theirs}.attention_weights", f"{ours}.weights"),
        *linear(f"{theirs}.value_proj", f"{ours}.value"),
        *linear(f"{theirs}.output_proj", f"{ours}.output"),
    )


def prefixed(prefix: str, table: Table) -> Table:
    """Returns a table with a prefix before every foreign name."""
    return tuple(replace(rule, theirs=prefix + rule.theirs) for rule in table)


_PATCHES = Rule("embeddings.patch_embedding.weight", ("encoder.patch_embed.kernel",), PATCH)
_TOWER: Table = (
    Rule("embeddings.position_embedding.weight", ("encoder.position_embedding",)),
    *norm("encoder.layers.{n}.layer_norm1", "encoder.layers.norm1"),
    *norm("encoder.layers.{n}.layer_norm2", "encoder.layers.norm2"),
    *linear("encoder.layers.{n}.self_attn.q_proj", "encoder.layers.attn.q"),
    *linear("encoder.layers.{n}.self_attn.k_proj", "encoder.layers.attn.k"),
    *linear("encoder.layers.{n}.self_attn.v_proj", "encoder.layers.attn.v"),
    *linear("encoder.layers.{n}.self_attn.out_proj", "encoder.layers.attn.out"),
    *linear("encoder.layers.{n}.mlp.fc1", "encoder.layers.mlp.fc1"),
    *linear("encoder.layers.{n}.mlp.fc2", "encoder.layers.mlp.fc2"),
    *norm("post_layernorm", "encoder.post_norm"),
)
# The names of transformers:models/siglip/modeling_siglip.py below `vision_model.`.
VISION: Table = (_PATCHES, Rule("embeddings.patch_embedding.bias", ("encoder.patch_embed.bias",)), *_TOWER)
# The names of transformers:models/clip/modeling_clip.py below `vision_model.`, one of them with its misspelling.
CLIP_VISION: Table = (
    _PATCHES,
    Rule("embeddings.class_embedding", ("encoder.class_embedding",)),
    *norm("pre_layrnorm", "encoder.pre_norm"),
    *_TOWER,
)

# The names of transformers:models/qwen2/modeling_qwen2.py below `model.`, which qwen3, llama and mistral share.
TEXT: Table = (
    Rule("embed_tokens.weight", ("decoder.embed.embedding",)),
    *norm("layers.{n}.input_layernorm", "decoder.layers.input_norm", bias=False),
    *linear("layers.{n}.self_attn.q_proj", "decoder.layers.attn.q"),
    *linear("layers.{n}.self_attn.k_proj", "decoder.layers.attn.k"),
    *linear("layers.{n}.self_attn.v_proj", "decoder.layers.attn.v"),
    *linear("layers.{n}.self_attn.o_proj", "decoder.layers.attn.out", bias=False),
    *norm("layers.{n}.self_attn.q_norm", "decoder.layers.attn.q_norm", bias=False),  # Qwen3
    *norm("layers.{n}.self_attn.k_norm", "decoder.layers.attn.k_norm", bias=False),
    *norm("layers.{n}.post_attention_layernorm", "decoder.layers.post_attention_norm", bias=False),
    *linear("layers.{n}.mlp.gate_proj", "decoder.layers.mlp.gate", bias=False),
    *linear("layers.{n}.mlp.up_proj", "decoder.layers.mlp.up", bias=False),
    *linear("layers.{n}.mlp.down_proj", "decoder.layers.mlp.down", bias=False),
    *norm("norm", "decoder.norm", bias=False),
)
HEAD: Table = linear("lm_head", "decoder.lm_head", bias=False)


def mlp_projector(first: str, second: str) -> Table:
    """Returns the rules of a projector's two linear layers, given their foreign names."""
    return (*linear(first, "projector.fc1"), *linear(second, "projector.fc2"))


def newline(theirs: str) -> Table:
    """Returns the rule of the newline vector, given its foreign name."""
    return (Rule(theirs, ("image_newline",)),)


_BLOCK = "refusion.blocks.{i}"
# There is no official code of Vision Remember. The names are those of the reference implementation whose outputs
# tests/golden reads; up2, the gates, ffn and the deformable attention exist only in variants of it.
VISION_REMEMBER: Table = (
    *norm("{i}.ln_q", f"{_BLOCK}.ln_q"),
    *norm("{i}.ln_f.{n}", f"{_BLOCK}.ln_f"),
    *linear("{i}.w_up", f"{_BLOCK}.up"),
    *linear("{i}.w_up2", f"{_BLOCK}.up2"),
    *packed_attention("{i}.cross_attn", f"{_BLOCK}.cross_attn"),
    *_deformable_attention("{i}.cross_attn", f"{_BLOCK}.cross_attn"),
    Rule("{i}.cross_attn.level_embed", (f"{_BLOCK}.cross_attn.level_embed",)),
    *linear("{i}.w_dn", f"{_BLOCK}.down"),
    *norm("{i}.ln_s", f"{_BLOCK}.ln_s"),
    *packed_attention("{i}.self_attn", f"{_BLOCK}.self_attn"),
    Rule("{i}.gate_cross", (f"{_BLOCK}.gate_cross",)),
    Rule("{i}.gate_self", (f"{_BLOCK}.gate_self",)),
    Rule("{i}.gate_ffn", (f"{_BLOCK}.gate_ffn",)),
    *norm("{i}.ln_ffn", f"{_BLOCK}.ln_ffn"),
    *linear("{i}.ffn.0", f"{_BLOCK}.ffn1"),
    *linear("{i}.ffn.2", f"{_BLOCK}.ffn2"),
)


@dataclass(frozen=True)
class Slot:
    """The place of one foreign tensor among our parameters.

    Attributes:
        shape: Shape of the foreign tensor.
        paths: Paths of the parameters that hold its shares.
        index: Index on the leading axis of each of them; None for the whole array.
        transform: The change of axes of each share.
    """

    shape: tuple[int, ...]
    paths: tuple[str, ...]
    index: int | None
    transform: Transform

    def place(self, tensor: np.ndarray, params: Mapping[str, np.ndarray]) -> None:
        """Writes a foreign tensor into our arrays, which exist already."""
        shares = np.split(tensor, len(self.paths)) if len(self.paths) > 1 else [tensor]
        for path, share in zip(self.paths, shares, strict=True):
            target = params[path] if self.index is None else params[path][self.index]
            target[...] = self.transform.to_ours(share)

    def add(self, tensor: np.ndarray, params: Mapping[str, np.ndarray]) -> None:
        """Adds a float32 tensor of the foreign form to our arrays, which are rounded once."""
        for path, share in zip(self.paths, np.split(tensor, len(self.paths)), strict=True):
            target = params[path] if self.index is None else params[path][self.index]
            target[...] = (target.astype(np.float32) + self.transform.to_ours(share)).astype(target.dtype)

    def take(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the foreign tensor, contiguous in memory, made of our arrays."""
        shares = [params[path] if self.index is None else params[path][self.index] for path in self.paths]
        shares = [self.transform.to_theirs(np.asarray(share)) for share in shares]
        return np.ascontiguousarray(shares[0] if len(shares) == 1 else np.concatenate(shares)).reshape(self.shape)


def slots(table: Table, params: Mapping[str, Any]) -> dict[str, Slot]:
    """Finds the foreign tensors that hold some of our parameters.

    Args:
        table: The rules of a format.
        params: Arrays, or anything else with a shape, by merged path.

    Returns:
        The places of the foreign tensors by their names.

    Raises:
        UserError: No rule names a parameter.
    """
    found: dict[str, Slot] = {}
    covered: set[str] = set()
    for rule in table:
        pattern = re.compile(re.escape(rule.ours[0]).replace(r"\{i\}", r"(?P<i>\d+)"))
        for path in params:
            match = pattern.fullmatch(path)
            if match is None:
                continue
            number = match.groupdict().get("i")
            paths = tuple(ours.format(i=number) for ours in rule.ours)
            covered.update(paths)
            stacked = "{n}" in rule.theirs
            for index in range(params[path].shape[0]) if stacked else [None]:
                shape = _foreign_shape(rule, [params[p].shape[1 if stacked else 0 :] for p in paths])
                name = rule.theirs.format(i=number, n=index)
                found[name] = Slot(shape, paths, index, rule.transform)
    missing = [path for path in params if path not in covered]
    if missing:
        raise UserError(f"this layout has no name for the parameters {missing}; add rules to vr_jax/convert/tables.py")
    return found


def _foreign_shape(rule: Rule, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a foreign tensor, found by transforming arrays without memory."""
    shares = [rule.transform.to_theirs(np.broadcast_to(np.uint8(0), shape)).shape for shape in shapes]
    if len(shares) == 1:
        return shares[0]
    return (sum(share[0] for share in shares), *shares[0][1:])
