"""Every field of docs/design/methods.md#ambiguities against an independent torch implementation in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from tests.noise import assert_within_noise
from tests.tiny import SampleImage, Text, example, pack, params_of, quick, randomized, tiny_config, tiny_refusion
from vr_jax.model.batch import NEWLINE, Batch
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.stages import DecoderInputs
from vr_jax.model.refusion.context import VisionContext
from vr_jax.model.refusion.vision_remember import Block, Features

OPTIONS = {
    "default": {},
    "plain": {"cross_attention": "plain"},
    "levels": {"levels": (4,)},
    "heads": {"cross_heads": 8, "self_heads": 2},
    "no self-attention": {"self_attention": False},
    "up mlp": {"up": "mlp", "init": "torch_default"},
    "tanh gate": {"residual_gate": "tanh", "init": "torch_default", "ffn_multiplier": 1},
    "joint norm": {"feature_norm": "joint"},
    "joint norm, plain": {"feature_norm": "joint", "cross_attention": "plain"},
    "no feature norm": {"feature_norm": "none"},
    "no feature norm, plain": {"feature_norm": "none", "cross_attention": "plain"},
    "self before cross": {"order": "self_cross"},
    "feed-forward": {"ffn_multiplier": 2},
    "self-attention per tile": {"self_scope": "tile"},
    "newlines": {"newline_in_self": True},
    "newlines per tile": {"newline_in_self": True, "self_scope": "tile"},
    "no text-guided token": {"text_pool": "none"},
    "rotary positions": {"self_positions": "rope"},
    "global": {"interaction": "global"},
    "global, plain": {"interaction": "global", "cross_attention": "plain", "feature_norm": "joint"},
    "deformable": {"interaction": "deformable"},
    "deformable, two points": {
        "interaction": "deformable",
        "points": 2,
        "levels": (1, 4),
        "cross_heads": 2,
        "up": "mlp",
        "init": "torch_default",
        "feature_norm": "none",
    },
    "everything": {
        "up": "mlp",
        "residual_gate": "tanh",
        "init": "torch_default",
        "feature_norm": "joint",
        "order": "self_cross",
        "ffn_multiplier": 1,
        "self_scope": "tile",
        "newline_in_self": True,
        "self_positions": "rope",
    },
}
# Every choice of every other field is in the list above. These act outside of a block and are tested where they act.
ELSEWHERE = {"kernel", "insert_after", "shared_weights", "cross_heads", "self_heads", "levels"}


class Reference:
    """One sample at a time: hidden (n, D), features per level (tiles, cells, patches, D_v), in float64 or float32."""

    def __init__(self, config: VlmConfig, params: dict[str, np.ndarray], dtype: torch.dtype):
        assert config.refusion is not None
        self.model, self.config, self.dtype = config, config.refusion, dtype
        self.p = {name: torch.tensor(value, dtype=dtype) for name, value in params.items()}

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.p[f"{name}.kernel"] + self.p[f"{name}.bias"]

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.p[f"{name}.scale"], self.p[f"{name}.bias"], eps=1e-6)

    def gate(self, name: str) -> torch.Tensor | float:
        return torch.tanh(self.p[name]) if self.config.residual_gate == "tanh" else 1.0

    def attend(self, name: str, query, memory, heads: int, turn=lambda x, of: x) -> torch.Tensor:
        q, k, v = (
            self.linear(f"{name}.{part}", x).unflatten(-1, (heads, -1)).movedim(-2, -3)
            for part, x in (("q", query), ("k", memory), ("v", memory))
        )
        attended = F.scaled_dot_product_attention(turn(q, "query"), turn(k, "memory"), v)
        return self.linear(f"{name}.out", attended.movedim(-3, -2).flatten(-2))

    def memory(self, levels: list[torch.Tensor]) -> torch.Tensor:
        kind = self.config.feature_norm
        if kind == "none":
            return torch.cat(levels, -1)
        scale, bias = self.p["ln_f.scale"], self.p["ln_f.bias"]
        if kind == "joint":
            joint = torch.cat(levels, -1)
            return F.layer_norm(joint, joint.shape[-1:], scale.flatten(), bias.flatten(), eps=1e-6)
        return torch.cat([F.layer_norm(f, f.shape[-1:], scale[i], bias[i], eps=1e-6) for i, f in enumerate(levels)], -1)

    def cross(self, x: torch.Tensor, cell, memory: torch.Tensor) -> torch.Tensor:
        heads, x, cells = self.config.cross_heads, x.clone(), self.model.cells_per_tile
        for token in np.flatnonzero(cell >= 0):
            query = self.linear("up", self.norm("ln_q", x[token][None]))
            if self.config.up == "mlp":
                query = self.linear("up2", F.gelu(query))
            tile, within = divmod(int(cell[token]), cells)
            if self.config.interaction == "deformable":
                update = self.sampled(query[0], within, memory[tile])
            else:
                keys = memory[tile, within] if self.config.interaction == "local" else memory[tile].flatten(0, 1)
                update = self.attend("cross_attn", query, keys, heads)[0]
            if self.config.up == "linear":
                update = self.linear("down", update)
            x[token] += self.gate("gate_cross") * update
        return x

    def sampled(self, query: torch.Tensor, cell: int, tile: torch.Tensor) -> torch.Tensor:
        """Deformable attention of one query; `tile` (cells, patches, L * D_v)."""
        heads, levels, points = self.config.cross_heads, len(self.config.levels), self.config.points
        n, s = self.model.cells_per_side, self.model.projector.stride
        maps = tile.unflatten(1, (s, s)).unflatten(0, (n, n)).permute(0, 2, 1, 3, 4).reshape(n * s, n * s, levels, -1)
        offsets = self.linear("cross_attn.offsets", query).reshape(heads, levels, points, 2)
        weights = self.linear("cross_attn.weights", query).reshape(heads, -1).softmax(-1).reshape(heads, levels, points)
        centre = torch.tensor([cell % n + 0.5, cell // n + 0.5], dtype=self.dtype) / n
        attended = torch.zeros(heads, maps.shape[-1] // heads, dtype=self.dtype)
        for level in range(levels):
            value = self.linear("cross_attn.value", maps[:, :, level] + self.p["cross_attn.level_embed"][level])
            value = value.unflatten(-1, (heads, -1)).permute(2, 3, 0, 1)
            grid = 2 * (centre + offsets[:, level] / (n * s)) - 1
            found = F.grid_sample(value, grid[:, None], align_corners=False)[:, :, 0]  # zeros outside
            attended += (found * weights[:, None, level]).sum(-1)
        return self.linear("cross_attn.output", attended.flatten())

    def bidirectional(self, x: torch.Tensor, cell, tile_image, text_token: torch.Tensor | None) -> torch.Tensor:
        if not self.config.self_attention:
            return x
        tile, groups = None, {}
        for token, c in enumerate(cell):
            if c >= 0:
                tile = c // self.model.cells_per_tile
            if c >= 0 or (c == NEWLINE and self.config.newline_in_self):
                key = tile if self.config.self_scope == "tile" else tile_image[tile]
                groups.setdefault(key, []).append(token)
        heads, out = self.config.self_heads or self.model.decoder.num_heads, x.clone()
        for tokens in groups.values():
            states = x[tokens] if text_token is None else torch.cat([x[tokens], text_token[None]])
            z = self.norm("ln_s", states)
            turn = lambda y, of: y  # noqa: E731
            if self.config.self_positions == "rope":
                positions = torch.tensor([*tokens, *([0] if text_token is not None else [])])
                turn = lambda y, of: self.rotate(y, positions[: y.shape[-2]])  # noqa: E731, B023
            out[tokens] += self.gate("gate_self") * self.attend("self_attn", z[: len(tokens)], z, heads, turn)
        return out

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Channels i and i + half turn together by position / theta^(i / half)."""
        half = x.shape[-1] // 2
        angle = positions[:, None] * self.model.decoder.rope_theta ** (-torch.arange(half).to(self.dtype) / half)
        pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag], -1)

    def __call__(self, x, cell, text_token_mask, tile_image, levels) -> torch.Tensor:
        pooled = text_token_mask.any() and self.config.text_pool != "none"
        text_token = x[text_token_mask].amax(0) if pooled else None
        memory = self.memory(levels)
        if self.config.order == "cross_self":
            x = self.bidirectional(self.cross(x, cell, memory), cell, tile_image, text_token)
        else:
            x = self.cross(self.bidirectional(x, cell, tile_image, text_token), cell, memory)
        if self.config.ffn_multiplier:
            x, at = x.clone(), np.flatnonzero(cell >= 0)
            update = self.linear("ffn2", F.gelu(self.linear("ffn1", self.norm("ln_ffn", x[at]))))
            x[at] += self.gate("gate_ffn") * update
        return x


