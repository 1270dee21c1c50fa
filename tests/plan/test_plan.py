"""Plans against what really runs: on the CPU's eight devices, with a model of a few thousand parameters."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.data.sliced import sliced_config
from tests.model.families import family_config
from tests.tiny import randomized
from tests.training.tiny import noise_batch, plain_run, tiny_run
from vr_jax import sharding
from vr_jax.cli import plan as command
from vr_jax.cli.main import main
from vr_jax.data.collate import collate
from vr_jax.errors import ConfigError, UserError
from vr_jax.inference import PromptBatch, Sampling
from vr_jax.model.batch import BatchShape
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.vlm import abstract_model
from vr_jax.plan import report
from vr_jax.plan.chips import CHIPS
from vr_jax.plan.compiling import bytes_per_chip, out_of_memory, roofline_of
from vr_jax.plan.inference import Request, abstract_generator, plan_inference
from vr_jax.plan.jaxpr_costs import matmul_flops
from vr_jax.plan.results import Memory, Roofline
from vr_jax.plan.search import Candidate, in_turns, search, settings_of
from vr_jax.plan.topology import Topology, open_topology, parse
from vr_jax.plan.training import fit_rows, model_flops, plan_training, trace_step
from vr_jax.settings import load_config
from vr_jax.training.flops import PEAK_FLOPS, forward_flops, step_flops
from vr_jax.training.inputs import put_batch
from vr_jax.training.optimizer import moments
from vr_jax.training.program import abstract_batch, build_program
from vr_jax.training.state import create_state

ROOT = Path(__file__).resolve().parents[2]
CONFIG_FILE = ROOT / "configs/llava_vr_qwen2_0_5b.py"
DEMO = ROOT / "configs/demo.py"


@pytest.fixture(scope="module")
def topology():
    return open_topology("cpu:8")


@pytest.fixture(scope="module")
def config():
    return tiny_run(**{"model.attention": "xla", "mesh.replica": 1, "mesh.fsdp": 4, "mesh.tensor": 2})


@pytest.fixture(scope="module")
def plan(config, topology):
    return plan_training("tiny", config, topology)


@pytest.fixture(scope="module")
def program(config, topology):
    return build_program(config, sharding.make_mesh(**config.mesh.to_dict(), devices=topology.devices), 1000)


@pytest.fixture(scope="module")
def real(program):
    """A state and a batch, as training has them."""
    with jax.set_mesh(program.mesh):
        model = randomized(abstract_model(program.model))
        state = create_state(program.tree, program.optimizer, program.abstract, model)
    return state, put_batch(noise_batch(0), program.mesh)


@pytest.mark.slow  # The step is traced twice and its parameters are made.
def test_the_planned_program_is_the_one_that_trains(config, topology, program, real):
    """The same text, lowered from the planner's abstract arguments and from real arrays."""
    with jax.set_mesh(program.mesh):
        real = program.step.lower(*real).as_text()
    assert trace_step(topology, config, program).lower().as_text() == real


@pytest.mark.slow  # A real run is compiled beside the plan.
def test_planned_arguments_are_the_bytes_of_real_arrays(plan, program, real):
    state, batch = real

    def on_first(tree):
        first = program.mesh.devices.flat[0]
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == first)

    memory = plan.memory
    assert memory.trained == on_first(state.params)
    assert memory.frozen == on_first(state.frozen)
    assert memory.optimizer == on_first(state.opt_state)
    first, second = moments(state.opt_state)
    assert (memory.first_moments, memory.second_moments) == (on_first(first), on_first(second))
    assert memory.gradients == on_first(state.params)
    assert memory.inputs == on_first((batch, state.step))


