"""Generation against recomputation without a cache, alone against batched, one device against eight."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.prompts.small_tokenizers import sentencepiece
from tests.inference import tiny
from tests.tiny import quick
from vr_jax.data.collate import collate
from vr_jax.errors import UserError
from vr_jax.inference import Buckets, Generator, PromptTooLong, Sampling
from vr_jax.model.batch import NO_CELL, BatchShape
from vr_jax.model_directory import GenerationSettings
from vr_jax.sharding import make_mesh, param_shardings

NEW_TOKENS = 6
ROWS = 8  # three of them empty
SHAPE = BatchShape(rows=ROWS, tokens=tiny.BUCKETS.max_tokens, tiles=tiny.BUCKETS.max_tiles, tile_size=24)


@pytest.fixture(scope="module")
def config():
    return tiny.config()


@pytest.fixture(scope="module")
def model(config):
    return tiny.model(config)


@pytest.fixture(scope="module")
def prompts(config):
    return list(tiny.prompts(config).values())


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model, tiny.TOKENIZER, tiny.BUCKETS)


@pytest.fixture(scope="module")
def replies(generator, prompts):
    return generator.generate(prompts, max_new_tokens=NEW_TOKENS, rows=ROWS)


@contextlib.contextmanager
def compilations():
    """Names of everything XLA compiles meanwhile."""
    names: list[str] = []

    def listen(event: str, _seconds: float, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(details))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def extended(prompt, tokens):
    """The prompt with generated tokens appended, as one longer prompt."""

    def more(array, value):
        return np.append(array, np.full(len(tokens), value, array.dtype))

    return dataclasses.replace(
        prompt,
        tokens=np.append(prompt.tokens, np.asarray(tokens, np.int32)),
        loss_mask=more(prompt.loss_mask, False),
        text_token_mask=more(prompt.text_token_mask, False),
        vision_cell=more(prompt.vision_cell, NO_CELL),
    )


@jax.jit
def logits_without_cache(model, batch):
    return model.logits(model(batch)[0])


@pytest.mark.parametrize("vision_remember", quick([True, False], True), ids=["vision_remember", "plain"])
def test_prefill_and_decode_equal_recomputation(vision_remember, model):
    """Logits of every step, all prompts in one batch, to 1e-5 of what the model gives without a cache."""
    if not vision_remember:
        model = tiny.model(tiny.config(vision_remember=False))
    prompts = list(tiny.prompts(model.config).values())
    steps = 4
    answers = np.random.default_rng(0).integers(0, 256, (ROWS, steps))
    batch = collate([[p] for p in prompts], SHAPE, pad_side="left").batch

    @jax.jit
    def prefill(model, batch):
        hidden, cache = model(batch, cache=model.init_cache(ROWS, SHAPE.tokens + steps))
        return model.logits(hidden[:, -1]), cache

    @jax.jit
    def decode(model, tokens, positions, cache):
        hidden, cache = model.decode(tokens, positions, cache)
        return model.logits(hidden[:, 0]), cache

    logits, cache = prefill(model, batch)
    found = [logits]
    for i in range(steps):
        logits, cache = decode(model, answers[:, i : i + 1], batch.positions[:, -1:] + 1 + i, cache)
        found.append(logits)

    whole = [[extended(p, a)] for p, a in zip(prompts, answers, strict=False)]
    expected = logits_without_cache(model, collate(whole, SHAPE, pad_side="left").batch)[:, -steps - 1 :]
    rows = slice(0, len(prompts))
    assert float(jnp.std(expected[rows])) > 0.1
    np.testing.assert_allclose(np.stack(found, axis=1)[rows], expected[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # Recomputation is compiled for every length.
def test_greedy_tokens_are_the_argmax_of_recomputation(model, prompts, replies):
    rows = [[extended(p, r.tokens)] for p, r in zip(prompts, replies, strict=True)]
    logits = logits_without_cache(model, collate(rows, SHAPE, pad_side="left").batch)
    for row, reply in zip(logits, replies, strict=False):
        assert len(reply.tokens) == NEW_TOKENS
        assert reply.finish == "length"
        assert tuple(np.argmax(row[-NEW_TOKENS - 1 : -1], axis=-1)) == reply.tokens
    assert len({reply.tokens for reply in replies}) == len(replies), "the prompts should be told apart"


@pytest.mark.slow  # Five prompts are compiled alone.
def test_alone_and_batched_are_equal(generator, prompts, replies):
    """Other rows, the padding of a larger bucket and empty rows change nothing."""
    assert generator.generate([prompts[1]], max_new_tokens=NEW_TOKENS) == [replies[1]]
    for prompt, reply in zip(prompts[1:], replies[1:], strict=True):
        assert generator.generate([prompt], max_new_tokens=NEW_TOKENS, rows=ROWS) == [reply]
    assert generator.generate(prompts[::-1], max_new_tokens=NEW_TOKENS, rows=ROWS) == replies[::-1]


def test_nothing_recompiles_within_a_bucket(generator, config):
    prompts = tiny.prompts(config)
    sizes = {name: generator.buckets.fit(len(p.tokens), len(p.tile_pixels)) for name, p in prompts.items()}
    assert sizes == {"text": (48, 4), "wide": (48, 4), "square": (48, 4), "two": (48, 4), "turns": (112, 4)}
    settings = {"max_new_tokens": NEW_TOKENS, "rows": ROWS}
    generator.generate([prompts["wide"], prompts["text"]], **settings)
    generator.generate([prompts["turns"]], **settings)
    generator.generate([prompts["wide"]], **settings, sampling=Sampling(1.3))
    before = dict(generator.compilations)
    with compilations() as names:
        generator.generate([prompts["two"]], **settings)
        generator.generate([prompts["text"]] * ROWS, **settings, sampling=Sampling(0.7, 0.9, seed=3))
        generator.generate([prompts["square"], prompts["turns"]], **settings)
        assert names == []
        jax.jit(lambda x: x - 41)(np.ones(3))
        assert len(names) == 1, "the listener hears nothing"
    assert generator.compilations == before
    assert set(before.values()) == {1}
    assert ("prefill", ROWS, 48, 4, NEW_TOKENS) in before
    assert ("decode", ROWS, 112, 0, NEW_TOKENS) in before


def test_cache_is_donated(generator, prompts):
    state = generator.prefill(generator.batch({0: prompts[1]}, 1), NEW_TOKENS)
    after = generator.decode(state, 2)
    before, now = ([leaf for stage in s.cache for leaf in (*stage.keys, *stage.values)] for s in (state, after))
    assert len(before) == 2 * generator.model.config.decoder.num_layers
    assert all(leaf.is_deleted() for leaf in before)
    assert not any(leaf.is_deleted() for leaf in now)


@pytest.fixture(scope="module")
def stopping(model, replies):
    """A generator whose stop token is one that the second prompt produces, and the tokens before it."""
    tokens = replies[1].tokens
    at = next(i for i in range(1, NEW_TOKENS) if tokens[i] not in tokens[:i])
    ends = {"<|im_end|>": tokens[at], "<|endoftext|>": tiny.TOKENIZER.pad_token_id}
    tokenizer = types.SimpleNamespace(get_vocab=lambda: ends, decode=tiny.TOKENIZER.decode)
    generator = Generator(model, tokenizer, Buckets(tokens=(SHAPE.tokens,), tiles=(SHAPE.tiles,)))
    return generator, tokens[at]


def test_rows_stop_at_their_stop_token_only(stopping, prompts, replies):
    generator, stop = stopping
    found = generator.generate(prompts, max_new_tokens=NEW_TOKENS, rows=ROWS)
    assert found[1].finish == "stop"
    for reply, unstopped in zip(found, replies, strict=True):
        tokens = list(unstopped.tokens)
        assert list(reply.tokens) == (tokens[: tokens.index(stop)] if stop in tokens else tokens)
        assert reply.finish == ("stop" if stop in tokens else "length")


def test_decoding_ends_when_all_rows_have_stopped(stopping, prompts):
    generator, _ = stopping
    reply = generator.generate([prompts[1]], max_new_tokens=NEW_TOKENS, rows=ROWS)[0]
    state = generator.prefill(generator.batch({0: prompts[1]}, ROWS), NEW_TOKENS)
    state = generator.decode(state, NEW_TOKENS)
    assert int(state.step) == len(reply.tokens) + 1 < NEW_TOKENS


def test_programs_are_those_that_run(model, prompts):
    """Compiled ahead of time, with the bytes that stay on the device meanwhile; running them compiles nothing."""
    generator = Generator(model, tiny.TOKENIZER, tiny.BUCKETS)
    batch = generator.batch({0: prompts[1]}, 1)
    programs = generator.programs(batch, NEW_TOKENS)
    before = dict(generator.compilations)
    with compilations() as names:
        state = generator.prefill(batch, NEW_TOKENS)
        arrays = [leaf for leaf in jax.tree.leaves(state) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
        state_bytes = sum(leaf.nbytes for leaf in arrays)
        generator.decode(state, NEW_TOKENS)
    assert names == []
    assert generator.compilations == before
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    scalar, key = 4, 8
    batch_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(batch.batch)) + batch.numbers.nbytes
    assert programs["prefill"].argument_bytes == parameters + batch_bytes + scalar
    assert programs["decode"].argument_bytes == parameters + state_bytes + key + scalar


@pytest.mark.slow  # Another number of new tokens is another program.
def test_ignoring_the_stop_token(stopping, model, prompts, replies):
    _, stop = stopping
    ends = {"<|im_end|>": stop, "<|endoftext|>": stopping[0].pad_id}
    tokenizer = types.SimpleNamespace(get_vocab=lambda: ends, decode=tiny.TOKENIZER.decode)
    for ignore_stop, finish in ((False, "stop"), (True, "length")):
        generator = Generator(model, tokenizer, tiny.BUCKETS, ignore_stop=ignore_stop)
        reply = generator.generate([prompts[1]], max_new_tokens=NEW_TOKENS)[0]
        assert reply.finish == finish
    assert reply == replies[1]


def test_real_stop_tokens(generator):
    names = tiny.TOKENIZER.convert_ids_to_tokens(generator.stop_ids)
    assert names == ["<|im_end|>", "<|endoftext|>"]


def test_the_chat_format_says_what_ends_a_reply(model):
    """The ids of generation_config.json come first, then the format's ends, then those of ChatML."""
    with_ends = sentencepiece("first", specials=("<|im_end|>",))
    id_of = with_ends.convert_tokens_to_ids

    def stops(template, tokenizer, settings=None):
        own = dataclasses.replace(model.config, template=template)
        stand_in = types.SimpleNamespace(config=own)
        return Generator(stand_in, tokenizer, tiny.BUCKETS, settings=settings).stop_ids

    assert stops("vicuna_v1", with_ends) == (id_of("</s>"),)
    assert stops("qwen_1_5", with_ends) == (id_of("<|im_end|>"),)
    assert stops("llama_3", with_ends) == (id_of("<|im_end|>"),)  # It lacks the format's own ends.
    assert stops("vicuna_v1", with_ends, GenerationSettings(eos_token_ids=(5,))) == (5,)
    with_ends.chat_template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert stops("tokenizer", with_ends) == (id_of("<|im_end|>"), id_of("</s>"))


