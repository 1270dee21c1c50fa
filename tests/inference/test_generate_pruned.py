"""Generation with every pruner: against rows that are masked instead of cut, compile counts, streaming, a mesh, and the
switch of the command lines."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.commands import run
from tests.inference import tiny
from tests.inference.test_generate import compilations
from vr_jax.data.collate import collate
from vr_jax.errors import ConfigError
from vr_jax.inference import Buckets, Chat, Generator, Sampling, load_for_inference, with_pruning
from vr_jax.model.batch import NO_CELL, BatchShape
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.sharding import make_mesh, param_shardings

NEW_TOKENS, ROWS = 4, 8
BUCKETS = Buckets(tokens=(32, 48, 80, 128, 192, 288), tiles=(4,))
PRUNINGS = {
    "fastv": {"name": "fastv", "layer": 1, "keep": 0.25},
    "pyramid_drop": {"name": "pyramid_drop", "layers": (1, 2), "ratios": (0.5, 0.1)},
    "vispruner": {"name": "vispruner", "tokens": 16},
}


def uncompressed():
    return dataclasses.replace(tiny.config(vision_remember=False), projector=MlpConfig())


@pytest.fixture(scope="module", params=PRUNINGS)
def model(request):
    return tiny.model(with_pruning(uncompressed(), PRUNINGS[request.param]))


@pytest.fixture(scope="module")
def prompts(model):
    return list(tiny.prompts(model.config).values())


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model, tiny.TOKENIZER, BUCKETS)


@pytest.fixture(scope="module")
def replies(generator, prompts):
    return generator.generate(prompts, max_new_tokens=NEW_TOKENS, rows=ROWS)


@pytest.mark.slow  # Rows that are masked instead of cut are compiled too; golden/test_pruning.py has recorded tokens.
def test_tokens_are_those_of_masked_rows(model, prompts, replies):
    """Greedy decoding without cutting any row: dropped tokens stay in the cache, and are not attended to."""
    shape = BatchShape(rows=ROWS, tokens=BUCKETS.tokens[-1], tiles=BUCKETS.max_tiles, tile_size=24)
    batch = collate([[p] for p in prompts], shape, pad_side="left").batch

    @jax.jit
    def reference(model, batch):
        hidden, cache = model(batch, model.init_cache(ROWS, shape.tokens + NEW_TOKENS))
        tokens = [jnp.argmax(model.logits(hidden[:, -1]), axis=-1)]
        for step in range(NEW_TOKENS - 1):
            hidden, cache = model.decode(tokens[-1][:, None], batch.positions[:, -1:] + 1 + step, cache)
            tokens.append(jnp.argmax(model.logits(hidden[:, 0]), axis=-1))
        return jnp.stack(tokens, axis=1)

    expected = np.asarray(reference(model, batch))[: len(prompts)]
    assert [reply.tokens for reply in replies] == [tuple(row) for row in expected.tolist()]
    assert len({reply.tokens for reply in replies}) > 1


@pytest.mark.slow  # Streaming compiles its own programs.
def test_alone_and_streamed(generator, prompts, replies):
    assert generator.generate([prompts[1]], max_new_tokens=NEW_TOKENS) == [replies[1]]
    pieces = generator.stream(prompts[1], max_new_tokens=NEW_TOKENS, chunk=2)
    assert "".join(pieces) == replies[1].text


@pytest.mark.slow  # Another bucket is compiled; test_generate.py does so without a pruner.
def test_nothing_recompiles_within_a_bucket(generator, model, prompts, replies):
    """Other numbers of tokens (and of vision tokens, but for VisPruner, which keeps as many for as many tiles), the
    same buckets of tokens, tiles and what is left in every stage."""
    vispruner = model.config.pruning.name == "vispruner"
    first, second = (1, 2) if vispruner else (2, 3)
    vision = [int(np.sum(prompts[i].vision_cell != NO_CELL)) for i in (first, second)]
    assert len(prompts[first].tokens) != len(prompts[second].tokens)
    assert vispruner or vision[0] != vision[1]
    settings = {"max_new_tokens": NEW_TOKENS, "rows": ROWS}
    generator.generate([prompts[first]], **settings)
    before = dict(generator.compilations)
    with compilations() as names:
        assert generator.generate([prompts[second]], **settings) == [replies[second]]
        assert names == []
    assert generator.compilations == before
    assert set(before.values()) == {1}
    prefills = [key for key in before if key[0] == "prefill" and key[1] == ROWS]
    assert {len(key) for key in prefills} == {5 + len(model.config.decoder_bounds) - 1}
    for _, _, tokens, _, _, *lengths in prefills:
        assert lengths[-1] < tokens
        assert ("decode", ROWS, lengths[0], 0, NEW_TOKENS, *lengths) in before


@pytest.mark.slow  # It compiles again for a mesh.
def test_eight_devices_equal_one(model, prompts, replies):
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        generator = Generator(jax.device_put(model, param_shardings(model, mesh)), tiny.TOKENIZER, BUCKETS)
        assert generator.generate(prompts, max_new_tokens=NEW_TOKENS, rows=ROWS) == replies
        with compilations() as names:
            assert generator.generate(prompts[2:], max_new_tokens=NEW_TOKENS, rows=ROWS) == replies[2:]
        assert names == []


# --- the switch


def test_with_pruning():
    config = uncompressed()
    assert with_pruning(config, None) is config
    fastv = with_pruning(config, "fastv")
    assert (fastv.pruning.name, fastv.pruning.layer, fastv.image) == ("fastv", 2, config.image)
    assert with_pruning(config, '{"name": "fastv", "layer": 1}').pruning.layer == 1
    assert config.image.unpad
    assert not with_pruning(config, PRUNINGS["vispruner"]).image.unpad


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("fast", r"known names are fastv, pyramid_drop, vispruner"),
        ("{fastv}", "no valid JSON object"),
        ('{"name": "fastv", "kept": 1}', r"pruning has no field 'kept'; did you mean 'keep'\?"),
        ('{"name": "fastv", "keep": "half"}', r"pruning.keep = 'half': expected a finite number"),
        ('{"keep": 0.5}', "pruning.name = None"),
    ],
)
def test_wrong_choices(choice, message):
    with pytest.raises(ConfigError, match=message):
        with_pruning(uncompressed(), choice)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    tiny.save(folder / "model", vision_remember=False)
    (folder / "wide.png").write_bytes(tiny.png(60, 30, 1))
    line = {"type": "human_test", "question": "What is it?", "answer": "1", "image": "wide.png"}
    (folder / "test.jsonl").write_text(json.dumps(line) + "\n")
    return folder


@pytest.mark.slow  # Two commands compile the pruned model.
def test_eval_and_chat_take_the_flag(folder, capsys):
    """Both answer as a model that was loaded with the pruner; the summary names it."""
    choice = json.dumps({"name": "fastv", "layer": 1, "keep": 0.1})
    flags = {"checkpoint": folder / "model", "benchmark": "chartqa", "data": folder, "batch_size": 1}
    assert run("eval", **flags, output=folder / "out", pruning=choice) == 0
    summary = json.loads((folder / "out" / "chartqa" / "summary.json").read_text())
    assert summary["settings"]["model"]["pruning"] == {
        **{"name": "fastv", "layer": 1, "keep": 0.1},
        "budget": "after_layer",
    }
    assert run("eval", **flags, output=folder / "none", pruning="vispruner") == 2
    assert "needs the projector 'mlp'" in capsys.readouterr().err

    loaded = load_for_inference(folder / "model", config=with_pruning(tiny.config(vision_remember=False), choice))
    talk = Chat(Generator(loaded.model, loaded.tokenizer), loaded.processor, [folder / "wide.png"])
    expected = "".join(talk.ask("What?", 4, Sampling()))
    arguments = ["--checkpoint", folder / "model", "--image", folder / "wide.png", "--max_new_tokens", "4", "What?"]
    assert run("chat", *arguments, pruning=choice) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert run("chat", *arguments, pruning="fast") == 2
    assert "known names are" in capsys.readouterr().err