@pytest.mark.slow  # It compiles an update of its own.
def test_the_plan_tells_moments_and_gradients_one_by_one(plan):
    memory = plan.memory
    assert memory.first_moments == memory.second_moments == memory.gradients == memory.trained > 0
    assert 0 < memory.optimizer - memory.first_moments - memory.second_moments <= 64  # the counters
    lines = dict(report.facts(plan))
    for name in ("    first moments", "    second moments", "    gradients"):
        assert lines[name] == report.size(memory.trained)


def test_planned_memory_is_what_the_executable_says(plan, program, config):
    with jax.set_mesh(program.mesh):
        step = program.step.lower(program.abstract, abstract_batch(config, program.mesh)).compile()
    said = step.memory_analysis()
    assert plan.memory.arguments == said.argument_size_in_bytes
    assert plan.memory.temporaries == said.temp_size_in_bytes
    assert said.output_size_in_bytes == bytes_per_chip(program.abstract) + plan.memory.results
    # The metrics, and a table of pointers to all results.
    assert 0 < plan.memory.results <= 8 * len(jax.tree.leaves(program.abstract)) + 256


def test_operations_in_the_compiled_program_are_those_asked_for(plan):
    """Two independent counts. The tiny model's heads divide over the mesh, so no chip repeats another's work."""
    assert plan.work.flops == pytest.approx(plan.work.asked_flops, rel=0.05)
    assert plan.work.collective_bytes["all-gather"] > 0


@pytest.mark.slow  # It traces the paper's model; training/test_flops.py compares smaller ones.
def test_operations_of_the_paper_s_config_are_the_analytic_ones():
    """Phase 2 at 0.5B, one full row: the formula of vr_jax/training/flops.py, what remat repeats, and nothing else."""
    topology = open_topology("cpu:1")
    config = load_config(f"{CONFIG_FILE}:phase2", ["batch.rows=1", "samples_per_step=4", "model.attention=xla"])
    program = build_program(config, sharding.make_mesh(**config.mesh.to_dict(), devices=topology.devices), 1000)
    found = matmul_flops(trace_step(topology, config, program).jaxpr.jaxpr)
    tokens, tiles = config.batch.tokens, config.batch.tiles
    # XLA's attention computes every pair of the row, the loss every position.
    needed = step_flops(program.model, program.trainable).total(
        tiles=tiles, tokens=tokens, pairs=tokens**2, targets=tokens
    )
    forward = forward_flops(program.model)
    repeated = tokens * (forward["decoder"] + tokens * forward["attention"])
    repeated += tiles * forward["refusion"]
    assert config.model.remat == "full"
    assert found == pytest.approx(needed + repeated, rel=0.05)


def test_model_flops_of_full_rows(config, program):
    """By hand: 8 rows of 24 tokens and two tiles with four cells, one sample for each row on average."""
    parts = step_flops(program.model, program.trainable)
    expected = parts.total(tiles=16, tokens=192, pairs=192 * (192 / 8 + 1) / 2, targets=192 - 16 * 4)
    assert model_flops(config, program.trainable) == expected


def test_rows_are_raised_to_what_divides_and_the_note_says_so(topology, config):
    fitted, note = fit_rows(config, 48, fixed=False)
    assert (fitted.batch.rows, fitted.samples_per_step) == (48, 48)
    assert "rows 8 -> 48, samples per update 8 -> 48" in note
    assert "--config.batch.rows=48 --config.samples_per_step=48" in note
    assert fit_rows(fitted, 48, fixed=False) == (fitted, None)
    with pytest.raises(ConfigError, match="not divisible by 8"):
        plan_training(
            "tiny", config.replace({"batch.rows": 12, "mesh.fsdp": 8, "mesh.tensor": 1}), topology, fixed_rows=True
        )


