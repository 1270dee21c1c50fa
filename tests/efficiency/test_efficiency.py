"""Efficiency of tiny models: what the files say, scores, mistakes. Never how long anything took."""

from __future__ import annotations

import dataclasses
import json
import statistics
import xml.etree.ElementTree as ElementTree

import jax
import numpy as np
import pytest
from flax import nnx

from tests.efficiency import tiny_systems
from tests.inference import tiny
from tests.tiny import params_of
from vr_jax.cli import efficiency as command
from vr_jax.cli.flags import parse
from vr_jax.cli.main import main
from vr_jax.efficiency.measure import load, measure, random_model
from vr_jax.efficiency.plot import draw
from vr_jax.efficiency.report import JSON, MARKDOWN, PLOT
from vr_jax.efficiency.results import EfficiencySettings
from vr_jax.efficiency.scores import parse_scores
from vr_jax.efficiency.systems import Source, System, image_size, is_vision, prompt, systems
from vr_jax.errors import UserError
from vr_jax.evaluation.benchmarks import BENCHMARKS, PAPER
from vr_jax.evaluation.overall import overall_summary
from vr_jax.inference import Buckets, Generator
from vr_jax.model.config import VlmConfig, anyres4, anyres9, single_tile
from vr_jax.model.vlm import VisionLanguageModel

