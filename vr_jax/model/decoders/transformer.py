"""`transformer`: the decoder of Qwen2 and its relatives.

All are one pre-norm transformer with RMSNorm, rotary positions, grouped-query attention and a SwiGLU, whose layers run
in stages (docs/design/decisions.md#decision-1). Fields of the config say what differs:

| model | fields that are not the defaults |
|---|---|
| Qwen2, Qwen2.5 | none |
| Qwen3 | `attention_bias=False`, `query_key_norm=True`, `head_width=128` |
| Llama 2 and 3, Vicuna, Mistral from v0.2 on | `attention_bias=False`, `tie_word_embeddings=False` |
| MiniCPM | as Llama, and the three scales |
| Qwen2.5-VL | `rope_sections` |

Sources: transformers `models/{qwen2,qwen3,llama,mistral}/modeling_*.py`; openbmb/MiniCPM-2B-sft-bf16
`modeling_minicpm.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vr_jax.fields import PositiveFloat, PositiveInt, check
from vr_jax.kernels.attention import attention
from vr_jax.model.decoders.stages import (
    DecoderInputs,
    DecodeStage,
    HiddenStates,
    KVCache,
    Rotary,
    StageCache,
    StageHook,
    scan_stage,
)
from vr_jax.model.layers import (
    Embedding,
    RMSNorm,
    linear,
    maybe_remat,
    merge_heads,
    multi_axis_angles,
    normal,
    rotary_angles,
    rotate,
    split_heads,
    stack_layers,
)
from vr_jax.model.registry import DecoderConfig
from vr_jax.model.spec import ModelSpec
from vr_jax.sharding import constrain

KeysValues = tuple[Array, Array]
# Maps the query (B, N, H, K), key and value (B, N, G, K) of a layer to the result of the attention (B, N, H, K) and to
# what the layer hands on besides its hidden states: the key-value cache, or None.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(DecoderConfig, name="transformer"):
    """A decoder; the defaults are those of `Qwen/Qwen2-0.5B-Instruct`.

    Attributes:
        intermediate_size: Channels of the feed-forward layers.
        head_width: Channels of a head. None is `hidden_size / num_heads`.
        attention_bias: Whether queries, keys and values have biases, as in Qwen2.
        query_key_norm: Whether an RMSNorm over the channels of a head comes before the rotation, as in Qwen3.
        rms_norm_eps: Epsilon of the norms.
        rope_sections: How many rotary frequencies each axis of multi-axis positions has (time, row and column), in the
            order of the frequencies, as in Qwen2.5-VL (`mrope_section`). None counts tokens on one axis.
        embedding_scale: What the embeddings of text tokens are multiplied by, as in MiniCPM (`scale_emb`).
        residual_scale: What the output of each sub-layer is multiplied by before it is added, as in MiniCPM
            (`scale_depth / sqrt(num_layers)`).
        logit_scale: What the last hidden states are multiplied by before the head, as in MiniCPM
            (`dim_model_base / hidden_size`).
        initializer_range: Standard deviation of random weights. Narrow models that are trained from scratch want about
            hidden_size ** -0.5.
    """

    vocab_size: PositiveInt = 151936
    hidden_size: PositiveInt = 896
    intermediate_size: PositiveInt = 4864
    num_layers: PositiveInt = 24
    num_heads: PositiveInt = 14
    num_kv_heads: PositiveInt = 2
    head_width: PositiveInt | None = None
    attention_bias: bool = True
    query_key_norm: bool = False
    rope_theta: PositiveFloat = 1e6
    rope_sections: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    rms_norm_eps: PositiveFloat = 1e-6
    embedding_scale: PositiveFloat = 1.0
    residual_scale: PositiveFloat = 1.0
    logit_scale: PositiveFloat = 1.0
    tie_word_embeddings: bool = True
    initializer_range: PositiveFloat = 0.02

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        check(
            self.head_width is not None or self.hidden_size % self.num_heads == 0,
            f"TransformerConfig.hidden_size = {self.hidden_size} is not divisible by num_heads = {self.num_heads}",
        )
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"TransformerConfig.num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}",
        )

        check(
            self.rope_sections is None or sum(self.rope_sections) == self.head_dim // 2,
            f"TransformerConfig.rope_sections = {self.rope_sections} do not add up to {self.head_dim // 2}, the rotary "
            f"frequencies of a head of {self.head_dim} channels",
        )

    @property
    def multi_axis(self) -> bool:
        """See `DecoderConfig.multi_axis`."""
        return self.rope_sections is not None

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.head_width or self.hidden_size // self.num_heads

    def flops_per_token(self) -> float:
        """See `DecoderConfig.flops_per_token`."""
        projected = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        layer = 2 * self.hidden_size * (projected + 3 * self.intermediate_size)
        return self.num_layers * layer

    def flops_per_pair(self) -> float:
        """See `DecoderConfig.flops_per_pair`."""
        return self.num_layers * 4 * self.num_heads * self.head_dim

    def build(self, spec: ModelSpec, *, bounds: tuple[int, ...], rngs: nnx.Rngs) -> Decoder:
        """See `DecoderConfig.build`."""
        return Decoder(
            self,
            bounds=bounds,
            attention_backend=spec.attention,
            remat=spec.remat,
            dtype=spec.dtype,
            rngs=rngs,
        )


class Attention(nnx.Module):
    """The projections of grouped-query attention."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the projections."""
        width, head_dim = config.hidden_size, config.head_dim
        init, bias = normal(config.initializer_range), config.attention_bias
        self.q = linear(width, config.num_heads * head_dim, dtype=dtype, rngs=rngs, init=init, use_bias=bias)
        self.k = linear(width, config.num_kv_heads * head_dim, dtype=dtype, rngs=rngs, init=init, use_bias=bias)
        self.v = linear(width, config.num_kv_heads * head_dim, dtype=dtype, rngs=rngs, init=init, use_bias=bias)
        self.out = linear(config.num_heads * head_dim, width, dtype=dtype, rngs=rngs, init=init, use_bias=False)
        if config.query_key_norm:
            self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.heads, self.kv_heads, self.query_key_norm = config.num_heads, config.num_kv_heads, config.query_key_norm

    def project(
        self, x: Float[Array, "B N D"], rotary: Rotary
    ) -> tuple[Float[Array, "B N H K"], Float[Array, "B N G K"], Float[Array, "B N G K"]]:
        """The rotated queries and keys, and the values."""
        q, k = split_heads(self.q(x), self.heads), split_heads(self.k(x), self.kv_heads)
        if self.query_key_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *rotary), rotate(k, *rotary), split_heads(self.v(x), self.kv_heads)