@pytest.mark.slow  # It compiles sampling for two batch sizes; test_sampling.py tests the draws.
def test_sampling_depends_on_seed_and_row_alone(generator, prompts):
    def drawn(prompts, seed, **settings):
        sampling = Sampling(temperature=1.5, seed=seed, **settings)
        return generator.generate_rows(prompts, max_new_tokens=NEW_TOKENS, rows=ROWS, sampling=sampling)

    everything = drawn(dict(enumerate(prompts)), seed=1)
    assert drawn({3: prompts[3], 1: prompts[1]}, seed=1) == {3: everything[3], 1: everything[1]}
    assert drawn(dict(enumerate(prompts)), seed=2) != everything
    assert drawn(dict(enumerate(prompts)), seed=1, top_p=1e-6) == dict(
        enumerate(generator.generate(prompts, max_new_tokens=NEW_TOKENS, rows=ROWS))
    )


@pytest.mark.parametrize("chunk", quick([1, 3, 100]))
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, 0.95, seed=5)], ids=["greedy", "sampled"])
def test_streaming_gives_the_same_text(generator, prompts, chunk, sampling):
    whole = generator.generate([prompts[1]], max_new_tokens=NEW_TOKENS, sampling=sampling)[0]
    pieces = list(generator.stream(prompts[1], max_new_tokens=NEW_TOKENS, sampling=sampling, chunk=chunk))
    assert "".join(pieces) == whole.text
    assert "" not in pieces