def test_decoding_is_planned_with_the_programs_of_generation(topology, config):
    request = Request(batch=4, text_tokens=8, new_tokens=8)
    config = config.replace({"mesh.fsdp": 4, "mesh.tensor": 2})
    found = plan_inference("tiny", config, topology, "decode", request)
    text, layers = config.model.decoder, 2
    slots = found.settings["cache_tokens"]
    assert slots == found.settings["prompt_tokens"] + 8 == 4 + 8 + 8
    whole = 2 * layers * 4 * slots * text.num_kv_heads * (text.hidden_size // text.num_heads) * 2
    # Rows over fsdp, key heads over tensor; plus which slots are valid, the next free one and the shifts.
    small = 4 // 4 * slots + 4 + 4
    stages = 2
    assert found.memory.cache == whole // 8 + stages * small
    # No chip repeats another's work: the vocabulary's rows are cut over `tensor`.
    assert found.work.flops == found.work.asked_flops
    assert found.samples == found.tokens == 4


def test_the_planned_prefill_is_the_one_that_generation_runs(config):
    """The same program, traced from the planner's abstract arguments and from a generator's real ones."""
    topology = open_topology("cpu:1")
    config = config.replace({"mesh.fsdp": 1, "mesh.tensor": 1})
    planned, asked = [], Request(batch=1, text_tokens=12, new_tokens=5, dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "vr_jax.plan.inference.compile_for", lambda topology, mesh, traced, effort: planned.append(traced)
        )
        with pytest.raises(AttributeError):  # nothing was compiled
            plan_inference("tiny", config, topology, "prefill", asked)
    model = randomized(abstract_model(VlmConfig.from_dict(config.model.to_dict())))
    shape = BatchShape(rows=1, tokens=4 + 12, tiles=1, tile_size=16)
    with jax.set_mesh(sharding.make_mesh(**config.mesh.to_dict(), devices=topology.devices)):
        generator = abstract_generator(model)
        prompts = PromptBatch(collate([], shape, pad_side="left").batch, np.zeros(1, np.int32), None)
        arrays, static = generator._prefill_arguments(prompts, 5, Sampling())  # noqa: SLF001  # only this part is compared
        real = generator.prefill_program.trace(*arrays, **static)
    assert str(planned[0].jaxpr) == str(real.jaxpr)


@pytest.mark.slow  # Another prompt is compiled.
def test_a_prompt_has_the_stated_image(topology, config):
    """A model that keeps the sizes of images has no largest one, and its plan counts the tiles of the stated size."""
    image = ImageConfig(tile_size=16, aspect_ratio="native", unpad=False, min_pixels=64, max_pixels=6400)
    config = dataclasses.replace(config, model=family_config("qwen2_5_vl", image=image, attention="xla"))
    with pytest.raises(UserError, match="give the size to plan for, --image_size=WIDTHxHEIGHT"):
        plan_inference("tiny", config, topology, "prefill", Request(batch=8))
    with pytest.raises(UserError, match=r"--image_size=900x2: .*at most 200 times"):
        plan_inference("tiny", config, topology, "prefill", Request(batch=8, image_size=(900, 2)))
    found = plan_inference("tiny", config, topology, "prefill", Request(batch=8, image_size=(50, 30)))
    assert found.settings["tiles"] == 3 * 2
    assert found.settings["vision_tokens"] == 6 * 4 + 2
    # The layers of full attention compare a patch with all patches of the image, here of all its six tiles.
    encoder = config.model.encoder
    pairs = 2 * 16**2 * (6 * 6 - 6)
    assert encoder.flops_per_image(4, 6) == 6 * encoder.flops_per_tile(4) + 4 * 16 * pairs


@pytest.mark.slow  # It compiles a model.
def test_the_prompt_of_a_model_of_slices_has_the_most_pieces(topology, config):
    """An overview and four pieces of 2 x 2 tokens, with ten markers around them and three around and between pieces."""
    config = dataclasses.replace(config, model=sliced_config(attention="xla")).replace({"batch.tiles": 5})
    found = plan_inference("sliced", config, topology, "prefill", Request(batch=4, text_tokens=8, new_tokens=8))
    assert (found.settings["tiles"], found.settings["vision_tokens"]) == (5, 5 * 4 + 10 + 3)
    assert found.work.model_flops <= found.work.flops


def test_roofline_and_verdict():
    roof = Roofline(compute=0.2, hbm=0.5, interconnect=0.1, mfu=0.3)
    assert (roof.bound, roof.limit) == (0.5, "hbm")
    fields = {"trained": 4, "frozen": 2, "optimizer": 8, "cache": 0, "inputs": 1, "results": 1, "code": 0}
    memory = Memory(**fields, temporaries=4, capacity=32.0)
    assert (memory.arguments, memory.peak, memory.fits) == (15, 20, True)
    assert Memory(**fields, temporaries=4, capacity=19.0).fits is False
    assert Memory(**fields, temporaries=None, capacity=32.0, needed=40.0).fits is False
    assert Memory(**fields, temporaries=4, capacity=None).fits is None


def test_bandwidth_between_hosts():
    """8 GPUs on each of 4 hosts: within a host NVLink; across, all adapters of a host that take part."""
    chip = CHIPS["h200"]
    topology = Topology("h200:1x4x8", chip, tuple(jax.devices()[:1]) * 32, hosts=4)
    assert topology.bandwidth(32, 1) == 8 * chip.network
    assert topology.bandwidth(8, 1) == chip.interconnect
    assert topology.bandwidth(8, 8) == chip.interconnect  # the tensor axis
    assert topology.bandwidth(4, 2) == chip.interconnect
    assert topology.bandwidth(16, 8) == chip.network  # one chip of each host


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "expected numbers of chips behind 'v5e':"),
        ("v9:4x4", "no chip 'v9'; known: v5e"),
        ("v5e:4x4x4", "v5e has 2 axes, found 3"),
        ("h200:8", "h200 has 3 axes, found 1"),
        ("cpu:0", "expected numbers"),
        ("0*v5e:4x4", "a number of slices in front of"),
        ("*v5e:4x4", "a number of slices in front of"),
        ("2*h200:1x1x8", "the slices of GPUs are the first number of their shape"),
    ],
)
def test_topologies_that_do_not_exist(name, message):
    with pytest.raises(UserError, match=message):
        parse(name)