def samples(config: VlmConfig):
    return [
        example(config, Text(2), SampleImage(3, crop=1), Text(4, text_token=True), Text(2, target=True), seed=1),
        example(config, Text(3, text_token=True), seed=2),
        example(config, SampleImage(1), Text(1), SampleImage(2), Text(3), seed=3),
    ]


def inputs(config: VlmConfig):
    """A packed row of three samples, its states, and features of very different scales."""
    batch = pack(config, [samples(config)], tokens=80)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(1, 80, config.decoder.hidden_size)).astype(np.float32)
    shape = (*batch.tile_image.shape, config.cells_per_tile, config.projector.stride**2, config.encoder.hidden_size)
    assert config.refusion is not None
    levels = tuple((rng.normal(size=shape) * 10.0**-i).astype(np.float32) for i in range(len(config.refusion.levels)))
    return batch, hidden, levels


def run(block: Block, hidden, levels, batch: Batch):
    inputs = DecoderInputs(hidden=hidden, positions=batch.positions, segment_ids=batch.segment_ids)
    model = tiny_config(refusion=block.config)
    features = Features(block.config)(levels)
    return block(inputs, VisionContext.of(batch, features, model.cells_per_tile)).hidden


def reference_states(config: VlmConfig, params, hidden, levels, dtype: torch.dtype) -> np.ndarray:
    """Returns the states of the packed row after the block, sample by sample, as the torch reference computes them."""
    reference, begin, tile = Reference(config, params, dtype), 0, 0
    states = torch.tensor(hidden[0], dtype=dtype)
    for one in samples(config):
        at, tiles = slice(begin, begin + len(one.tokens)), slice(tile, tile + len(one.tile_image))
        features = [torch.tensor(level[0, tiles], dtype=dtype) for level in levels]
        states[at] = reference(states[at], one.vision_cell, one.text_token_mask, one.tile_image, features)
        begin, tile = at.stop, tiles.stop
    return states.numpy()