@pytest.mark.slow  # Streaming is compiled for another length.
def test_streaming_stops(stopping, prompts):
    generator, _ = stopping
    whole = generator.generate([prompts[1]], max_new_tokens=NEW_TOKENS)[0]
    assert whole.finish == "stop"
    assert "".join(generator.stream(prompts[1], max_new_tokens=NEW_TOKENS, chunk=2)) == whole.text


@pytest.mark.slow  # It compiles again for a mesh; training/test_step.py does so too.
@pytest.mark.parametrize("sizes", quick([(1, 8, 1), (2, 2, 2)], (2, 2, 2)), ids=["fsdp8", "replica2_fsdp2_tensor2"])
def test_eight_devices_equal_one(model, prompts, replies, sizes):
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(model, param_shardings(model, mesh))
        generator = Generator(sharded, tiny.TOKENIZER, tiny.BUCKETS)
        assert generator.generate(prompts, max_new_tokens=NEW_TOKENS, rows=ROWS) == replies
        state = generator.prefill(generator.batch(dict(enumerate(prompts)), ROWS), NEW_TOKENS)
        keys = state.cache[0].keys
        assert keys.sharding.shard_shape(keys.shape)[1] == ROWS // (sizes[0] * sizes[1]), "rows are not sharded"
        with compilations() as names:
            assert generator.generate(prompts[2:], max_new_tokens=NEW_TOKENS, rows=ROWS) == replies[2:]
        assert names == []