REPEATS, NEW_TOKENS, ROWS = 3, 4, 2
FLAGS = [f"--repeats={REPEATS}", "--warmup=1", f"--new_tokens={NEW_TOKENS}", f"--batch_size={ROWS}", "--text_tokens=40"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return tiny_systems.write(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def run(config_file, tmp_path_factory):
    """Folder and report of one run over three systems with scores."""
    output = tmp_path_factory.mktemp("run") / "efficiency"
    sources = [f"--config={config_file}:{name}" for name in ("baseline", "uncompressed", "fastv")]
    scores = ["--score=fastv=40", "--score=baseline=42.9", "--score=uncompressed=45"]
    flags = parse(command.EfficiencyFlags, [*sources, *FLAGS, *scores, f"--output={output}"])
    return output, command.compare(flags)


@pytest.fixture(scope="module")
def found(run):
    content = json.loads((run[0] / JSON).read_text())
    return content, {system["name"]: system for system in content["systems"]}


def test_numbers_are_those_of_the_repeats(found):
    content, by_name = found
    assert list(by_name) == ["baseline", "uncompressed", "fastv"]
    for field in ("time_to_first_token_ms", "tokens_per_second"):
        base = statistics.median(by_name["baseline"][field]["repeats"])
        for system in by_name.values():
            numbers = system[field]
            assert len(numbers["repeats"]) == REPEATS
            assert min(numbers["repeats"]) == numbers["lowest"] > 0
            assert max(numbers["repeats"]) == numbers["highest"]
            assert numbers["median"] == sorted(numbers["repeats"])[REPEATS // 2]
            assert numbers["ratio"] == pytest.approx(numbers["median"] / base)
    assert by_name["baseline"]["time_to_first_token_ms"]["ratio"] == 1
    assert content["settings"]["repeats"] == REPEATS
    assert content["settings"]["dtype"] == "float32", "the default on CPUs"
    assert content["machine"]["jax"] == jax.__version__


def test_prompts_are_those_of_anyres4(found):
    """2 x 2 tiles and the base; the config's own layout is a single tile. 3 x 3 or 6 x 6 cells a tile, newlines."""
    _, by_name = found
    for name, side in (("baseline", 3), ("uncompressed", 6), ("fastv", 6)):
        system = by_name[name]
        assert system["model"]["image"]["aspect_ratio"] == "anyres"
        assert system["tiles"] == 5
        assert system["text_tokens"] == 40
        assert system["vision_tokens"] == 5 * side**2 + 2 * side
    assert by_name["baseline"]["prompt_slots_by_stage"] == [40 + 51], "nothing is padded"
    # FastV keeps a quarter of the vision tokens behind its layer.
    assert by_name["fastv"]["vision_tokens_by_stage"] == [192, 48]
    assert by_name["fastv"]["prompt_slots_by_stage"] == [232, 88]
    assert by_name["fastv"]["model"]["pruning"]["name"] == "fastv"


def test_memory_is_that_of_the_programs(found):
    _, by_name = found
    memory = {name: system["memory_bytes"] for name, system in by_name.items()}
    for name, system in by_name.items():
        assert memory[name]["parameters"] == 4 * system["parameters"]
        assert memory[name]["compiled_peak"] == max(memory[name]["compiled_prefill"], memory[name]["compiled_decode"])
        assert memory[name]["measured_peak"] is None, "the CPU keeps no statistics"
    parameters = sum(leaf.size for leaf in jax.tree.leaves(tiny_model(by_name["baseline"]["model"])))
    assert by_name["baseline"]["parameters"] == parameters
    # Four times the vision tokens: longer caches, more work before.
    for stage in ("compiled_prefill", "compiled_decode"):
        assert memory["uncompressed"][stage] > memory["baseline"][stage] > memory["baseline"]["parameters"]


def test_the_cache_behind_a_pruner_has_no_room_for_what_it_dropped(found, config_file):
    """In bytes, exactly, by what decoding is given; the compiler's temporaries come on top."""
    content, by_name = found
    settings = EfficiencySettings(**content["settings"])
    given = {}
    for system in systems([Source("config", f"{config_file}:{name}") for name in ("uncompressed", "fastv")], "anyres4"):
        loaded = load(system, settings)
        example = prompt(loaded.processor, settings.text_tokens)
        exact = Buckets(tokens=tuple(range(1, len(example.tokens) + 1)), tiles=(5,))
        generator = Generator(loaded.model, loaded.tokenizer, exact, ignore_stop=True)
        prompts = generator.batch(dict.fromkeys(range(ROWS), example), ROWS)
        given[system.name] = generator.programs(prompts, NEW_TOKENS)["decode"].argument_bytes
        assert given[system.name] <= by_name[system.name]["memory_bytes"]["compiled_decode"]
    keys_and_values = ROWS * 2 * 2 * 6 * 4  # of a slot: two heads of six float32 numbers
    second_stage = ROWS * (88 + NEW_TOKENS) + 4 + ROWS * 4  # its mask, its next slot, its shifts
    assert given["uncompressed"] - given["fastv"] == (232 - 88) * keys_and_values - second_stage


def tiny_model(fields):
    return nnx.eval_shape(lambda: VisionLanguageModel(VlmConfig.from_dict(fields), rngs=nnx.Rngs(0)))


def test_table_and_plot(run, found):
    output, _ = run
    text = (output / MARKDOWN).read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| baseline", "| uncompressed", "| fastv"]
    peak = found[1]["fastv"]["memory_bytes"]["compiled_peak"] - found[1]["baseline"]["memory_bytes"]["compiled_peak"]
    assert f"{peak / 2**20:+,.1f}" in lines[4]
    assert lines[4].endswith("| 40.0 |")
    assert "192 -> 48" in lines[4]
    assert "measured peak (peak_bytes_in_use) is not available" in text
    plot = ElementTree.fromstring((output / PLOT).read_text())
    assert plot.tag.endswith("svg")
    assert sorted(path.name for path in output.iterdir()) == sorted((JSON, MARKDOWN, PLOT))


def test_results_are_replaced_only_if_asked(run, config_file, capsys, monkeypatch):
    kept = (run[0] / JSON).read_bytes()
    arguments = [f"--config={config_file}", f"--output={run[0]}"]
    assert main(["efficiency", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{JSON} exists; choose another --output, or replace it with --overwrite" in err
    assert (run[0] / JSON).read_bytes() == kept
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("past the check"))
    with pytest.raises(pytest.fail.Exception, match="past the check"):
        main(["efficiency", *arguments, "--overwrite"])
    assert main(["efficiency", f"--config={config_file}", f"--output={config_file}"]) == 2
    assert "is not a folder; choose another one" in capsys.readouterr().err


def test_plot_says_what_it_shows(run, tmp_path):
    draw(run[1], [42.9, 45.0, 40.0], tmp_path / "scores.svg")
    draw(run[1], [None] * 3, tmp_path / "bars.svg")
    with_scores, bars = ((tmp_path / name).read_text() for name in ("scores.svg", "bars.svg"))
    assert with_scores == (run[0] / PLOT).read_text(), "the same numbers give the same file"
    # Matplotlib keeps the text of what it draws as comments.
    for name in ("baseline", "uncompressed", "fastv", "time to first token (ms)"):
        assert name in with_scores
        assert name in bars
    assert "<!-- score -->" in with_scores
    assert "<!-- score -->" not in bars


def test_names(config_file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(config_file.read_text())

    def names(*texts):
        return [system.name for system in systems([Source("config", str(text)) for text in texts], "anyres4")]

    assert names(config_file, f"{config_file}:fastv") == ["tiny", "fastv"]
    assert names(f"{config_file}:fastv", f"{other}:fastv") == ["tiny:fastv", "other:fastv"]
    table = "configs/tables/paper.py"
    assert names(f"{table}:table4/fastv", f"{table}:table5a/baseline") == ["table4/fastv", "table5a/baseline"]


def test_paper_rows_and_layouts():
    def only(text, image):
        return systems([Source("config", text)], image)[0].config

    assert image_size(anyres4()) == (768, 768)
    assert image_size(anyres9()) == (1152, 1152)
    assert image_size(single_tile(96)) == (96, 96)
    assert only("configs/llava_vr_qwen2_0_5b.py:phase1", "anyres4").image == anyres4()
    assert only("configs/llava_vr_qwen2_0_5b.py:phase1", "config").image == single_tile()
    assert only("configs/tables/paper.py:table5c/after_1/0.5b/phase2", "config").image == anyres4()
    pruned = only("configs/tables/paper.py:table4/vispruner", "anyres4")
    assert (pruned.pruning.name, pruned.image.unpad) == ("vispruner", False)


def test_a_checkpoint_is_measured_with_its_own_weights(tmp_path):
    source = Source("checkpoint", str(tiny.save(tmp_path / "run" / "model")))
    (system,) = systems([source], "anyres4")
    assert (system.name, system.config.image) == ("run/model", anyres4(24))
    loaded = load(system, EfficiencySettings(dtype="float32"))
    found, saved = params_of(loaded.model), params_of(tiny.model(tiny.config()))
    assert found.keys() == saved.keys()
    for name, values in saved.items():
        np.testing.assert_array_equal(found[name], values)
    example = prompt(loaded.processor, 30)
    assert (len(example.tile_pixels), int(np.sum(~is_vision(example)))) == (5, 30)


def test_random_weights_are_of_the_activations_type():
    model = random_model(dataclasses.replace(tiny.config(), dtype="bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"bfloat16"}
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(model))


def one_summary(name):
    """What a benchmark's summary.json has, as far as the overall one reads it."""
    fields = {"title": name, "group": BENCHMARKS[name].group, "profile": "default", "interval": [0.0, 100.0]}
    fields |= {"score": 40.0 + PAPER.index(name), "standard_error": 1.0, "items": 4, "metrics": {}, "categories": {}}
    return fields | {"unscored": {"count": 0, "by_reason": {}}}


def test_scores(tmp_path):
    summary, average, part, empty = (tmp_path / f"{name}.json" for name in ("summary", "average", "part", "empty"))
    summary.write_text('{"score": 30.5, "items": 7}')
    average.write_text(json.dumps(overall_summary({name: one_summary(name) for name in PAPER})))
    part.write_text(json.dumps(overall_summary({name: one_summary(name) for name in PAPER[2:]})))
    empty.write_text('{"score": "high"}')
    names = ["a", "b=c"]
    assert parse_scores([], names) == [None, None]
    assert parse_scores(["1", "2.5"], names) == [1.0, 2.5]
    assert parse_scores([f"b=c={summary}", "a=7"], names) == [7.0, 30.5]
    assert parse_scores([str(average), "0"], names) == [pytest.approx(45.0), 0.0], "40 .. 50, their mean"
    for texts, message in (
        (["1"], "1 scores are given for 2 systems"),
        (["a=1"], "every system needs one score, but b=c has 0"),
        (["a=1", "a=2", "b=c=3"], "a has 2"),
        (["a=1", "2"], "give all 2 scores with a name, or all in the order"),
        (["x=1", "b=c=2"], "no system has this name; the names are a, b=c"),
        (["1", "101"], "is not a score from 0 to 100"),
        (["1", "nan"], "is not a score from 0 to 100"),
        (["1", "nowhere.json"], "this is neither a number nor a file"),
        (["1", str(empty)], r"expected the summary\.json of `vr-jax eval`, with a score or an average"),
        (
            ["1", str(part)],
            rf"no average, because benchmarks are missing \({PAPER[0]}, {PAPER[1]}\); run them, or give",
        ),
    ):
        with pytest.raises(UserError, match=message):
            parse_scores(texts, names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config=nowhere.py"], "config nowhere.py does not exist"),
        (["--config=FILE:other"], "no variant 'other': expected one of baseline"),
        (["--config=FILE:no_model"], "config.model is missing"),
        (["--config=FILE", "--config=FILE"], "is given twice"),
        (["--config=FILE", "--score=1", "--score=2"], "2 scores are given for 1 systems (tiny)"),
        (["--config=FILE", "--new_tokens=1"], "--new_tokens=1: expected an integer >= 2"),
        (["--config=FILE", "--text_tokens=3"], "text_tokens = 3: the chat template and one digit need"),
        (["--config=FILE", "--buckets", "--text_tokens=40000"], "the largest bucket holds 32768"),
        (["--checkpoint=FILE"], "is not a model directory"),
    ],
)
def test_mistakes_are_one_line(config_file, capsys, arguments, message):
    assert main(["efficiency", *(argument.replace("FILE", str(config_file)) for argument in arguments)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vr-jax efficiency: ")
    assert message in last


def test_a_layout_that_the_model_cannot_have(tmp_path, capsys):
    """A pruner's settings that the model cannot meet, found when the layout and the pruner come together."""
    path = tiny_systems.write(tmp_path)
    path.write_text(path.read_text().replace('"layer": 1', '"layer": 9'))
    assert main(["efficiency", f"--config={path}:fastv"]) == 2
    assert f"{path}:fastv with --image=anyres4: pruning 'fastv': layer = 9 outside" in capsys.readouterr().err


def test_too_large_for_the_machine(config_file, monkeypatch):
    monkeypatch.setattr("vr_jax.efficiency.measure._free_bytes", lambda: 1000)
    both = [System(name, Source("config", name), tiny.config()) for name in ("a", "b")]
    with pytest.raises(UserError, match=r"2 systems side by side do not fit .* try --isolate"):
        measure(both, EfficiencySettings())
