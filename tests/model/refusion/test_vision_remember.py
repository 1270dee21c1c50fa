"""Vision Remember changes each vision token from its own window only; its two cross-attentions are one function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.model.families import FAMILIES, family_batch, family_config, family_images, without_refusion
from tests.noise import assert_within_noise, float64_config, float64_model, in_float64
from tests.tiny import Text, example, pack, params_of, quick, randomized, with_params
from vr_jax.model.config import VlmConfig
from vr_jax.model.parameters import merge_stages, split_stages
from vr_jax.model.vlm import Refusion, VisionLanguageModel, abstract_model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def config(family: str) -> VlmConfig:
    return family_config(family)


@pytest.fixture(scope="module")
def model(config: VlmConfig) -> VisionLanguageModel:
    """A model with random values everywhere, in which no layer is an identity."""
    return randomized(abstract_model(config))


@pytest.fixture(scope="module")
def batch(family: str):
    """Two rows with several images in a sample, partial tiles, a sample of text, padding and unused tile slots."""
    return family_batch(family)


@pytest.fixture(scope="module")
def inside(model, batch):
    """The first block, decoder inputs and the context of the images."""

    @jax.jit
    def meet(model, batch):
        levels = model.encode_images(batch)
        return model.inputs(levels, batch), model.vision_context(levels, batch)

    return (model.refusion.blocks[0], *meet(model, batch))


@jax.jit
def hidden_states(model: VisionLanguageModel, batch):
    return model(batch)[0]


# --- zero initialisation


# Two whole models are compiled for each family.
@pytest.mark.parametrize("family", quick(FAMILIES, "llava"), indirect=True, scope="module")
def test_at_its_initial_values_it_is_the_baseline_bit_for_bit(config, model, batch):
    """All values are random except those that the block itself starts at zero."""
    blocks = jax.jit(lambda: Refusion(config.refusion, config.spec, rngs=nnx.Rngs(0)))()
    fresh = {f"refusion.{name}": value for name, value in params_of(blocks).items()}
    zeros = {name for name, value in fresh.items() if name.endswith("kernel") and not value.any()}
    assert zeros == {f"refusion.blocks.{i}.{last}.kernel" for i in (0, 1) for last in ("down", "self_attn.out")}
    params = params_of(model)
    for name in zeros:
        for array in (name, name.replace("kernel", "bias")):
            assert not fresh[array].any()
            params[array] = fresh[array]
    ours = hidden_states(with_params(model, params), batch)

    plain = without_refusion(config)
    kept = {name: value for name, value in params.items() if "refusion" not in name}
    baseline = with_params(abstract_model(plain), split_stages(merge_stages(kept), plain))
    np.testing.assert_array_equal(ours, hidden_states(baseline, batch))
    assert (hidden_states(model, batch) != ours).any()


# --- locality


@pytest.mark.parametrize("cross_attention", ["absorbed", "plain"])
def test_a_window_reaches_its_own_token_and_no_other(inside, batch, cross_attention: str):
    """A change of one window changes its token alone; windows of cropped and unused tiles change nothing."""
    block, inputs, vision = inside
    block = with_params(block, params_of(block))
    block.cross_attn.absorbed = cross_attention == "absorbed"
    tiles, cells = vision.features.shape[1:3]

    @jax.jit
    def perturbed(block, inputs, vision):
        def one(window):
            hit = (jnp.arange(tiles * cells) == window).reshape(tiles, cells)
            features = jnp.where(hit[None, :, :, None, None], vision.features[..., ::-1] + 1, vision.features)
            return block.cross(inputs.hidden, dataclasses.replace(vision, features=features))

        # One loop over all windows, in which -1 is none, gives equal bits for equal inputs.
        return jax.lax.map(one, jnp.arange(-1, tiles * cells))

    reference, *changed = np.asarray(perturbed(block, inputs, vision))
    for window, states in enumerate(changed):
        expected = np.asarray(batch.vision_cell) == window
        np.testing.assert_array_equal((states != reference).any(axis=-1), expected)


def test_other_states_are_untouched_exactly(inside, batch):
    block, inputs, vision = inside
    after = np.asarray(jax.jit(lambda *x: x[0](*x[1:]).hidden)(block, inputs, vision))
    changed = (after != np.asarray(inputs.hidden)).any(axis=-1)
    np.testing.assert_array_equal(changed, np.asarray(batch.vision_cell) >= 0)


def test_the_self_attention_joins_the_tiles_of_an_image_and_nothing_else(config, inside, batch):
    """By gradients, the update of a token depends on its image and on the text-guided tokens of its sample."""
    block, inputs, vision = inside
    block = with_params(block, params_of(block))

    @jax.jit
    def dependence(block, inputs, vision):
        direction = jax.random.normal(jax.random.key(0), inputs.hidden.shape)

        def update(hidden, token):
            after = block(inputs.replace(hidden=hidden), vision).hidden - hidden
            return jnp.sum((after * direction)[0, token])

        return jax.lax.map(
            lambda token: jnp.any(jax.grad(update)(inputs.hidden, token) != 0, axis=-1),
            jnp.arange(inputs.hidden.shape[1]),
        )

    found = np.asarray(dependence(block, inputs, vision))
    cell, text_token, segment = (np.asarray(x) for x in (batch.vision_cell, batch.text_token_mask, batch.segment_ids))
    tile = np.maximum(cell[0], 0) // config.cells_per_tile
    image = np.where(cell[0] >= 0, np.asarray(batch.tile_image)[0][tile], 0)
    same_image = (image[:, None] == image) & (image > 0)
    same_sample = (image[:, None] > 0) & (segment[0][:, None] == segment[0])
    assert not found[:, 1].any()  # the other row
    np.testing.assert_array_equal(found[:, 0] & ~text_token[0], same_image)
    # Channel-wise maximum: each text-guided token may win some channels; never one of another sample.
    assert not (found[:, 0] & text_token[0] & ~same_sample).any()
    for token in np.flatnonzero(image):
        assert (found[token, 0] & text_token[0]).any() == (text_token[0] & same_sample[token]).any()


def test_the_text_guided_token_is_not_searched_anew_for_each_tile_slot(inside):
    """A row has hundreds of slots where tiles are small windows, and each may be an image of its own."""
    block, inputs, vision = inside
    rows, tokens, width = inputs.hidden.shape
    slots = 200
    used, unused = vision.tile_image.shape[1], ((0, 0), (0, slots - vision.tile_image.shape[1]))
    many = dataclasses.replace(
        vision,
        patch=None,
        valid=None,
        **{name: jnp.pad(getattr(vision, name), unused) for name in ("tile_image", "tile_segment")},
    )

    def search(block, hidden, vision):
        return block._text_token(hidden, vision)  # noqa: SLF001  # only this part is measured

    program = jax.make_jaxpr(search)(block, inputs.hidden, many).jaxpr
    largest = max(out.aval.size for equation in equations(program) for out in equation.outvars)
    assert rows * slots * width <= largest < rows * slots * tokens * width / 4
    few = search(block, inputs.hidden, vision)
    for found, expected in zip(search(block, inputs.hidden, many), few, strict=True):
        np.testing.assert_array_equal(found[:, :used], expected)


def equations(jaxpr):
    """Every equation of a program and of the programs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        params = list(equation.params.values())
        for value in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# --- absorbed equals plain


