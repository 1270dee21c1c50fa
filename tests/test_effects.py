"""Settings and flags without effect are refused by name; the declarations name fields that exist."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from tests.settings.test_every_number import CONFIGS
from tests.training.tiny import tiny_run
from vr_jax.cli.chat import ChatFlags
from vr_jax.cli.efficiency import EfficiencyFlags
from vr_jax.cli.eval import EvalFlags
from vr_jax.cli.flags import parse
from vr_jax.cli.plan import PlanFlags
from vr_jax.cli.prepare import PrepareFlags
from vr_jax.cli.probe import ProbeFlags
from vr_jax.effects import check_effects
from vr_jax.errors import ConfigError
from vr_jax.fields import Config, NoEffect, NonNegativeInt, field_types
from vr_jax.settings import TRAINING, load_config

DECLARED = [(config, rule) for config in CONFIGS for rule in vars(config).get("no_effect", ())]
DEMO = "configs/demo.py"
PAPER = "configs/llava_vr_qwen2_0_5b.py:phase2"
READING = "configs/reading.py"


def section_at(config, name):
    """Follows a dotted name to its field's annotation; fails where there is none."""
    for part in name.split("."):
        assert isinstance(config, type)
        assert issubclass(config, Config)
        config = field_types(config)[part]


@pytest.mark.parametrize(("config", "rule"), DECLARED, ids=lambda one: getattr(one, "__name__", ""))
def test_the_declarations_name_fields_that_exist(config, rule):
    for name in (*rule.fields, rule.because):
        section_at(config, name)
    assert rule.because not in rule.fields
    assert rule.why


def test_there_are_declarations_for_settings_methods_and_flags():
    names = {config.__name__ for config, _ in DECLARED}
    assert {
        "TrainConfig",
        "ProfileSettings",
        "ImageConfig",
        "VisionRememberConfig",
        "PlanFlags",
        "AnswerFlags",
    } <= names


@pytest.mark.parametrize(
    ("spec", "override", "cause"),
    [
        (DEMO, "epochs=2", "config.steps = 700"),
        (DEMO, "epochs=1", "config.steps = 700"),
        (DEMO, "data.follow_links=True", "config.data.format = 'demo'"),
        (DEMO, "data.images=images", "config.data.format = 'demo'"),
        (PAPER, "data.demo.size=7", "config.data.format = ''"),
        (PAPER, "data.demo.seed=0", "config.data.format = ''"),
        (DEMO, "allow_unused=lora", "config.init_from = ''"),
        (DEMO, "profile.first_step=3", "config.profile.steps = 0"),
        (READING, "checkpoint.best=loss", "config.checkpoint.keep_best = 0"),
        (DEMO, "model.refusion.points=8", "config.model.refusion.interaction = 'local'"),
        (DEMO, "model.image.grids=((1,2),)", "config.model.image.aspect_ratio = 'square'"),
        (DEMO, "model.image.max_tiles=4", "config.model.image.aspect_ratio = 'square'"),
        (DEMO, "model.image.unpad_rounding=round7", "config.model.image.aspect_ratio = 'square'"),
    ],
)
def test_a_setting_without_effect_is_refused_with_the_one_that_makes_it_so(spec, override, cause):
    name = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"^config.{name} = ") as error:
        load_config(spec, [override])
    assert f" has no effect with {cause}: " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model.refusion.interaction=deformable", "model.refusion.cross_attention=plain"], "cross_attention"),
        (["model.refusion.interaction=global", "model.refusion.kernel=reference"], "kernel"),
        (["model.refusion.cross_attention=plain", "model.refusion.kernel=reference"], "kernel"),
        (["model.refusion.self_attention=False", "model.refusion.self_heads=2"], "self_heads"),
        (["model.refusion.self_attention=False", "model.refusion.order=self_cross"], "order"),
        (["model.refusion.self_attention=False", "model.refusion.text_pool=all_human"], "text_pool"),
    ],
)
def test_fields_of_a_method_that_another_of_its_fields_switches_off(overrides, name):
    with pytest.raises(ConfigError, match=rf"^config\.model\.refusion\.{name} = .* has no effect with"):
        load_config(DEMO, overrides)
    load_config(DEMO, overrides[:1])


@pytest.mark.parametrize("template", ["vicuna_v1", "qwen2_vl", "tokenizer"])
def test_a_quirk_of_the_labels_where_llava_has_none(template):
    with pytest.raises(ConfigError, match=r"^config\.data\.label_quirk = True .* config\.model\.template = ") as error:
        load_config(DEMO, [f"model.template={template}", "data.label_quirk=True"])
    assert template in str(error.value)
    load_config(DEMO, [f"model.template={template}"])
    load_config(DEMO, ["model.template=llama_3", "data.label_quirk=True"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["steps=0", "epochs=2"],
        ["data.format=llava_json", "data.path=my.json"],
        ["data.path=my.json", "data.images=images"],
        ["data.demo.size=7"],
        ["profile.steps=2", "profile.first_step=3"],
        ["checkpoint.keep_best=2", "checkpoint.best=loss"],
        ["checkpoint.keep_best=0"],
        ["model.refusion.interaction=deformable", "model.refusion.points=8"],
        ["model.refusion.self_attention=False", "model.refusion.text_pool=none"],
        ["model.refusion=None"],
    ],
)
def test_a_setting_with_effect_and_one_that_is_switched_off_are_accepted(overrides):
    load_config(DEMO, overrides)


