"""The files of configs/: the numbers of the paper, every field spelled out, and the values that were once recorded."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import pytest

from tests.tiny import quick
from vr_jax import sharding
from vr_jax.errors import ConfigError
from vr_jax.experiments import DECODERS, TABLES, find_row
from vr_jax.model.vlm import abstract_model
from vr_jax.settings import TrainConfig, load_config, read_config_file
from vr_jax.training.inputs import check_batch
from vr_jax.training.state import ModelTree

RECORDED = json.loads(Path(__file__).with_name("resolved_configs.json").read_text())
SIZES = {"0.5b": "0_5b", "1.5b": "1_5b", "7b": "7b"}
PAPER = {size: f"configs/llava_vr_qwen2_{name}.py" for size, name in SIZES.items()}
VARIANTS = ("phase1", "phase2", "phase1_baseline", "phase2_baseline")
LITERAL = (
    *(f"{file}:{phase}" for file in PAPER.values() for phase in ("phase1", "phase2")),
    *(f"configs/table6/{file}_vr.py:{phase}" for file in ("qwen2_5_vl", "minicpm_v") for phase in ("phase1", "phase2")),
    "configs/demo.py",
    "configs/real_charts.py:phase1",
    "configs/real_charts.py:phase2",
    "configs/real_charts.py:qwen2_5_vl",
    "configs/real_charts.py:minicpm_v",
)
ROWS = [f"{table}/{row}" for table, one in TABLES.items() for row in one.rows]
LAST_ROWS = [f"{table}/{list(one.rows)[-1]}" for table, one in TABLES.items()]
# Millions of parameters (docs/design/methods.md#parameter-counts): projector, two Vision Remember blocks, decoder.
PROJECTOR = {"0.5b": 1.722, "1.5b": 3.935, "7b": 16.52}
BLOCKS = {"0.5b": 93.0, "1.5b": 113.3, "7b": 222.4}
DECODER = {"0.5b": 494.03, "1.5b": 1543.7, "7b": 7615.6}


def flat(value, prefix=""):
    """Nested dictionaries as one dictionary by dotted name."""
    if isinstance(value, dict) and value:
        found = {}
        for key, part in value.items():
            found |= flat(part, f"{prefix}.{key}" if prefix else key)
        return found
    return {prefix: value}


def resolved(spec):
    """The settings of a config by dotted name, without the sections of other commands that the file does not set."""
    return flat(load_config(spec).to_dict())


def changed(fields, changes, gone):
    return {name: value for name, value in fields.items() if name not in gone} | changes


def recorded(spec):
    if spec == RECORDED["like"]:
        return RECORDED["full"]
    return changed(RECORDED["full"], **RECORDED["others"][spec])


def assert_equals_the_record(found, expected):
    """Fields that were recorded are equal; only the defaults of the sections `eval` and `probe` were not recorded."""
    assert {name: found.get(name, "absent") for name in expected} == expected
    others = {name for name in found if name not in expected}
    assert all(name.startswith(("eval.", "probe.")) for name in others)


@pytest.mark.parametrize("spec", [RECORDED["like"], *RECORDED["others"]])
def test_settings_equal_those_recorded_before_the_files_were_written_out(spec):
    assert_equals_the_record(resolved(spec), recorded(spec))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_rows_equal_the_record_and_differ_from_their_phase_in_the_method_only(row, size):
    for phase in ("phase1", "phase2"):
        parent = f"{PAPER[size]}:{phase}"
        record = RECORDED["rows"][f"{row}/{phase}"]
        expected = changed(recorded(parent), **record)
        if find_row(*row.split("/")).insert_every:  # the layers follow from the decoder's depth
            expected["model.refusion.insert_after"] = list(range(1, DECODERS[size].num_layers, 3))
        assert_equals_the_record(resolved(f"configs/tables/paper.py:{row}/{size}/{phase}"), expected)
        free = ("model.projector", "model.refusion", "model.image.", "batch.", "eval.", "trainable", "samples_per_step")
        assert all(name.startswith(free) for name in record["changes"])


@pytest.mark.parametrize("spec", LITERAL)
def test_a_file_shows_every_field_of_its_run(spec):
    """No number of a run is a default that the reader of the file cannot see."""
    shown = flat(read_config_file(spec).to_dict())
    all_fields = flat(load_config(spec).to_dict())
    others = ("eval.", "probe.") if all_fields["data.format"] == "demo" else ("eval.", "probe.", "data.demo.")
    hidden = {name for name in all_fields if name not in shown and not name.startswith(others)}
    assert hidden == set()


@pytest.mark.parametrize("size", SIZES)
def test_the_two_phases_have_the_same_fields_in_the_same_order(size):
    phase1, phase2 = (list(flat(read_config_file(f"{PAPER[size]}:{phase}").to_dict())) for phase in VARIANTS[:2])
    assert phase1 == phase2


def test_the_sizes_differ_in_the_decoder_only():
    for phase in VARIANTS:
        small, *others = (resolved(f"{file}:{phase}") for file in PAPER.values())
        for other in others:
            differing = {name for name in small if small[name] != other[name]}
            assert differing
            assert all(name.startswith("model.decoder.") for name in differing)
    for size, file in PAPER.items():
        assert load_config(f"{file}:phase1").model.decoder == DECODERS[size]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", PAPER)
def test_trained_parameters(size, variant):
    config = load_config(f"{PAPER[size]}:{variant}")
    tree = ModelTree(config.model)
    trained = sum(math.prod(tree.shapes[path].shape) for path in tree.trainable(config.trainable)) / 1e6
    expected = PROJECTOR[size] + (0 if variant.endswith("baseline") else BLOCKS[size])
    if variant.startswith("phase2"):
        expected += DECODER[size]
    # The expected counts are printed with four digits.
    assert trained == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("file", PAPER.values())
def test_the_numbers_of_section_4_1(file):
    phase1, phase2 = (load_config(f"{file}:{phase}") for phase in ("phase1", "phase2"))
    assert (phase1.optimizer.lr, phase1.samples_per_step, phase1.data.template) == (1e-3, 256, "plain")
    assert (phase2.optimizer.lr, phase2.samples_per_step, phase2.data.template) == (2e-4, 32, "chat")
    assert phase1.model.image.aspect_ratio == "square"
    assert phase1.batch.rows * phase1.batch.tiles == 256, "a caption has one tile, so an update has 256 samples"
    grids = phase2.model.image.grids
    assert (phase2.model.image.aspect_ratio, max(w * h for w, h in grids)) == ("anyres_max", 9)
    for config in (phase1, phase2):
        assert config.model.refusion.insert_after == (1, 4)
        assert config.model.refusion.levels == (7, 15, 23)
        assert config.model.projector.to_dict() == {"name": "pool", "stride": 3}
        assert config.model.cells_per_tile == 64
        assert config.model.dtype == "bfloat16"
        assert (config.epochs, config.steps, config.data.packing) == (1.0, 0, True)
        optimizer = config.optimizer
        assert (optimizer.schedule, optimizer.warmup_ratio, optimizer.clip_norm) == ("cosine", 0.03, 1.0)
        assert (optimizer.b1, optimizer.b2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.999, 1e-8, 0.0)
        assert not any(glob.startswith("encoder") for glob in config.trainable)
        check_batch(config.batch, sharding.make_mesh(fsdp=jax.device_count()))


# One row of each table is built here; the methods of the others are built by tests/model and tests/test_sharding.py.
@pytest.mark.parametrize("row", quick(ROWS, *LAST_ROWS))
def test_every_row_can_be_built(row):
    """The model of each phase has the row's methods, and the largest image and a question fit into a row of a batch."""
    system = find_row(*row.split("/"))
    for phase in ("phase1", "phase2"):
        config = load_config(f"configs/tables/paper.py:{row}/0.5b/{phase}")
        model = config.model
        assert (model.decoder, model.pruning) == (DECODERS["0.5b"], None)
        assert model.projector.name == system.projector["name"]
        assert (model.refusion and model.refusion.name) == (system.refusion and system.refusion["name"])
        assert (config.eval.pruning is not None) == (system.pruning is not None)
        assert config.batch.tiles >= model.image.max_tiles_per_image
        if phase == "phase2":
            grids = 4 if row.startswith("table5") else 9
            newlines = model.cells_per_side * grids
            assert model.image.max_tiles_per_image == 1 + grids
            assert config.batch.tokens >= (1 + grids) * model.cells_per_tile + newlines + 512
    ModelTree(model).trainable(config.trainable)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "minicpm_v"])