# The gradient of the block is compiled three times.
@pytest.mark.parametrize("family", quick(FAMILIES, "llava"), indirect=True, scope="module")
def test_absorbed_equals_plain(config, inside):
    """Values agree, and so do the gradients with respect to every parameter and the states.

    The two forms round differently, so each is compared with the plain form in float64. The block itself changes the
    values by more than a thousand times the bound.
    """
    block, inputs, vision = inside
    direction = np.random.default_rng(0).normal(size=inputs.hidden.shape)

    def run(block, inputs, vision, cross_attention: str):
        variant = with_params(block, params_of(block))
        variant.cross_attn.absorbed = cross_attention == "absorbed"

        def loss(variant, hidden):
            after = variant(inputs.replace(hidden=hidden), vision).hidden
            return jnp.mean(after * direction.astype(hidden.dtype)), after

        (_, after), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variant, inputs.hidden)
        return {"after": np.asarray(after), "hidden": np.asarray(gradients[1])} | params_of(gradients[0])

    absorbed, plain = run(block, inputs, vision, "absorbed"), run(block, inputs, vision, "plain")
    with float64_model():
        wide = with_params(abstract_model(float64_config(config)).refusion.blocks[0], params_of(block))
        exact = run(wide, *in_float64((inputs, vision)), "plain")
        assert exact["after"].dtype == np.float64
    assert np.abs(absorbed["after"] - inputs.hidden).max() > 0.05
    assert absorbed.keys() == plain.keys()
    assert_within_noise(absorbed, exact, plain)
    for name, gradient in exact.items():
        # Keys are invariant to a shift, so their biases have no gradient.
        assert np.abs(gradient).max() > 1e-6 or name.endswith(".k.bias"), name