class Mlp(nnx.Module):
    """The feed-forward layer, a SwiGLU without biases."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the three projections."""
        width, inner = config.hidden_size, config.intermediate_size
        init = normal(config.initializer_range)
        self.gate = linear(width, inner, dtype=dtype, rngs=rngs, init=init, use_bias=False)
        self.up = linear(width, inner, dtype=dtype, rngs=rngs, init=init, use_bias=False)
        self.down = linear(inner, width, dtype=dtype, rngs=rngs, init=init, use_bias=False)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Maps hidden states."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """One decoder layer: attention and feed-forward layer, each with an RMSNorm before it."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the sub-layers."""
        self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)
        self.residual_scale = config.residual_scale

    def __call__(self, x: Float[Array, "B N D"], rotary: Rotary, attend: Attend) -> tuple[Float[Array, "B N D"], Any]:
        """Runs the layer.

        Args:
            x: Hidden states.
            rotary: Cosine and sine of the rotary angles.
            attend: The attention, over the row itself or over a cache.

        Returns:
            The hidden states after the layer, and the second result of `attend`.
        """
        q, k, v = self.attn.project(self.input_norm(x), rotary)
        attended, written = attend(q, k, v)
        x = x + self._scaled(self.attn.out(merge_heads(attended)))
        x = x + self._scaled(self.mlp(self.post_attention_norm(x)))
        return constrain(x, "batch", "seq", "embed"), written

    def _scaled(self, update: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        return update if self.residual_scale == 1 else update * self.residual_scale


class Decoder(nnx.Module):
    """Token embedding, stages of layers, final norm and head; `DecoderModule` documents the methods."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        bounds: tuple[int, ...],
        layer: Callable[..., DecoderLayer] = DecoderLayer,
        attention_backend: str = "auto",
        remat: str = "none",
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Initialises the decoder.

        Args:
            config: Its sizes.
            bounds: Stage k holds the layers bounds[k] .. bounds[k + 1] - 1.
            layer: Makes a layer; a subclass of `DecoderLayer` where a relative of Qwen2 differs.
            attention_backend: Backend of `vr_jax.kernels.attention`.
            remat: What the layers recompute in the backward pass (`layers.maybe_remat`).
            dtype: Type of the activations.
            rngs: Random state of the initial values.
        """
        init = normal(config.initializer_range)
        self.embed = Embedding(
            config.vocab_size, config.hidden_size, init=init, dtype=dtype, rngs=rngs, scale=config.embedding_scale
        )
        self.stages = nnx.List(
            [
                stack_layers(lambda r: layer(config, dtype=dtype, rngs=r), stop - start, rngs)
                for start, stop in itertools.pairwise(bounds)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = linear(
                config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs, init=init, use_bias=False
            )
        self.config, self.bounds, self.dtype = config, bounds, dtype
        self.attention_backend, self.remat = attention_backend, remat

    def init_cache(self, rows: int, length: int | Sequence[int]) -> KVCache:
        """See `DecoderModule.init_cache`."""
        c = self.config
        layers = [stop - start for start, stop in itertools.pairwise(self.bounds)]
        lengths = [length] * len(layers) if isinstance(length, int) else length

        def stage(layers: int, length: int) -> StageCache:
            shape = (layers, rows, c.num_kv_heads, length, c.head_dim)
            return StageCache(
                keys=jnp.zeros(shape, self.dtype),
                values=jnp.zeros(shape, self.dtype),
                valid=jnp.zeros((rows, length), bool),
                next=jnp.zeros((), jnp.int32),
                shift=jnp.zeros(rows, jnp.int32),
            )

        return tuple(stage(*sizes) for sizes in zip(layers, lengths, strict=True))

    def __call__(
        self, inputs: DecoderInputs, cache: KVCache | None = None, stage_hook: StageHook[Any] | None = None
    ) -> tuple[Float[Array, "B M D"], KVCache | None]:
        """See `DecoderModule.__call__`."""
        caches: list[StageCache] = []
        last_position = inputs.positions[:, -1]
        state = stage_hook.state if stage_hook else None
        for k, stage in enumerate(self.stages):
            if stage_hook is not None:
                inputs, state = stage_hook.apply(k, inputs, state)
            inputs, written = self._run_stage(stage, inputs, cache[k] if cache else None)
            if written is not None:
                caches.append(dataclasses.replace(written, shift=last_position - inputs.positions[:, -1]))
        if stage_hook is not None:
            inputs, _ = stage_hook.apply(len(self.stages), inputs, state)
        return self._last(inputs.hidden), (tuple(caches) if cache else None)

    def _run_stage(
        self, stage: DecoderLayer, inputs: DecoderInputs, cache: StageCache | None
    ) -> tuple[DecoderInputs, StageCache | None]:
        """Runs one stage on whole rows and fills its cache."""
        rotary = self._rotary(inputs.positions, inputs.grid_positions)

        def body(x: Array, layer: DecoderLayer) -> tuple[Array, KeysValues | None]:
            def attend(q: Array, k: Array, v: Array) -> tuple[Array, KeysValues | None]:
                written = None if cache is None else (k.swapaxes(1, 2), v.swapaxes(1, 2))
                return self._attend(inputs, q, k, v), written

            return layer(x, rotary, attend)

        hidden, written = jax.lax.scan(maybe_remat(body, self.remat, in_scan=True), inputs.hidden, stage)
        if cache is not None:
            assert written is not None
            (keys, values), length = written, hidden.shape[1]
            cache = dataclasses.replace(
                cache,
                keys=cache.keys.at[:, :, :, :length].set(keys),
                values=cache.values.at[:, :, :, :length].set(values),
                valid=cache.valid.at[:, :length].set(inputs.segment_ids > 0),
                next=jnp.asarray(length, jnp.int32),
            )
        return inputs.replace(hidden=hidden), cache

    def _last(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """The states that the head reads."""
        hidden = self.norm(hidden)
        return hidden if self.config.logit_scale == 1 else hidden * self.config.logit_scale

    def _rotary(self, positions: Int[Array, "B N"], grid_positions: Int[Array, "B N 2"] | None = None) -> Rotary:
        """The angles. New text tokens of generation have no grid positions, because their axes are equal."""
        sections = self.config.rope_sections
        if sections is None or grid_positions is None:
            return rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        axes = jnp.concatenate([positions[..., None], grid_positions], axis=-1)
        return multi_axis_angles(axes, sections, self.config.head_dim, self.config.rope_theta)

    def _attend(
        self,
        inputs: DecoderInputs,
        q: Float[Array, "B N H K"],
        k: Float[Array, "B N G K"],
        v: Float[Array, "B N G K"],
    ) -> Float[Array, "B N H K"]:
        segments = inputs.segment_ids
        return attention(
            q, k, v, query_segments=segments, key_segments=segments, causal=True, backend=self.attention_backend
        )

    def hidden_states(
        self,
        inputs: DecoderInputs,
        layers: Sequence[int],
        stage_hook: StageHook[Any] | None = None,
        select: Callable[[Float[Array, "B N D"]], Float[Array, "B M D"]] = lambda hidden: hidden,
    ) -> HiddenStates:
        """See `DecoderModule.hidden_states`."""
        depth = self.config.num_layers
        if list(layers) != sorted(set(layers)) or not layers or layers[0] < 1 or layers[-1] > depth:
            raise ValueError(f"layers = {tuple(layers)}: expected strictly increasing numbers in 1..{depth}")
        like = jax.eval_shape(select, inputs.hidden)
        taken = jnp.zeros((len(layers), *like.shape), like.dtype)
        resumed: dict[int, Array] = {}
        state = stage_hook.state if stage_hook else None
        for k, (stage, (start, stop)) in enumerate(zip(self.stages, itertools.pairwise(self.bounds), strict=True)):
            if start >= layers[-1]:
                break
            if stage_hook is not None:
                inputs, state = stage_hook.apply(k, inputs, state)
                if k:
                    resumed[start] = select(inputs.hidden)
            # A layer that nobody asked for writes beyond the end, which drops it.
            slots = [layers.index(i) if i in layers else len(layers) for i in range(start + 1, stop + 1)]
            inputs, taken = self._run_tapped(stage, inputs, taken, jnp.asarray(slots), select)
        return HiddenStates(after=dict(zip(layers, taken, strict=True)), resumed=resumed, hook_state=state)

    def _run_tapped(
        self,
        stage: DecoderLayer,
        inputs: DecoderInputs,
        taken: Float[Array, "K B M D"],
        slots: Int[Array, " L"],
        select: Callable[[Array], Array],
    ) -> tuple[DecoderInputs, Float[Array, "K B M D"]]:
        """Runs one stage and writes the selected states after layer i to `taken[slots[i]]`."""
        rotary = self._rotary(inputs.positions, inputs.grid_positions)

        def body(carry: tuple[Array, Array], layer_and_slot: tuple[DecoderLayer, Array]) -> tuple[Any, None]:
            # The result is carried and not scanned out, because a scan would stack the states of every layer.
            x, taken = carry
            layer, slot = layer_and_slot
            x, _ = layer(x, rotary, lambda q, k, v: (self._attend(inputs, q, k, v), None))
            return (x, taken.at[slot].set(select(x), mode="drop")), None

        (hidden, taken), _ = jax.lax.scan(body, (inputs.hidden, taken), (stage, slots))
        return inputs.replace(hidden=hidden), taken

    def last_token_attention(self, stage: int, inputs: DecoderInputs) -> Float[Array, "B N"]:
        """See `DecoderModule.last_token_attention`."""
        layer: DecoderLayer = jax.tree.map(lambda leaf: leaf[0], self.stages[stage])
        config, segments = self.config, inputs.segment_ids
        index = jnp.arange(segments.shape[1])
        last = jnp.max(jnp.where(segments > 0, index, 0), axis=1, keepdims=True)

        def at_last(array: Array) -> Array:
            taken = jnp.take_along_axis(array, last.reshape(-1, *(1,) * (array.ndim - 1)), axis=1)
            return constrain(taken, "batch", *(None,) * (array.ndim - 1))

        x = layer.input_norm(inputs.hidden)
        cos, sin = self._rotary(inputs.positions, inputs.grid_positions)
        _, key, _ = layer.attn.project(x, (cos, sin))
        query, _, _ = layer.attn.project(at_last(x), (at_last(cos), at_last(sin)))
        query = query.reshape(query.shape[0], config.num_kv_heads, -1, config.head_dim)
        logits = jnp.einsum("bgrk,bngk->bgrn", query, key, preferred_element_type=jnp.float32)
        mask = (segments > 0) & (index <= last)
        logits = jnp.where(mask[:, None, None], logits * config.head_dim**-0.5, jnp.finfo(jnp.float32).min)
        return jnp.where(mask, jnp.mean(jax.nn.softmax(logits, axis=-1), axis=(1, 2)), 0.0)

    def decode(
        self,
        hidden: Float[Array, "B 1 D"],
        positions: Int[Array, "B 1"],
        cache: Sequence[Any],
        decode_stage: DecodeStage | None = None,
    ) -> tuple[Float[Array, "B 1 D"], tuple[Any, ...]]:
        """See `DecoderModule.decode`."""
        run = decode_stage or scan_stage
        caches = []
        for stage, stage_cache in zip(self.stages, cache, strict=True):
            rotary = self._rotary(positions - stage_cache.shift[:, None])
            hidden, stage_cache = run(stage, hidden, rotary, stage_cache)
            caches.append(stage_cache)
        return self._last(hidden), tuple(caches)

    def head_kernel(self) -> Float[Array, "D V"]:
        """See `DecoderModule.head_kernel`."""
        if self.config.tie_word_embeddings:
            return self.embed.embedding[...].T
        return self.lm_head.kernel[...]

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """See `DecoderModule.logits`."""
        if self.config.tie_word_embeddings:
            # The transpose is avoided: for a single token XLA's CPU compiler reads it column by column, 8 times slower.
            table = self.embed.embedding[...].astype(hidden.dtype)
            return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        kernel = self.lm_head.kernel[...].astype(hidden.dtype)
        return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)
