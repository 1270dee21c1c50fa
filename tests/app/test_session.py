"""Conversations with one or two models: answers, numbers, mistakes and heat maps, without a page."""

from __future__ import annotations

import contextlib
import itertools
import logging

import jax
import numpy as np
import pytest

from tests.app.made_up import Echo, loader, settings
from tests.inference import tiny
from vr_jax.app import Answer, ModelThread, Session, Stats, Upload, Variant, session
from vr_jax.inference import Chat, Generator, Sampling, load_for_inference
from vr_jax.sharding import make_mesh

IMAGE = Upload("a.png", tiny.png(48, 24))


@pytest.fixture
def talk():
    """Begins a conversation with some generators."""
    with contextlib.ExitStack() as stack:

        def talk(*generators):
            thread = ModelThread([loader(one) for one in generators])
            stack.callback(thread.close)
            return Session(thread)

        yield talk


def last(answers) -> dict[int, Answer]:
    """The last answer of each model."""
    return dict(list(answers))


def test_an_answer_grows_and_ends_with_its_numbers(talk):
    one = talk(Echo(tiny.config()))
    found = [answer for _, answer in one.ask("Which?", [IMAGE], settings())]
    texts = [answer.text for answer in found]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == "3 tiles, 51 tokens, t = 0.0"
    assert [answer.done for answer in found] == [False] * (len(found) - 1) + [True]
    assert {answer.note for answer in found[:2]} == {session.WAITING, session.READING}
    stats = found[-1].stats
    assert stats == Stats(51, 30, 9, stats.first_token, stats.rest, compiled=True, finish="stop")
    assert stats.first_token > 0
    assert stats.per_second == pytest.approx(8 / stats.rest)
    again = last(one.ask("And now?", [], settings(sampling=Sampling(0.5), max_new_tokens=9)))[0]
    assert again.text.endswith("t = 0.5")
    assert again.text.startswith("3 tiles"), "the image of the first question belongs to the conversation"
    assert (again.stats.compiled, again.stats.finish) == (False, "length")
    assert [turn.role for turn in one.chats[0].turns] == ["user", "assistant"] * 2


def test_the_numbers_are_one_line():
    line = Stats(1234, 1200, 5, 0.5, 2.0, compiled=True, finish="length").line()
    assert line == (
        "prompt 1,234 tokens, 1,200 of them vision \u00b7 first token after 0.50 s \u00b7 5 tokens at 2.0 tokens/s "
        "\u00b7 cut at the longest answer \u00b7 times include compiling"
    )
    assert Stats(10, 0, 1, 0.5).line().endswith("\u00b7 1 token")
    assert Stats(10, 0, 1, 0.5).per_second is None


def test_two_models_answer_one_after_another_and_see_their_own_answers(talk):
    one = talk(Echo(tiny.config()), Echo(tiny.config(vision_remember=False)))
    numbers = [number for number, _ in one.ask("Which?", [IMAGE], settings(2))]
    assert numbers == sorted(numbers)
    assert set(numbers) == {0, 1}
    assert all(chat.images == (IMAGE.data,) for chat in one.chats)
    assert one.chats[0].turns == one.chats[1].turns


def test_a_model_that_fails_leaves_its_conversation_and_the_other_answers(talk, caplog):
    """A fault of the program is logged with its traceback and is one line on the page."""

    def fail(number):
        if number == 1 and faulty:
            raise ZeroDivisionError("secret of the server")

    faulty = True
    one = talk(Echo(tiny.config(), fail), Echo(tiny.config()))
    with caplog.at_level(logging.ERROR, "vr_jax.app"):
        found = last(one.ask("Which?", [IMAGE], settings(2)))
    assert (found[0].problem, found[0].done) == (session.FAULT, True)
    assert "ZeroDivisionError" in caplog.text
    assert found[1].text.startswith("3 tiles")
    assert one.chats[0] is None
    faulty = False
    assert last(one.ask("Which?", [IMAGE], settings(2)))[0].text.startswith("3 tiles")
    assert len(one.chats[0].turns) == 2
    assert len(one.chats[1].turns) == 4
    faulty = True
    list(one.ask("More?", [IMAGE], settings(2)))
    assert len(one.chats[0].turns) == 2
    faulty = False
    assert last(one.ask("More?", [], settings(2)))[0].text.startswith("3 tiles"), "the image of a failure is forgotten"


def test_what_a_user_can_mend_is_one_line(talk, caplog):
    found = last(talk(Echo(tiny.config())).ask("Which?", [Upload("a", b"no image")], settings()))[0]
    assert "has none of the formats" in found.problem
    assert "\n" not in found.problem
    assert caplog.text == ""


def test_an_answer_that_is_stopped_does_not_join_the_conversation(talk):
    one = talk(Echo(tiny.config()))
    last(one.ask("Which?", [IMAGE], settings()))
    answers = one.ask("More?", [IMAGE], settings())
    while not next(answers)[1].text:
        pass
    answers.close()
    assert last(one.ask("And?", [], settings()))[0].text.startswith("3 tiles")
    assert [turn.text.split("\n")[-1] for turn in one.chats[0].turns[::2]] == ["Which?", "And?"]


def test_why_there_are_no_maps(talk):
    maps = settings(maps=True)
    one = talk(Echo(tiny.config(vision_remember=False)))
    assert last(one.ask("Hi", [], settings()))[0].note == ""
    assert last(one.ask("Hi", [], maps))[0].note == "no heat maps: the conversation has no image"
    note = last(one.ask("Hi", [IMAGE], maps))[0].note
    assert note.startswith("no heat maps: only Vision Remember re-reads windows; this model has no re-fusion block")


def test_the_settings_choose_the_variant(talk):
    loads = []
    thread = ModelThread([loader(Echo(tiny.config()), loads)])
    half = Variant(dtype="bfloat16")
    one = Session(thread)
    for variant in (Variant(), half):
        last(one.ask("Hi", [], settings(variants=(variant,))))
    assert loads == [Variant(), half]
    assert len(one.chats[0].turns) == 4, "the conversation goes on with the model that is loaded in another way"
    thread.close()


@pytest.mark.slow  # It compiles a prefill, a decode loop and a pass for the maps, on one device and on two.
def test_a_real_model_answers_as_in_chat_and_its_maps_are_the_same_on_two_devices(tmp_path):
    folder = tiny.save(tmp_path / "model")

    def load_on(mesh):
        @contextlib.contextmanager
        def load(variant):
            with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
                loaded = load_for_inference(folder, mesh)
                yield Generator(loaded.model, loaded.tokenizer, tiny.BUCKETS), loaded.processor

        return load

    thread = ModelThread([load_on(None), load_on(make_mesh(1, -1, 2, devices=jax.devices()[:2]))])
    found = last(Session(thread).ask("Which?", [IMAGE], settings(2, maps=True)))
    thread.close()
    loaded = load_for_inference(folder)
    chat = Chat(Generator(loaded.model, loaded.tokenizer, tiny.BUCKETS), loaded.processor, [IMAGE.data])
    assert found[0].text == "".join(chat.ask("Which?", 8, Sampling()))
    assert found[0].problem == found[1].problem == ""
    (one,), (two,) = found[0].figures, found[1].figures
    assert one.windows == two.windows
    assert len(one.windows) == 18  # two tiles of 3 x 3 cells, which the image fills
    np.testing.assert_allclose(one.insertions[0].updates, two.insertions[0].updates, rtol=1e-4)
    np.testing.assert_allclose(one.insertions[0].largest, two.insertions[0].largest, rtol=1e-4)