def test_table_six_adds_two_blocks_to_a_model_that_is_otherwise_the_same(family):
    """Blocks of 91.5 and 85.0 million parameters, and rows that hold the largest image and a question."""
    for phase in ("phase1", "phase2"):
        with_blocks = load_config(f"configs/table6/{family}_vr.py:{phase}")
        without = load_config(f"configs/table6/{family}.py:{phase}")
        assert with_blocks.model.refusion is not None
        assert dataclasses.replace(with_blocks.model, refusion=None) == without.model
        assert set(with_blocks.trainable) == {*without.trainable, "refusion.*"}
        expected = resolved(f"configs/table6/{family}_vr.py:{phase}")
        found = resolved(f"configs/table6/{family}.py:{phase}")
        different = {name for name in found if found[name] != expected.get(name)}
        assert different == {"trainable"}, different
        sizes = [
            sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(config.model)))
            for config in (with_blocks, without)
        ]
        million = {"qwen2_5_vl": 91.53, "minicpm_v": 84.98}[family]
        assert (sizes[0] - sizes[1]) / 2e6 == pytest.approx(million, abs=0.01)
        largest = {"qwen2_5_vl": 1280, "minicpm_v": 10 * 66}[family]
        assert phase == "phase1" or with_blocks.batch.tokens >= largest + 512
        assert ModelTree(with_blocks.model).trainable(with_blocks.trainable)


def test_small_configs_can_be_built():
    for spec in ("configs/demo.py", "configs/demo.py:uncompressed", *LITERAL[-4:]):
        config = load_config(spec)
        assert isinstance(config, TrainConfig)
        assert ModelTree(config.model).trainable(config.trainable)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (f"{PAPER['0.5b']}:phase3", "no variant 'phase3': expected one of phase1, phase2"),
        ("configs/demo.py:big", "no variant 'big': expected none, or 'uncompressed'"),
        ("configs/tables/paper.py:table9/pooling", "no table 'table9': expected one of table1, table2"),
        ("configs/tables/paper.py:table1/pool", "table1 has no row 'pool': expected one of pooling, pooling_vr"),
        ("configs/tables/paper.py:table1/pooling/3b", "no size '3b': expected one of 0.5b, 1.5b, 7b"),
        ("configs/tables/paper.py:table1/pooling/7b/phase3", "no phase 'phase3': expected one of phase1, phase2"),
        ("configs/tables/paper.py:table1", "expected table/row/size/phase"),
    ],
)
def test_an_unknown_variant_is_named(spec, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(spec)
    assert "\n" not in str(error.value)