def build(config: VlmConfig) -> Block:
    """Returns a block with random values, in which nothing is an identity."""
    return randomized(nnx.eval_shape(lambda: Block(config.refusion, config.spec, rngs=nnx.Rngs(0))))


# Each option that changes what is computed is in one of these, or in a recorded case of tests/golden.
QUICK_OPTIONS = (
    *("plain", "levels", "heads", "no self-attention", "tanh gate", "no feature norm", "newlines per tile"),
    *("no text-guided token", "global, plain", "deformable, two points", "everything"),
)


@pytest.mark.parametrize("name", quick(OPTIONS, *QUICK_OPTIONS))
def test_matches_torch(name: str):
    config = tiny_config(refusion=tiny_refusion(**OPTIONS[name]))
    block = build(config)
    batch, hidden, levels = inputs(config)
    found = jax.jit(run)(block, hidden, levels, batch)[0]
    exact, plain = (
        reference_states(config, params_of(block), hidden, levels, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert_within_noise(found, exact, plain)


# The backward pass is compiled for the options that share no code with one another; the others run with the slow tests.
@pytest.mark.parametrize("name", quick(OPTIONS, "everything"))
def test_every_parameter_is_trained(name: str):
    config = tiny_config(refusion=tiny_refusion(**OPTIONS[name]))
    block = build(config)
    batch, hidden, levels = inputs(config)
    gradients = jax.jit(jax.grad(lambda block: jnp.sum(jnp.sin(run(block, hidden, levels, batch)))))(block)
    for path, gradient in params_of(gradients).items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 1e-5 or path.endswith(".k.bias"), path  # softmax ignores a shift of the keys


def test_every_choice_is_covered():
    """A new field or choice of VisionRememberConfig must be added to OPTIONS (or named in ELSEWHERE)."""
    fields = {f.name for f in dataclasses.fields(tiny_refusion())} - ELSEWHERE
    tried = {name: {getattr(tiny_refusion(**options), name) for options in OPTIONS.values()} for name in fields}
    assert {name for name, values in tried.items() if len(values) < 2} == set()


# Options by what they are, and whether the new block adds nothing.
AT_FIRST = {
    "feed-forward": ({"ffn_multiplier": 1}, True),
    "feed-forward, mlp up": ({"ffn_multiplier": 1, "up": "mlp"}, True),
    "tanh gates": ({"ffn_multiplier": 1, "residual_gate": "tanh", "init": "torch_default"}, True),
    "torch's initial values": ({"init": "torch_default"}, False),
    "global": ({"interaction": "global"}, True),
    "deformable": ({"interaction": "deformable"}, True),
    "deformable, mlp up": ({"interaction": "deformable", "up": "mlp"}, True),
}


@pytest.mark.parametrize("name", quick(AT_FIRST, "tanh gates", "torch's initial values", "deformable, mlp up"))
def test_what_it_adds_at_its_initial_values(name: str):
    options, identity = AT_FIRST[name]
    config = tiny_config(refusion=tiny_refusion(**options))
    batch, hidden, levels = inputs(config)

    @jax.jit
    def fresh():
        return run(Block(config.refusion, config.spec, rngs=nnx.Rngs(0)), hidden, levels, batch)

    assert (np.asarray(fresh()) == hidden).all() == identity
