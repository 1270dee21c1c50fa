"""The comparison of systems runs at toy size through every stage, and continues where it was stopped."""

from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.accuracy import report, results
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.dataset import QUESTIONS, generate
from benchmarks.accuracy.encoder import PatchReader
from benchmarks.accuracy.results import Run
from benchmarks.accuracy.settings import SETTINGS
from benchmarks.accuracy.systems import all_rows, systems
from benchmarks.accuracy.tasks import PART, PROMPT, TOKEN
from benchmarks.accuracy.training import new_model, size_of, window_levels
from vr_jax.data.demo.pages import KINDS, NOTHING, WORD, Page, draw_image

TOY = SETTINGS["toy"]
TRAINED = ("table1/pooling_vr", "table4/token_packer")
FREE = ("table4/fastv", "table4/vispruner")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The work directory of a finished comparison of four systems.

    The tests that need it are slow, because the comparison trains the encoder, the uncompressed model and six runs.
    """
    path = tmp_path_factory.mktemp("accuracy")
    arguments = ["--setting=toy", f"--workdir={path}", "--seeds", "0", "1", "--systems", *TRAINED, *FREE]
    assert main(arguments) == 0
    return path


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_are_the_papers(name):
    found = systems(SETTINGS[name])
    declared = {(table, row) for table, row, _ in all_rows()}
    assert {table for table, _ in declared} == {"table1", "table2", "table3", "table4", "table5a", "table5b", "table5c"}
    assert set(found.rows) | set(found.refused) == declared
    # One of eight layers with all tokens is more than a ninth: FastV's second budget needs a deeper decoder.
    assert set(found.refused) == (set() if name == "h200" else {("table4", "fastv_average")})
    # The same system in two tables is trained once.
    assert found.rows["table3", "vision_remember"] == found.rows["table5c", "after_1_4"] == "table1/pooling_vr"


@pytest.mark.slow  # It draws all images of both splits.
def test_held_out_contents_never_occur_in_training():
    page = Page()
    words = {"train": set(), "held_out": set()}
    contents = {"train": set(), "held_out": set()}
    for split in ("train", "held_out"):
        for number in range(200):
            image = draw_image(KINDS[number % len(KINDS)], page, split, Random(number))
            answers = "".join(mark.answer for mark in image.marks if mark.answer != NOTHING)
            if image.kind in ("word", "text"):
                words[split] |= {answers[i : i + WORD] for i in range(0, len(answers), WORD)}
            else:
                contents[split].add(image.content)
    assert len(words["train"]) > 1000
    assert len(contents["train"]) == 120
    assert not words["train"] & words["held_out"]
    assert not contents["train"] & contents["held_out"]


@pytest.mark.parametrize("grid", [12, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_every_question_has_one_answer(kind, grid):
    """A block is asked about by name: it holds one highlighted patch if it holds an answer at all."""
    for seed in range(10):
        image = draw_image(kind, Page(grid=grid), "train", Random(seed))
        asked = [mark.block for mark in image.highlighted]
        assert len(asked) == len(set(asked)) >= QUESTIONS
        assert set(asked) == {mark.block for mark in image.marks if mark.answer != NOTHING}
        assert len({(mark.row, mark.column) for mark in image.marks}) == len(image.marks)
        assert {part for mark in image.marks for part in (mark.first, mark.second, mark.answer)} <= set(PART)
        assert {word for mark in image.highlighted for word in (kind, mark.block, mark.answer)} <= set(TOKEN)


def test_data_set_is_a_function_of_its_arguments():
    one, again, other = (generate(Page(), "train", 10, seed=seed, variants=2) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.pixels, again.pixels)
    np.testing.assert_array_equal(one.tokens, again.tokens)
    assert (one.pixels != other.pixels).any()
    for image in range(10):
        # Marks are the highlighted patches, with their block and answer; every question is about one of them.
        assert (one.highlighted[image] == (one.marks[image, :, 0] > 0)).all()
        marks = {tuple(mark) for mark in one.marks[image]}
        for row in one.tokens[image]:
            assert {tuple(question[1:]) for question in row.reshape(QUESTIONS, PROMPT + 1)} <= marks


@pytest.mark.slow  # The gradient of two programs is compiled.
def test_cached_states_give_what_pixels_give():
    """The path through cached, raster-ordered states against the whole model with the same tower."""
    config = systems(TOY).entries["table1/pooling_vr"].config
    data = generate(TOY.page, "train", 2, seed=0, variants=1)
    encoder = PatchReader(TOY, rngs=nnx.Rngs(0))
    model = new_model(config, seed=1)
    raster = dict(zip(encoder.levels, encoder.hidden_states(data.pixels), strict=True))
    levels = window_levels(config, raster, jnp.arange(2))
    encoder.vision.stride = config.projector.stride
    model.encoder = encoder.vision
    states = model.encoder(jnp.asarray(data.pixels[:, None]), config.feature_levels)
    direct = dict(zip(config.feature_levels, states, strict=True))
    assert sorted(levels) == sorted(direct)
    for level in levels:
        np.testing.assert_allclose(levels[level], direct[level], atol=2e-5)


@pytest.mark.slow  # It trains two systems.
def test_systems_start_from_the_uncompressed_models_decoder():
    """Whatever stages the decoder is cut into; and training a system leaves the shared model alone."""
    reader = new_model(size_of(TOY), seed=0)
    model = new_model(systems(TOY).entries["table5c/after_1_4_7"].config, seed=1, decoder=reader)
    assert [len(jax.tree.leaves(stage)[0]) for stage in model.decoder.stages] == [1, 1, 1, 5]
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *model.decoder.stages)
    jax.tree.map(np.testing.assert_array_equal, whole, reader.decoder.stages[0])
    for ours, theirs in zip(jax.tree.leaves(model.decoder.stages), jax.tree.leaves(reader.decoder), strict=False):
        assert ours is not theirs


@pytest.mark.slow
def test_comparison_writes_one_run_per_system_and_seed(workdir):
    runs = results.read(workdir / "runs.jsonl")
    expected = {(name, seed) for name in TRAINED for seed in (0, 1)} | {(name, 0) for name in FREE}
    assert {(run.system, run.seed) for run in runs} == expected
    by_system = {run.system: run for run in runs}
    # Training-free: not one parameter more than the uncompressed model's.
    assert by_system[FREE[0]].added == by_system[FREE[1]].added < by_system[TRAINED[1]].added
    assert all(0 <= share <= 1 for run in runs for share in (run.overall, *run.kinds.values()))
    table = (workdir / "tables.md").read_text()
    assert "Pooling + V.R." in table
    assert "not run" in table
    assert "not at this size" in table


@pytest.mark.slow
def test_finished_runs_are_not_repeated(workdir, capsys):
    before = (workdir / "runs.jsonl").read_text()
    assert main(["--setting=toy", f"--workdir={workdir}", "--seeds", "0", "1", "--systems", *TRAINED]) == 0
    assert (workdir / "runs.jsonl").read_text() == before
    assert "step" not in capsys.readouterr().out


@pytest.mark.slow
def test_another_settings_work_is_refused(workdir, capsys):
    (workdir / "setting.txt").rename(workdir / "kept.txt")
    (workdir / "setting.txt").write_text("another\n")
    try:
        assert main(["--setting=toy", f"--workdir={workdir}"]) == 1
        assert "describes another setting" in capsys.readouterr().err
    finally:
        (workdir / "kept.txt").rename(workdir / "setting.txt")


def test_unknown_system_lists_the_known_ones(tmp_path, capsys):
    assert main(["--setting=toy", f"--workdir={tmp_path}", "--systems", "table9/*"]) == 1
    assert "table1/pooling_vr" in capsys.readouterr().err


def test_broken_results_name_the_line(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"system": "x"}\n')
    with pytest.raises(ValueError, match=r"runs\.jsonl:1"):
        results.read(tmp_path / "runs.jsonl")


def test_table_gives_mean_spread_and_gain():
    def run(system, seed, overall):
        kinds = dict.fromkeys(KINDS, overall)
        return Run(system=system, seed=seed, overall=overall, kinds=kinds, parameters=2, added=1234, seconds=1)

    runs = [run("table1/pooling", s, v) for s, v in ((0, 0.5), (1, 0.6))]
    runs += [run("table1/pooling_vr", s, v) for s, v in ((0, 0.7), (1, 0.9))]
    text = report.tables(TOY, runs)
    assert "| Pooling | 55.0 ± 7.1 | +0.0 |" in text
    assert "| Pooling + V.R. | 80.0 ± 14.1 | +25.0 |" in text
    assert "| 1,234 |" in text
    assert report.gains(TOY, runs) == pytest.approx({9: 25.0})
