"""Overrides of single settings: how texts are read, methods that are chosen by name, and names that do not exist."""

import pytest

from tests.training.tiny import tiny_run
from vr_jax.errors import ConfigError
from vr_jax.settings import load_config


@pytest.fixture(scope="module")
def config():
    return tiny_run()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=1", 1.0),
        ("steps=1_000", 1000),
        ("tensorboard=true", True),
        ("tensorboard=False", False),
        ("data.path=/data/a=b,c.json", "/data/a=b,c.json"),
        ("data.path=None", ""),
        ("trainable=decoder.*,projector.*", ("decoder.*", "projector.*")),
        ("trainable=('projector.*',)", ("projector.*",)),
        ("trainable=projector.*", ("projector.*",)),
        ("model.refusion.insert_after=[1]", (1,)),
        ("model.refusion.cross_heads=2", 2),
        ("model.refusion.cross_heads=None", None),
        ("optimizer.lr_groups=(('decoder.*', 1e-5), ('projector.*', 0))", (("decoder.*", 1e-5), ("projector.*", 0.0))),
        ("optimizer.schedule=constant", "constant"),
        ("eval.pruning=fastv", "fastv"),
        ("probe.layers=1,2", (1, 2)),
    ],
)
def test_a_text_is_read_as_the_type_of_its_field(config, override, value):
    found = config.override([override])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_the_last_of_several_counts(config):
    assert config.override(["steps=3", "steps=4"]).steps == 4


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.projector.name=perceiver", "model.projector.depth=2"],
        ["model.projector.depth=2", "model.projector.name=perceiver"],
    ],
)
def test_the_fields_of_a_method_are_settable_where_it_is_chosen_in_any_order(config, overrides):
    projector = config.override(overrides).model.projector
    assert (projector.name, projector.depth) == ("perceiver", 2)
    assert projector.stride == config.model.projector.stride, "shared by all projectors"


def test_a_chosen_method_has_its_own_defaults(config):
    refusion = config.override(["model.refusion.name=sva", "model.refusion.levels=2"]).model.refusion
    assert refusion.insert_after == config.model.refusion.insert_after, "shared by all re-fusion blocks"
    assert (refusion.levels, refusion.width) == ((2,), 1024)
    assert config.override(["model.projector.name=mlp", "model.refusion=None"]).model.projector.stride == 1


def test_the_name_that_is_already_chosen_changes_nothing(config):
    assert config.override(["model.refusion.name=vision_remember"]) == config


def test_a_method_is_switched_off_and_on(config):
    off = config.override(["model.refusion=None"])
    assert off.model.refusion is None
    on = off.override(["model.refusion.insert_after=1", "model.refusion.levels=2", "model.refusion.name=sva"])
    assert on.model.refusion.name == "sva"
    assert config.replace({"model.refusion": None}) == off


def test_a_pruner_is_chosen_for_a_model_without_re_fusion_blocks():
    config = load_config("configs/demo.py:uncompressed", ["model.pruning.layer=1", "model.pruning.name=fastv"])
    assert (config.model.pruning.name, config.model.pruning.layer) == ("fastv", 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", r"config\.optimizer has no field 'lrr'; did you mean 'lr'\? it has b1, b2, clip_norm"),
        ("optimzer.lr=1", "config has no field 'optimzer'; did you mean 'optimizer'"),
        ("model.encoder.depth=2", r"config\.model\.encoder has no field 'depth'; it has hidden_size"),
        ("model.projector.depth=2", r"config\.model\.projector has no field 'depth'; it has name, stride"),
        ("model.refusion.name=svx", r"config\.model\.refusion\.name = 'svx': did you mean 'sva'\? known names are"),
        ("steps.more=1", r"config\.steps is an integer >= 0 .* and has no fields"),
        ("optimizer.lr=abc", r"config\.optimizer\.lr = 'abc': expected a finite number"),
        ("optimizer.lr=nan", r"config\.optimizer\.lr = nan: expected a finite number >= 1e-30"),
        ("steps=1e3", r"config\.steps = '1e3': expected an integer"),
        ("steps=None", r"config\.steps = 'None': expected an integer"),
        ("data.path=", r"config\.data\.path is empty; give paths with commas between, or None for none"),
        ("tensorboard=maybe", r"config\.tensorboard = 'maybe': expected True or False"),
        ("optimizer.schedule=linear", r"config\.optimizer\.schedule = 'linear': expected one of 'cosine', 'constant'"),
        ("trainable=a,,b", r"config\.trainable = 'a,,b': an element between the commas is empty; expected a sequence"),
        ("trainable=,", r"config\.trainable = ',': an element between the commas is empty"),
        ("trainable=(decoder", r"config\.trainable = '\(decoder': expected a sequence, each element a text"),
        ("probe.layers=1,x", r"config\.probe\.layers\[1\] = 'x': expected an integer"),
        ("optimizer=fast", r"config\.optimizer = 'fast': this is a section; set its fields"),
        ("model.projector=None", r"config\.model\.projector = 'None': this is a section"),
        ("steps", "'steps': expected FIELD=VALUE"),
        ("data.sources=[{[]:1}]", r"config\.data\.sources = "),
        ("data.sources={{}}", r"config\.data\.sources = "),
    ],
)
def test_a_wrong_override_is_one_line(config, override, message):
    with pytest.raises(ConfigError, match=message) as error:
        config.override([override])
    assert "\n" not in str(error.value)


def test_the_fields_of_a_method_that_is_off_need_its_name(config):
    off = config.replace({"model.refusion": None})
    with pytest.raises(ConfigError, match=r"config\.model\.refusion is None \(switched off\); choose one first with"):
        off.override(["model.refusion.depth=2"])