def test_a_name_has_its_number_of_slices():
    assert parse("4*v5e:16x16") == ("v5e", (16, 16), 4)
    assert parse("v5e:16x16").slices == 1


def test_gradients_cross_slices_once_per_update():
    """Two micro-batches, two slices: what crosses are a chip's gradients, the loss, and a share of five counts."""
    config = plain_run(**{"model.attention": "xla", "batch.accumulation": 2, "batch.rows": 16})
    topology = open_topology("2*cpu:4")
    found = plan_training("tiny", config, topology)
    assert found.mesh == {"replica": 2, "fsdp": 4, "tensor": 1}
    assert found.memory.gradients > 10_000
    # An all-reduce over two slices sends twice half of what it adds up.
    assert found.work.network_bytes == {"all-reduce": found.memory.gradients + 4 + 5 * 4 / 4}
    assert found.work.network_seconds is None
    lines = dict(report.facts(found))
    assert lines["  sent to other slices"] == "1.371e-05 GB"
    assert "replica crosses the network between the 2 slices" in lines["note"]
    header, row = report.table([found])
    assert dict(zip(header, row, strict=True))["to other slices, GB"] == "0.00"


def test_the_time_between_slices_is_a_bound(topology, plan):
    work = dataclasses.replace(
        plan.work, collective_seconds=0.1, network_bytes={"all-reduce": 3.125e9}, network_seconds=1.0
    )
    roof = roofline_of(dataclasses.replace(topology, chip=CHIPS["v5e"], slices=2), work)
    assert (roof.network, roof.bound, roof.limit) == (1.0, 1.0, "network")
    text = report.text(dataclasses.replace(plan, work=work, roofline=roof))
    assert "at least, by network between slices" in text
    assert "1 s, by network between slices" in text