def test_a_command_line_wins_over_the_file_without_complaint(tmp_path):
    """What an override switches off is refused only where the command line gives it too."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from vr_jax.settings import read_config_file\n\n\ndef get_config():\n"
        f"    config = read_config_file({DEMO!r})\n    config.update(steps=0, epochs=2.0)\n    return config\n"
    )
    assert load_config(path, ["steps=3"]).epochs == 2.0
    with pytest.raises(ConfigError, match=r"^config\.epochs = 3\.0 has no effect"):
        load_config(path, ["steps=3", "epochs=3"])


def test_a_file_that_contradicts_itself_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from vr_jax.settings import read_config_file\n\n\ndef get_config():\n"
        f"    config = read_config_file({DEMO!r})\n    config.epochs = 2.0\n    return config\n"
    )
    with pytest.raises(ConfigError, match=r"mine\.py: config\.epochs = 2\.0 has no effect with config\.steps = 700"):
        load_config(path)


def test_replaced_settings_are_checked_as_overrides_are():
    with pytest.raises(ConfigError, match=r"^config\.data\.demo\.size = 3 has no effect"):
        tiny_run(**{"data.demo.size": 3})


@pytest.mark.parametrize("name", ["eval.limit=3", "probe.lr=1"])
def test_a_section_that_a_command_does_not_read_is_refused(name):
    with pytest.raises(ConfigError, match=r"^config\.(eval\.limit|probe\.lr) has no effect on this command"):
        load_config(DEMO, [name], sections=TRAINING)
    load_config(DEMO, [name])


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        (ChatFlags, ["--checkpoint=a", "--top_p=0.5"], "--top_p = 0.5 has no effect with --temperature = 0.0: "),
        (ChatFlags, ["--checkpoint=a", "--seed=3"], "--seed = 3 has no effect with --temperature = 0.0: "),
        (EvalFlags, ["--config.mesh.fsdp=2"], "--config.FIELD = ('mesh.fsdp=2',) has no effect with --config = None: "),
        (ProbeFlags, ["--config.mesh.fsdp=2"], "has no effect with --config = None: "),
        (EfficiencyFlags, ["--config=a", "--overwrite"], "--overwrite = True has no effect with --output = None: "),
        (PlanFlags, ["--config=a", "--topology=cpu:8", "--overwrite"], "has no effect with --output = None: "),
        (PlanFlags, ["--config=a", "--topology=cpu:8", "--budget=9"], "has no effect with --search = False: "),
        (PlanFlags, ["--config=a", "--topology=cpu:8", "--batch=9"], "has no effect with --mode = 'train': "),
        (
            PlanFlags,
            ["--config=a", "--topology=cpu:8", "--mode=decode", "--samples=9"],
            "has no effect with --mode = 'decode': ",
        ),
        (PrepareFlags, ["--from=a", "--to=b", "--beam_options=--x"], "has no effect with --beam = False: "),
    ],
)
def test_a_flag_without_effect_is_refused_with_the_one_that_makes_it_so(table, arguments, message):
    with pytest.raises(ConfigError) as error:
        parse(table, arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_flags_with_effect_are_accepted():
    parse(ChatFlags, ["--checkpoint=a", "--top_p=0.5", "--seed=3", "--temperature=0.7"])
    parse(PlanFlags, ["--config=a", "--topology=cpu:8", "--mode=decode", "--batch=9"])


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    """A section whose second field belongs to a value of the first."""

    no_effect: ClassVar = (NoEffect(("size",), "kind", lambda own: own.kind == 0, "there is nothing to size"),)

    kind: NonNegativeInt = 0
    size: NonNegativeInt = 5


@dataclass(frozen=True, kw_only=True)
class Outer(Config):
    """A config with a section, which another field switches off as a whole."""

    no_effect: ClassVar = (NoEffect(("inner",), "on", lambda own: not own.on, "it is off"),)

    on: bool = True
    inner: Inner = field(default_factory=Inner)


def test_without_names_the_values_that_differ_from_their_defaults_count():
    check_effects(Outer())
    check_effects(Outer(inner=Inner(kind=1, size=7)))
    with pytest.raises(ConfigError, match=r"^config\.inner\.size = 7 has no effect with config\.inner\.kind = 0"):
        check_effects(Outer(inner=Inner(size=7)))
    with pytest.raises(ConfigError, match=r"^config\.inner\.kind = 1 has no effect with config\.on = False: it is off"):
        check_effects(Outer(on=False, inner=Inner(kind=1)))


def test_with_names_a_default_value_counts_too():
    with pytest.raises(ConfigError, match=r"^config\.inner\.size = 5 has no effect"):
        check_effects(Outer(), given=["inner.size"])
    check_effects(Outer(inner=Inner(size=7)), given=["inner.kind", "on"])
