"""The recipes say what the paper's table says, and every variant can be built."""

import importlib
import math

import jax
import pytest

from vr_jax import sharding
from vr_jax.errors import ConfigError
from vr_jax.errors import ConfigError as SettingsError
from vr_jax.experiments import paper
from vr_jax.settings import BatchSettings, TrainConfig, recipe
from vr_jax.training.inputs import check_batch
from vr_jax.training.state import ModelTree

PAPER = ("llava_vr_qwen2_0_5b", "llava_vr_qwen2_1_5b", "llava_vr_qwen2_7b")
# Millions of parameters (methods.md 9.1): mlp2x projector, two Vision Remember blocks, decoder with embeddings.
PROJECTOR = {"llava_vr_qwen2_0_5b": 1.722, "llava_vr_qwen2_1_5b": 3.935, "llava_vr_qwen2_7b": 16.52}
BLOCKS = {"llava_vr_qwen2_0_5b": 93.0, "llava_vr_qwen2_1_5b": 113.3, "llava_vr_qwen2_7b": 222.4}
DECODER = {"llava_vr_qwen2_0_5b": 494.03, "llava_vr_qwen2_1_5b": 1543.7, "llava_vr_qwen2_7b": 7615.6}


def get_config(name, *variant):
    return TrainConfig.from_config_dict(importlib.import_module(f"configs.{name}").get_config(*variant))


@pytest.mark.parametrize("variant", recipe.VARIANTS)
@pytest.mark.parametrize("name", PAPER)
def test_trained_parameters(name, variant):
    config = get_config(name, variant)
    tree = ModelTree(config.model)
    trained = sum(math.prod(tree.shapes[path].shape) for path in tree.trainable(config.trainable)) / 1e6
    expected = PROJECTOR[name] + (0 if variant.endswith("baseline") else BLOCKS[name])
    if variant.startswith("phase2"):
        expected += DECODER[name]
    assert trained == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_table(name):
    phase1, phase2 = (get_config(name, phase) for phase in ("phase1", "phase2"))
    assert (phase1.optimizer.lr, phase1.samples_per_step, phase1.data.template) == (1e-3, 256, "plain")
    assert (phase2.optimizer.lr, phase2.samples_per_step, phase2.data.template) == (2e-4, 32, "qwen_1_5")
    assert phase1.model.image.aspect_ratio == "square"
    assert phase1.batch.rows * phase1.batch.tiles == 256, "a caption has one tile, so an update has 256 samples"
    grids = phase2.model.image.grids
    assert (phase2.model.image.aspect_ratio, max(w * h for w, h in grids)) == ("anyres_max", 9)
    for config in (phase1, phase2):
        assert tuple(config.model.refusion.insert_after) == (1, 4)
        assert tuple(config.model.refusion.levels) == (7, 15, 23)
        assert config.model.projector.to_dict() == {"name": "pool", "stride": 3}
        assert config.model.dtype == "bfloat16"
        assert (config.epochs, config.steps, config.data.packing) == (1.0, 0, True)
        optimizer = config.optimizer
        assert (optimizer.schedule, optimizer.warmup_ratio, optimizer.clip_norm) == ("cosine", 0.03, 1.0)
        assert (optimizer.b1, optimizer.b2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.999, 1e-8, 0.0)
        assert not any(glob.startswith("vision") for glob in config.trainable)
        check_batch(config.batch, sharding.make_mesh(**config.mesh.to_dict()))


def test_every_recipe_can_be_built():
    for name, *variant in (("demo",), ("real_charts", "phase1"), ("real_charts", "phase2")):
        config = get_config(name, *variant)
        ModelTree(config.model).trainable(config.trainable)


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="no recipe 'phase3': expected one of phase1, phase2"):
        get_config(PAPER[0], "phase3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 12}, r"config\.batch\.rows = 12 is not divisible by 8"),
        ({"rows": 8, "accumulation": 2}, r"not divisible by 16 = replica 1 x fsdp 8 x accumulation 2"),
    ],
)
def test_batches_that_cannot_be_cut(changes, message):
    batch = {"rows": 8, "tokens": 16, "tiles": 1, "accumulation": 1} | changes
    with pytest.raises(SettingsError, match=message):
        check_batch(BatchSettings(**batch), sharding.make_mesh(fsdp=jax.device_count()))


ROWS = [f"{table}/{row}" for table, one in paper.TABLES.items() for row in one.rows]


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_papers_tables_builds(row):
    """At all three sizes and in both phases; what is trained, and what eval.py then switches on."""
    system = paper.system(*row.split("/"))
    for size, text in paper.TEXTS.items():
        for phase in recipe.PHASES:
            config = get_config("tables.paper", f"{row}/{size}/{phase}")
            model = config.model
            assert (model.decoder, model.pruning) == (text, None)
            assert model.projector.name == system.projector["name"]
            assert (model.refusion and model.refusion.name) == (system.refusion and system.refusion["name"])
            grids = 4 if row.startswith("table5") else 9
            assert phase == "phase1" or model.image.max_tiles_per_image == 1 + grids
            assert (config.eval.pruning is not None) == (system.pruning is not None)
            # The largest image and a question fit into a row.
            newlines = model.cells_per_side * grids
            assert phase == "phase1" or config.batch.tokens >= (1 + grids) * model.cells_per_tile + newlines + 512
            assert config.batch.tiles >= model.image.max_tiles_per_image
        tree = ModelTree(model)
        tree.trainable(config.trainable)


def test_the_rows_of_the_papers_tables():
    counted = {name: [row for row, one in table.rows.items() if not one.extra] for name, table in paper.TABLES.items()}
    assert {name: len(rows) for name, rows in counted.items()} == {
        "table1": 8, "table2": 6, "table3": 4, "table4": 6, "table5a": 5, "table5b": 3, "table5c": 3,
    }  # fmt: skip
    assert all(row in paper.listing() for rows in counted.values() for row in rows)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("table9/pooling", "no table 'table9': expected one of table1, table2"),
        ("table1/pool", "table1 has no row 'pool': expected one of pooling, pooling_vr"),
        ("table1/pooling/3b", "no size '3b': expected one of 0.5b, 1.5b, 7b"),
        ("table1/pooling/7b/phase3", "no phase 'phase3': expected one of phase1, phase2"),
        ("table1", "expected table/row/size/phase"),
    ],
)
def test_an_unknown_row_is_named(variant, message):
    with pytest.raises(ConfigError, match=message):
        get_config("tables.paper", variant)
