"""Measurements of tiny models: what the numbers are, never how long anything took."""

import dataclasses
import statistics

import jax
import numpy as np
import pytest

from tests.efficiency.conftest import SETTINGS
from tests.inference import tiny
from tests.tiny import params_of
from vr_jax.efficiency import EfficiencySettings, Source, System, measure, read_systems
from vr_jax.efficiency.measurement import load, random_model
from vr_jax.efficiency.systems import is_vision, prompt
from vr_jax.errors import UserError
from vr_jax.inference import Buckets, Generator
from vr_jax.model.config import VlmConfig, anyres4
from vr_jax.model.vlm import abstract_model


@pytest.mark.slow  # Three systems are compiled and measured.
def test_numbers_are_those_of_the_repeats(found):
    content, by_name = found
    assert list(by_name) == ["baseline", "uncompressed", "fastv"]
    for field in ("time_to_first_token_ms", "tokens_per_second"):
        base = statistics.median(by_name["baseline"][field]["repeats"])
        for system in by_name.values():
            numbers = system[field]
            assert len(numbers["repeats"]) == SETTINGS.repeats
            assert min(numbers["repeats"]) == numbers["lowest"] > 0
            assert max(numbers["repeats"]) == numbers["highest"]
            assert numbers["median"] == sorted(numbers["repeats"])[SETTINGS.repeats // 2]
            assert numbers["ratio"] == pytest.approx(numbers["median"] / base)
    assert by_name["baseline"]["time_to_first_token_ms"]["ratio"] == 1
    assert content["settings"]["repeats"] == SETTINGS.repeats
    assert content["settings"]["dtype"] == "float32", "the default on CPUs"
    assert content["machine"]["jax"] == jax.__version__


@pytest.mark.slow  # It needs the systems of the test above.
def test_prompts_are_those_of_anyres4(found):
    """An image fills 2 x 2 tiles and the base tile, although the config's own layout is a single tile."""
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


@pytest.mark.slow  # It needs the systems of the test above.
def test_memory_is_that_of_the_programs(found):
    _, by_name = found
    memory = {name: system["memory_bytes"] for name, system in by_name.items()}
    for name, system in by_name.items():
        assert memory[name]["parameters"] == 4 * system["parameters"]
        both = (memory[name]["compiled_prefill"], memory[name]["compiled_decode"])
        assert memory[name]["compiled_peak"] == max(both)
        assert memory[name]["measured_peak"] is None, "the CPU keeps no statistics"
    model = abstract_model(VlmConfig.from_dict(by_name["baseline"]["model"]))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert by_name["baseline"]["parameters"] == parameters
    # Four times as many vision tokens need longer caches and larger temporaries.
    for stage in ("compiled_prefill", "compiled_decode"):
        assert memory["uncompressed"][stage] > memory["baseline"][stage] > memory["baseline"]["parameters"]


@pytest.mark.slow  # It needs the systems of the test above.
def test_the_cache_behind_a_pruner_has_no_slots_for_dropped_tokens(found, config_file):
    """The bytes that decoding is given differ by exactly the slots that the pruner dropped."""
    content, by_name = found
    settings = EfficiencySettings(**content["settings"])
    given = {}
    sources = [Source("config", f"{config_file}:{name}") for name in ("uncompressed", "fastv")]
    for system in read_systems(sources, "anyres4"):
        loaded = load(system, settings)
        example = prompt(loaded.processor, settings.text_tokens)
        exact = Buckets(tokens=tuple(range(1, len(example.tokens) + 1)), tiles=(5,))
        generator = Generator(loaded.model, loaded.tokenizer, exact, ignore_stop=True)
        prompts = generator.batch(dict.fromkeys(range(SETTINGS.batch_size), example), SETTINGS.batch_size)
        given[system.name] = generator.programs(prompts, SETTINGS.new_tokens)["decode"].argument_bytes
        assert given[system.name] <= by_name[system.name]["memory_bytes"]["compiled_decode"]
    # A slot has keys and values of two heads with six float32 numbers.
    keys_and_values = SETTINGS.batch_size * 2 * 2 * 6 * 4
    # The second stage has a mask, the number of the next slot and shifts of its own.
    second_stage = SETTINGS.batch_size * (88 + SETTINGS.new_tokens) + 4 + SETTINGS.batch_size * 4
    assert given["uncompressed"] - given["fastv"] == (232 - 88) * keys_and_values - second_stage


def test_a_checkpoint_is_measured_with_its_own_weights(tmp_path):
    source = Source("checkpoint", str(tiny.save(tmp_path / "run" / "model")))
    (system,) = read_systems([source], "anyres4")
    assert (system.name, system.config.image) == ("run/model", anyres4(24))
    loaded = load(system, EfficiencySettings(dtype="float32"))
    found, saved = params_of(loaded.model), params_of(tiny.model(tiny.config()))
    assert found.keys() == saved.keys()
    for name, values in saved.items():
        np.testing.assert_array_equal(found[name], values)
    example = prompt(loaded.processor, 30)
    assert (len(example.tile_pixels), int(np.sum(~is_vision(example)))) == (5, 30)


def test_random_weights_have_the_dtype_of_the_activations():
    model = random_model(dataclasses.replace(tiny.config(), dtype="bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"bfloat16"}
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(model))


def test_models_that_do_not_fit_in_memory_are_refused(monkeypatch):
    monkeypatch.setattr("vr_jax.efficiency.measurement._free_bytes", lambda: 1000)
    both = [System(name, Source("config", name), tiny.config()) for name in ("a", "b")]
    with pytest.raises(UserError, match=r"2 systems side by side do not fit .* try --isolate"):
        measure(both, EfficiencySettings())
