"""TrainConfig: fields are described, combinations are checked, and the JSON form gives the same settings."""

import dataclasses
import json
import math

import pytest

from tests.model.families import family_config
from tests.training.tiny import tiny_config, tiny_run
from vr_jax import settings
from vr_jax.errors import ConfigError
from vr_jax.fields import Config
from vr_jax.settings import TrainConfig

SECTIONS = [one for one in vars(settings).values() if isinstance(one, type) and issubclass(one, Config)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_is_described(section):
    attributes = section.__doc__.partition("Attributes:")[2]
    assert all(f"    {one.name}: " in attributes for one in dataclasses.fields(section))


def test_the_json_form_gives_the_same_settings():
    config = tiny_run().replace(
        {"optimizer.lr_groups": (("decoder.*", 1e-5),), "data.format": "demo", "data.demo.size": 3}
    )
    assert TrainConfig.from_config_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainConfig.from_config_dict(config.to_config_dict()) == config


def test_absent_fields_keep_their_defaults():
    config = TrainConfig.from_config_dict({"model": tiny_config().to_dict(), "batch": {"rows": 2}})
    assert config == TrainConfig(model=tiny_config(), batch=settings.BatchSettings(rows=2))


NUMBERS = [
    ("steps", -1),
    ("epochs", 0.0),
    ("epochs", -1.0),
    ("samples_per_step", 0),
    ("loss_chunk", 0),
    ("seed", -1),
    ("seed", 2**32),
    ("batch.rows", 0),
    ("batch.tokens", 0),
    ("batch.tiles", -4),
    ("batch.accumulation", 0),
    ("optimizer.lr", 0.0),
    ("optimizer.warmup_ratio", 1.0),
    ("optimizer.b1", 1.0),
    ("optimizer.b1", 1.5),
    ("optimizer.b2", 0.9999999),
    ("optimizer.b2", -0.1),
    ("optimizer.eps", 0.0),
    ("optimizer.weight_decay", -1.0),
    ("optimizer.clip_norm", 0.0),
    ("optimizer.lr_groups", (("encoder.*", -1e-6),)),
    ("checkpoint.every", 0),
    ("checkpoint.keep_last", -1),
    ("data.workers", -1),
    ("data.max_skipped", 1.5),
    ("mesh.fsdp", -2),
    ("mesh.tensor", 0),
    ("mesh.slices", -1),
    ("profile.steps", -1),
    ("eval.batch_size", 0),
    ("probe.lr", 0.0),
]
FLOATS = [
    "epochs",
    "data.max_skipped",
    *(f"optimizer.{name}" for name in ("lr", "warmup_ratio", "b1", "b2", "eps", "weight_decay", "clip_norm")),
    "probe.lr",
    "probe.weight_decay",
]


@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_a_number_outside_its_range_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"config\.{name.replace('.', '[.]')} = .*expected"):
        tiny_run(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", FLOATS)
def test_no_number_may_be_nan_or_infinite(name, value):
    with pytest.raises(ConfigError, match=rf"config\.{name.replace('.', '[.]')} = "):
        tiny_run(**{name: value})
    with pytest.raises(ConfigError, match=r"config\.optimizer\.lr_groups = "):
        tiny_run(**{"optimizer.lr_groups": (("decoder.*", value),)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint.keep_last": 0, "checkpoint.keep_best": 0}, r"keep_last = 0: expected an integer >= 1"),
        ({"steps": 5, "optimizer.warmup_ratio": 0.9}, "makes all 5 updates a warm-up"),
        ({"steps": 5, "profile.steps": 1, "profile.first_step": 6}, "lies behind the last update: config.steps = 5"),
        (
            {"data.packing": False, "samples_per_step": 4},
            "samples_per_step = 4 with config.data.packing = False",
        ),
        ({"batch.tokens": 4}, "config.batch.tokens = 4 holds no image and its text"),
        ({"init_from": "a,b,a"}, "config.init_from = 'a,b,a': expected directories"),
        ({"trainable": ("decoder.*", "decoder.*")}, "config.trainable = .*no element twice"),
        ({"trainable": ("",)}, "config.trainable = .*a text that is not empty"),
        ({"allow_unused": ("",), "init_from": "a"}, "config.allow_unused = .*a text that is not empty"),
        ({"optimizer.lr_groups": (("decoder.*", 1e-5), ("decoder.*", 1e-6))}, "'decoder.*' twice"),
        ({"optimizer.lr_groups": (("", 1e-5),)}, "config.optimizer.lr_groups = "),
        ({"model.refusion.insert_after": (1, 1)}, "strictly increasing"),
        ({"model.image.grids": ((1, 2), (1, 2)), "model.image.aspect_ratio": "anyres"}, "no element twice"),
        (
            {"model.image.grids": ((1, 3),), "model.image.aspect_ratio": "anyres"},
            "config.batch.tiles = 2 holds no image",
        ),
        ({"probe.layers": (1, 1)}, "config.probe.layers = .*no element twice"),
        ({"eval.pruning": "fastvv"}, r"config\.eval\.pruning\.name = 'fastvv': did you mean 'fastv'"),
        ({"eval.pruning": {"name": "fastv", "keep": 1.5}}, r"config\.eval\.pruning\.keep = 1\.5: expected"),
        ({"eval.pruning": {"name": "fastv", "keep": math.nan}}, r"config\.eval\.pruning\.keep = nan: expected"),
        ({"eval.pruning": {"keep": 0.5}}, r"config\.eval\.pruning\.name = None"),
        ({"eval.pruning": '{"name": "fastv"'}, r"config\.eval\.pruning .* is no valid JSON object"),
        ({"eval.benchmark": ""}, r"config\.eval\.benchmark = ''"),
        ({"batch.rows": 7, "batch.accumulation": 2}, r"config\.batch\.rows = 7 is not divisible by"),
        ({"mesh.fsdp": -1, "mesh.tensor": -1}, "at most one axis may be -1"),
        ({"trainable": ()}, "config.trainable is empty"),
        ({"optimizer.schedule": "linear"}, "expected one of 'cosine', 'constant'"),
        ({"steps": 2.5}, r"config\.steps = 2\.5: expected an integer"),
        ({"tensorboard": 1}, r"config\.tensorboard = 1: expected True or False"),
        ({"model.projector.stride": 3}, "does not divide"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_run(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimzer": {}}, "config has no field 'optimzer'; did you mean 'optimizer'"),
        ({"model": {"refusion": {"name": "svaa"}}}, "'svaa'.*known names are deepstack, sva, vision_remember"),
        ({"model": {"projector": {"name": "pool", "depth": 2}}}, "has no field 'depth'"),
        ({}, r"config\.model is missing"),
    ],
)
def test_an_unknown_name_is_one_line_with_the_known_ones(values, message):
    if "optimzer" in values:
        values = {"model": tiny_config().to_dict(), **values}
    with pytest.raises(ConfigError, match=message) as error:
        TrainConfig.from_config_dict(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tiles": 12},
            r"batch.tiles = 12 holds no image: one has 13 tiles or more .*better 50176, the tiles of",
        ),
        ({"tiles": 13, "tokens": 49}, "config.batch.tokens = 49 holds no image and its text: an image has 49 vision"),
    ],
)
def test_a_row_holds_the_smallest_image_of_a_model_that_keeps_their_sizes(changes, message):
    """The fewest pixels, 56 x 56, are 12.25 tiles of 16 x 16 pixels and 49 cells of 8 x 8 pixels."""
    config = tiny_run().to_dict() | {"model": family_config("qwen2_5_vl").to_dict()}
    TrainConfig.from_config_dict(config | {"batch": config["batch"] | {"tiles": 13, "tokens": 50}})
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_config_dict(config | {"batch": config["batch"] | {"tokens": 50} | changes})