# A sum of gradients over two micro-batches. Kernels are cut over fsdp, so a chip has 256 * 512 * 4 / chips bytes.
TOY = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from vr_jax import sharding
from vr_jax.plan.hlo_costs import program_costs
from vr_jax.plan.topology import compiling_for, open_topology, prepare_process

prepare_process(sys.argv[1])
topology = open_topology(sys.argv[1])
mesh = sharding.make_mesh(-1, -1, devices=topology.devices, slices=topology.slices)

def gradient(x, w):
    def add(total, part):
        return total + jax.grad(lambda w: jnp.sum(jnp.sin(part @ w)))(w), None
    parts = sharding.constrain(jnp.moveaxis(x.reshape(-1, 2, 256), 1, 0), None, "batch", None)
    return jax.lax.scan(add, jnp.zeros_like(w), parts)[0]

w = jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
x = jax.ShapeDtypeStruct((16 * mesh.size, 256), jnp.float32, sharding=sharding.batch_sharding(mesh))
with compiling_for(topology, mesh):
    step = jax.jit(sharding.sum_over_replicas(gradient), out_shardings=w.sharding)
    print(tuple(mesh.shape.values()), dict(program_costs(step.lower(x, w).compile().as_text()).across))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'vr-jax[tpu]'")
@pytest.mark.parametrize(("name", "slices", "chips"), [("2*v5e:4x4", 2, 16), ("4*v5e:2x2", 4, 4)])
def test_gradients_cross_slices_of_tpus_once_per_update(name, slices, chips):
    """libtpu's own program: an all-reduce over S slices sends 2 (S - 1) / S of a chip's gradients."""
    done = subprocess.run([sys.executable, "-c", TOY, name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sent = 2 * (slices - 1) / slices * 256 * 512 * 4 / chips
    assert done.stdout.strip() == f"({slices}, {chips}, 1) {{('all-reduce', {slices}): {sent}}}"


def test_every_chip_has_a_peak():
    assert {chip.kind for chip in CHIPS.values()} <= set(PEAK_FLOPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nowhere.py", "--topology=cpu:8"], "config nowhere.py does not exist"),
        ([f"--config={DEMO}", "--topology=moon:1"], "no chip 'moon'"),
        ([f"--config={DEMO}", "--topology=cpu:8", "--config.batch.row=3"], "row"),
        ([f"--config={DEMO}", "--topology=cpu:8", "--config.mesh.fsdp=3"], "change config.mesh"),
        ([f"--config={DEMO}", "--topology=cpu:8", "--config.batch.rows=3"], "not divisible by 8"),
        (
            [f"--config={DEMO}", "--topology=cpu:8", "--efficiency=2"],
            "--efficiency=2: expected a finite number >= 1e-30 and <= 1",
        ),
        ([f"--config={DEMO}", "--topology=cpu:8", "--mode=decode", "--cache_tokens=5"], "the prompt alone has"),
        ([f"--config={DEMO}", "--topology=cpu:8", "--mode=decode", "--search"], "--search is for --mode=train"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "prepare_process", parse)
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vr-jax plan: ")
    assert len(error.splitlines()) == 1
    assert message in error


@pytest.mark.parametrize(
    ("message", "needed", "limit"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 31.49G "
            "of 15.75G hbm. Exceeded hbm capacity by 15.74G.",
            *(31.49 * 2**30, 15.75 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (118.03G) exceeds available HBM (95.73G). HLO module: jit_step.",
            *(118.03 * 2**30, 95.73 * 2**30),
        ),
    ],
)
def test_what_a_program_that_does_not_fit_would_need(message, needed, limit):
    """Two forms of libtpu 0.0.52."""
    assert out_of_memory(message) == (needed, limit)
    assert out_of_memory("INTERNAL: something else") is None


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("v5e:4x4", "libtpu", "tpu"), ("h200:1x1x8", "jax_plugins", "cuda13")]
)
def test_a_missing_compiler_is_named(name, module, extra, monkeypatch):
    monkeypatch.setattr("vr_jax.plan.topology.find_spec", lambda asked: None if asked == module else object())
    with pytest.raises(UserError, match=rf"pip install 'vr-jax\[{extra}\]'"):
        open_topology(name)


def test_the_report_and_its_files(plan, tmp_path):
    text = report.text(plan)
    assert "this chip's memory is not known" in text
    assert "all-gather" in text
    report.write(tmp_path, [plan], report.markdown(plan))
    (data,) = json.loads((tmp_path / report.JSON).read_text())
    assert data["memory"]["peak"] == plan.memory.peak
    assert data["mesh"] == {"replica": 1, "fsdp": 4, "tensor": 2}
    assert "| optimizer |" in (tmp_path / report.MARKDOWN).read_text()


def test_remat_policies_take_turns_behind_the_own_policy():
    def candidate(remat, fsdp, seconds):
        return Candidate({"mesh.fsdp": fsdp, "model.remat": remat, "batch.accumulation": 1}, load_config(DEMO), seconds)

    estimates = [
        ("none", 1, 1.0),
        ("none", 2, 1.1),
        ("none", 4, 1.2),
        ("full", 1, 2.0),
        ("full", 2, 1.9),
        ("dots", 1, 1.5),
    ]
    order = in_turns([candidate(*one) for one in estimates], {"mesh.fsdp": 4, "model.remat": "none"})
    assert [(one.settings["model.remat"], one.settings["mesh.fsdp"]) for one in order] == [
        *[("none", 4), ("none", 1), ("dots", 1), ("full", 2), ("none", 2), ("full", 1)]
    ]


def test_search_plans_the_config_first_and_gives_flags(config, topology, plan, monkeypatch):
    """With no time left it still plans one, and names what it left. A mesh for other chips is no obstacle."""
    lines, asked = [], []
    elsewhere = config.replace({"mesh.fsdp": 3})
    assert settings_of(elsewhere, topology) == {"model.remat": config.model.remat, "batch.accumulation": 1}

    def planned(name, config, topology, **options):
        asked.append(config)
        return dataclasses.replace(plan, mesh={axis: getattr(config.mesh, axis) for axis in sharding.AXES})

    monkeypatch.setattr(sys.modules["vr_jax.plan.search"], "plan_training", planned)
    found = search(
        "tiny",
        config,
        topology,
        budget=0,
        efficiency=0.5,
        samples=100,
        fixed_rows=True,
        effort=None,
        say=lines.append,
    )
    assert len(found.plans) == len(found.flags) == 1
    # The config as it is comes first.
    own = {"mesh.replica": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "model.remat": config.model.remat}
    assert all(f"--config.{name}={value}" in found.flags[0] for name, value in own.items())
    assert "candidates" in found.left[0]
    assert found.flags[0] in found.text()
    (config,) = asked
    assert np.prod(list(found.plans[0].mesh.values())) == 8
    assert config.batch.rows % (config.mesh.replica * config.mesh.fsdp * config.batch.accumulation) == 0


@pytest.mark.slow  # The TPU's compiler takes a minute; test_pallas_tpu.py compiles a kernel with it.
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'vr-jax[tpu]'")
@pytest.mark.parametrize("topology", ["v5e:2x2", "2*v5e:2x2"])
def test_a_plan_for_tpu(topology):
    """In its own process, whose environment must be set before the compiler is loaded."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vr_jax", "plan", f"--config={DEMO}", f"--topology={topology}"),
            *("--config.batch.tokens=128", "--optimization_level=O0"),
        ],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "fits: " in done.stdout
    assert "bound of MFU" in done.stdout
    assert ("at least, by network between slices" in done.stdout) == topology.startswith("2*")