@pytest.mark.slow  # It compiles again for another mesh.
def test_one_prompt_on_a_mesh_for_many(model, prompts, replies):
    mesh = make_mesh(1, 4, 2)
    with jax.set_mesh(mesh):
        generator = Generator(jax.device_put(model, param_shardings(model, mesh)), tiny.TOKENIZER, tiny.BUCKETS)
        assert "".join(generator.stream(prompts[1], max_new_tokens=NEW_TOKENS, chunk=2)) == replies[1].text


def test_errors(model, prompts):
    generator = Generator(model, tiny.TOKENIZER, Buckets(tokens=(32,), tiles=(1,)))
    longest = max(prompts, key=lambda p: len(p.tokens))
    with pytest.raises(PromptTooLong, match=r"a prompt of \d+ tokens, the largest bucket holds 32"):
        generator.generate([longest], max_new_tokens=2)
    with pytest.raises(UserError, match="max_new_tokens = 0"):
        generator.generate([prompts[0]], max_new_tokens=0)
    with pytest.raises(UserError, match="2 prompts for 1 rows"):
        generator.generate(prompts[:2], max_new_tokens=1, rows=1)
    with pytest.raises(UserError, match="chunk = 0"):
        next(generator.stream(prompts[0], max_new_tokens=1, chunk=0))
    with pytest.raises(UserError, match="strictly increasing"):
        Buckets(tokens=(64, 32))


def test_a_tokenizer_without_stop_token_is_refused(model):
    class NoStop:
        get_vocab = functools.partial(dict, a=0)

    with pytest.raises(UserError, match="none of the stop tokens"):
        Generator(model, NoStop())
