"""Training of each family by the real loop, on the demo's images from files to packed rows.

Frozen parts, continuing after a kill, one device and eight, and the model directory that a run exports.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.family_runs import FAMILIES, run_config, save_family, small_config
from tests.training.tiny import series
from vr_jax.data.demo.source import DemoSource
from vr_jax.data.types import Conversation
from vr_jax.inference import Buckets, Generator, load_for_inference, user_turn
from vr_jax.model_directory import load_model, read_config
from vr_jax.sharding import path_of
from vr_jax.training import inputs, loop, program
from vr_jax.training.checkpoint import Checkpoints

# Two updates of each family are compiled, for one device and for eight, and a prompt.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]
STEPS, EVERY = 64, 8


class Killed(BaseException):
    """Not an Exception, so nothing may handle it: the nearest thing to a kill within one process."""


def arrays(directory) -> dict[str, np.ndarray]:
    """Every parameter of a model directory by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(load_model(directory))
    return {path_of(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def start(family, tmp_path_factory):
    """A model directory of initial parameters."""
    return save_family(tmp_path_factory.mktemp("start") / "model", small_config(family))


@pytest.fixture(scope="module")
def config(family, start):
    return run_config(family, init_from=str(start), steps=STEPS, **{"checkpoint.every": EVERY})


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """An uninterrupted run on eight devices."""
    workdir = tmp_path_factory.mktemp("whole")
    loop.train(config, workdir)
    return workdir


def test_the_loss_falls_and_frozen_parts_stay(family, start, whole):
    losses = [loss for _, loss, *_ in series(whole)]
    assert losses[0] == pytest.approx(np.log(read_config(start).decoder.vocab_size), rel=0.15)
    assert np.mean(losses[-3:]) < 0.2 * losses[0]
    before, after = arrays(start), arrays(whole / "model")
    assert before.keys() == after.keys()
    assert read_config(whole / "model") == small_config(family)
    changed = {path for path in before if (before[path] != after[path]).any()}
    assert not [path for path in changed if path.startswith("encoder.")]
    still = {path for path in before if not path.startswith("encoder.")} - changed
    # A bias of keys shifts all keys alike, which the softmax ignores. LLaVA alone has newlines.
    newline = set() if family == "llava" else {"image_newline"}
    assert {path for path in still if not path.endswith("attn.k.bias")} == newline


def test_a_run_that_is_killed_continues_bit_for_bit(config, whole, tmp_path):
    def open_inputs(*arguments):
        opened = inputs.open_inputs(*arguments)

        class Killing:
            """The data, whose third batch after the first checkpoint kills the run."""

            count = 0

            def __getattr__(self, name):
                return getattr(opened.iterator, name)

            def __next__(self):
                self.count += 1
                if self.count == EVERY + 3:
                    raise Killed
                return next(opened.iterator)

        return dataclasses.replace(opened, iterator=Killing())

    with pytest.raises(Killed):
        loop.train(config, tmp_path, open_inputs=open_inputs)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [EVERY]
    loop.train(config, tmp_path)
    assert series(tmp_path) == series(whole)
    expected, found = arrays(whole / "model"), arrays(tmp_path / "model")
    assert expected.keys() == found.keys()
    for path, one in expected.items():
        np.testing.assert_array_equal(found[path], one, err_msg=path)


def test_eight_devices_equal_one(config, whole, tmp_path, monkeypatch):
    choose = program.choose_mesh
    first = {"devices": jax.devices()[:1]}
    monkeypatch.setattr(program, "choose_mesh", lambda **options: choose(**{**options, **first}))
    loop.train(config.replace({"steps": 4}), tmp_path)
    one, eight = (np.asarray([numbers[1:3] for numbers in series(run)]) for run in (tmp_path, whole))
    # The loss and the norm of the gradient, of sums in another order; the rate of learning is the same from the start.
    np.testing.assert_allclose(one, eight[:4], rtol=2e-5)


def test_the_exported_model_answers_what_it_has_learned(whole):
    """The answers to the questions that it was trained on are right, and end where a reply of the format ends."""
    loaded = load_for_inference(whole / "model")
    source = DemoSource("train", 3)
    samples = [source.sample(index) for index in range(3)]
    separators = loaded.processor.encoder.separators
    asked = [Conversation(one.id, (user_turn(one.questions[0].text, 1, separators),), (one.png,)) for one in samples]
    prompts = [loaded.processor.prompt(one) for one in asked]
    generator = Generator(loaded.model, loaded.tokenizer, Buckets.of(loaded.model.config), settings=loaded.generation)
    replies = generator.generate(prompts, max_new_tokens=6)
    assert [reply.text.strip() for reply in replies] == [one.questions[0].answer for one in samples]
    assert {reply.finish for reply in replies} == {"stop"}