@pytest.mark.slow  # The gradient of the whole model is compiled; test_step.py trains a frozen encoder.
def test_the_encoder_gets_no_gradient_through_the_block(model, batch):
    """A projector of zeros lets no gradient through, so the block would be the only way."""
    silent = {f"projector.{name}": np.zeros_like(value) for name, value in params_of(model.projector).items()}
    closed = with_params(model, params_of(model) | silent)
    gradient = jax.jit(jax.grad(lambda model, batch: jnp.sum(model(batch)[0] ** 2)))
    for candidate, reached in ((model, True), (closed, False)):
        gradients = params_of(gradient(candidate, batch).encoder)
        assert gradients["stages.0.attn.q.kernel"].any() == reached


# --- cache


@pytest.mark.slow  # inference/test_generate.py compares the same with shorter prompts.
@pytest.mark.parametrize("refusion", [True, False], ids=["vision_remember", "baseline"])
def test_prefill_and_decode_equal_recomputation(family: str, refusion: bool):
    """Prompts of different lengths and numbers of images are decoded for five tokens, one at a time."""
    config = family_config(family) if refusion else without_refusion(family_config(family))
    large, small, middle = family_images(family)
    model = randomized(abstract_model(config), seed=1)
    prompts = [
        (Text(3), large, Text(4, text_token=True)),
        (Text(6, text_token=True),),
        (Text(2), small, Text(1), middle, Text(3, text_token=True)),
    ]
    steps = 5
    rows = [[example(config, *parts, Text(steps), seed=i)] for i, parts in enumerate(prompts)]
    whole = pack(config, rows, tokens=75, pad_side="left")
    expected = np.asarray(hidden_states(model, whole))[:, -steps:]

    length = 75 - steps
    # The same samples without their last tokens, again right-aligned: the prefix of every row.
    prompt = jax.tree.map(lambda x: x[:, :length] if x.shape[1] == 75 else x, whole)
    assert whole.tile_image.shape[1] != 75

    @jax.jit
    def prefill(model, batch):
        return model(batch, cache=model.init_cache(3, length + steps))

    decode = jax.jit(lambda model, *x: model.decode(*x))
    states, cache = prefill(model, prompt)
    np.testing.assert_allclose(states, np.asarray(hidden_states(model, whole))[:, :length], atol=1e-5, rtol=1e-5)
    for step in range(steps):
        at = slice(length + step, length + step + 1)
        states, cache = decode(model, whole.tokens[:, at], whole.positions[:, at], cache)
        np.testing.assert_allclose(states[:, 0], expected[:, step], atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # The whole model is compiled again.
def test_shared_weights_are_one_block_used_twice(config, model, batch):
    config = dataclasses.replace(config, refusion=dataclasses.replace(config.refusion, shared_weights=True))
    params = params_of(model)
    shared = {name: value for name, value in params.items() if "refusion.blocks.1" not in name}
    twice = {name: params[name.replace("refusion.blocks.1", "refusion.blocks.0")] for name in params}
    np.testing.assert_array_equal(
        hidden_states(with_params(abstract_model(config), shared), batch),
        hidden_states(with_params(model, twice), batch),
    )
