"""LoRA adapters and quantised bases in training: what is stored, trained, continued and exported."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from tests.tiny import quick, random_model
from tests.training.tiny import PLAIN, noise_batch, noise_inputs, plain_run, series, tiny_config, tiny_run
from vr_jax import sharding
from vr_jax.convert import import_adapter
from vr_jax.errors import ConfigError
from vr_jax.model.adaptation import ADAPTER
from vr_jax.model.quantization import dequantise
from vr_jax.model_directory import load_model, save_model
from vr_jax.training import loop
from vr_jax.training.checkpoint import Checkpoints
from vr_jax.training.export import export_state
from vr_jax.training.program import build_program
from vr_jax.training.state import ModelTree, create_state, merged_model

LORA = {"lora.rank": 4, "lora.alpha": 8.0, "lora.targets": ("decoder.*", "encoder.*"), "trainable": ("projector.*",)}
MESH = {"mesh.replica": 1, "mesh.fsdp": 4, "mesh.tensor": 2}
ONE = {"mesh.replica": 1, "mesh.fsdp": 1, "mesh.tensor": 1}


def program_of(config, devices=1):
    mesh = sharding.make_mesh(**config.mesh.to_dict(), devices=jax.devices()[:devices])
    return build_program(config, mesh, 10)


def stored(program):
    """Type and bytes of each parameter of the layers q and down of the decoder's last stage and of the encoder's."""
    state = program.abstract
    arrays = {
        **{p: ("trained", a) for p, a in state.params.items()},
        **{p: ("frozen", a) for p, a in state.frozen.items()},
    }
    layers = r"(decoder\.stages\.1\.(attn\.q|mlp\.down)|encoder\.stages\.1\.(attn\.out|mlp\.fc1))\.(.+)"
    return {
        path: (part, str(array.dtype), int(np.prod(array.shape)) * array.dtype.itemsize)
        for path, (part, array) in arrays.items()
        if re.fullmatch(layers, path)
    }


def adapter(layer, inputs, outputs, rank=4):
    return {
        f"{layer}.lora_a": ("trained", "float32", 4 * inputs * rank),
        f"{layer}.lora_b": ("trained", "float32", 4 * rank * outputs),
    }


# The layers of one layer each: q 32 x 32, down 64 x 32, out 16 x 16, fc1 16 x 32.
SIZES = {
    "decoder.stages.1.attn.q": (32, 32),
    "decoder.stages.1.mlp.down": (64, 32),
    "encoder.stages.1.attn.out": (16, 16),
    "encoder.stages.1.mlp.fc1": (16, 32),
}
BIASES = {
    "decoder.stages.1.attn.q.bias": ("frozen", "bfloat16", 2 * 32),
    "encoder.stages.1.attn.out.bias": ("frozen", "bfloat16", 2 * 16),
    "encoder.stages.1.mlp.fc1.bias": ("frozen", "bfloat16", 2 * 32),
}


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "nf4"])
def test_what_is_stored_in_the_stages_of_the_decoder_and_the_encoder(kind):
    """Type and bytes of everything that belongs to some targeted layers, in each stage's second layer."""
    config = tiny_run(**LORA, **ONE, frozen_dtype=kind)
    expected = dict(BIASES)
    for layer, (inputs, outputs) in SIZES.items():
        expected |= adapter(layer, inputs, outputs)
        size = inputs * outputs
        expected |= {
            "bfloat16": {f"{layer}.kernel": ("frozen", "bfloat16", 2 * size)},
            "int8": {
                f"{layer}.kernel_codes": ("frozen", "int8", size),
                f"{layer}.kernel_scale": ("frozen", "float32", 4 * outputs),
            },
            "nf4": {
                f"{layer}.kernel_codes": ("frozen", "uint8", size // 2),
                f"{layer}.kernel_scale": ("frozen", "float32", 4 * size // min(64, inputs)),
            },
        }[kind]
    assert stored(program_of(config)) == expected


def test_every_target_has_an_adapter_and_nothing_else_is_quantised():
    program = program_of(tiny_run(**LORA, **ONE, frozen_dtype="nf4"))
    plain, state = ModelTree(tiny_config()), program.abstract
    kernels = {p for p in plain.shapes if p.endswith(".kernel")}
    targets = {p for p in kernels if re.match(r"decoder\.stages|encoder\.stages", p)}
    assert {p.removesuffix(".lora_a") + ".kernel" for p in state.params if p.endswith(".lora_a")} == targets
    codes = {p.removesuffix("_codes") for p in state.frozen if p.endswith("_codes")}
    # The projector is trained; the frozen re-fusion block is quantised too.
    assert codes == {p for p in kernels if p in targets or p.startswith("refusion.")}
    others = {p: str(a.dtype) for p, a in state.frozen.items() if not p.endswith(("_codes", "_scale"))}
    assert set(others.values()) == {"bfloat16"}
    assert {"decoder.embed.embedding", "encoder.patch_embed.kernel", "decoder.norm.scale"} <= set(others)


def test_moments_exist_for_the_trained_parameters_only():
    program = program_of(tiny_run(**LORA, **ONE, frozen_dtype="int8"))
    adam = optax.tree_utils.tree_get(program.abstract.opt_state, "mu")
    assert set(adam) == set(program.trainable) == set(program.abstract.params)
    assert all(path.startswith("projector.") or path.endswith(ADAPTER) for path in program.trainable)


def state_of(program, model, seed=3):
    """A state at step 0 whose adapters are random too."""
    state = create_state(program.tree, program.optimizer, program.abstract, model, seed=seed)
    rng = np.random.default_rng(seed)
    params = {
        path: jax.device_put(rng.normal(size=array.shape).astype(np.float32) * 0.2, array.sharding)
        if path.endswith(".lora_b")
        else array
        for path, array in state.params.items()
    }
    return type(state)(step=state.step, params=params, frozen=state.frozen, opt_state=state.opt_state)


EVERYWHERE = {"lora.targets": ("*",), "trainable": ("image_newline",)}


@pytest.mark.parametrize("kind", quick(["float32", "nf4"], "float32"))
def test_loss_and_gradients_are_those_of_the_merged_model(kind):
    """The gradient of A is scale * dW B^T and that of B is scale * A^T dW, where dW is that of the merged kernel."""
    config = tiny_run(**LORA | EVERYWHERE, **ONE, frozen_dtype=kind)
    program = program_of(config)
    state = state_of(program, random_model(tiny_config(), scale=0.1))
    plain = ModelTree(tiny_config())
    batch = noise_batch(1, rows=2)

    def loss(model):
        hidden, _ = model(batch)
        return jnp.mean(jnp.square(model.logits(hidden)))

    params = {**state.frozen, **state.params}
    merged = {
        path: dequantise(params[f"{path}_codes"], params[f"{path}_scale"])
        if f"{path}_codes" in params
        else params[path]
        for path in plain.shapes
    }
    merged = {path: array.astype(jnp.float32) for path, array in merged.items()}
    for path in merged:
        if (a := path.removesuffix(".kernel") + ".lora_a") in params:
            merged[path] += 2.0 * jnp.einsum("...ir,...ro->...io", params[a], params[a[:-1] + "b"])
    expected, wide = jax.jit(jax.value_and_grad(lambda p: loss(plain.build(p))))(merged)
    found, grads = jax.jit(jax.value_and_grad(lambda p: loss(program.tree.build({**state.frozen, **p}))))(state.params)
    assert found == pytest.approx(float(expected), rel=2e-5)
    for path, grad in grads.items():
        stem, _, name = path.rpartition(".")
        if name == "lora_a":
            want = 2.0 * jnp.einsum("...io,...ro->...ir", wide[f"{stem}.kernel"], params[f"{stem}.lora_b"])
        elif name == "lora_b":
            want = 2.0 * jnp.einsum("...ir,...io->...ro", params[f"{stem}.lora_a"], wide[f"{stem}.kernel"])
        else:
            want = wide[path]
        bound = 1e-4 * max(1e-3, float(jnp.abs(want).max()))
        np.testing.assert_allclose(grad, want, atol=bound, err_msg=path)


@pytest.mark.slow  # compiles two updates of a model with adapters everywhere
def test_an_update_on_eight_devices_is_that_on_one():
    """A quantised base with adapters everywhere, cut over fsdp and tensor."""
    config = tiny_run(**LORA | EVERYWHERE, frozen_dtype="nf4")
    ends = []
    for mesh, devices in ((ONE, 1), (MESH, 8)):
        program = program_of(config.replace(mesh), devices)
        with jax.set_mesh(program.mesh):
            state = state_of(program, random_model(tiny_config(), scale=0.1))
            batch = jax.device_put(noise_batch(1), sharding.batch_sharding(program.mesh))
            state, metrics = program.step(state, batch)
        ends.append((jax.device_get(state.params), float(metrics["loss"]), float(metrics["grad_norm"])))
    (one, *numbers), (eight, *others) = ends
    assert others == pytest.approx(numbers, rel=1e-5)
    for path, array in one.items():
        np.testing.assert_allclose(eight[path], array, atol=2e-5, err_msg=path)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model directory with random parameters."""
    directory = tmp_path_factory.mktemp("start") / "model"
    save_model(directory, random_model(PLAIN, scale=0.1))
    return directory


def quantised_run(start, **changes):
    fields = LORA | MESH | {"frozen_dtype": "nf4", "init_from": str(start)}
    return plain_run(**fields | changes)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """One uninterrupted run with adapters over an nf4 base on 8 devices."""
    workdir = tmp_path_factory.mktemp("whole")
    loop.train(quantised_run(start), workdir, open_inputs=noise_inputs())
    return workdir


def state_in(workdir, config):
    program = program_of(config, 8)
    with Checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore_newest(program.abstract)
    return jax.device_get({**restored.state.params, **restored.state.frozen}), restored.step


@pytest.mark.slow  # Three runs; a plain run is continued in test_loop.py.
def test_a_run_that_crashed_continues_bit_for_bit(whole, start, tmp_path):
    from tests.training.test_loop import Crash, crash, interrupted_inputs

    config = quantised_run(start)
    with pytest.raises(Crash):
        loop.train(config, tmp_path, open_inputs=interrupted_inputs(3, crash))
    loop.train(config, tmp_path, open_inputs=noise_inputs())
    assert series(tmp_path) == series(whole)
    (found, step), (expected, _) = state_in(tmp_path, config), state_in(whole, config)
    assert step == 4
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.slow  # It trains over an nf4 base.
def test_the_exported_model_is_the_merged_one_and_the_adapter_makes_it_of_the_base(whole, start, tmp_path):
    """The base that the adapter is merged into here is not quantised, so that only the adapter agrees."""
    config = quantised_run(start)
    params, _ = state_in(whole, config)
    found = ModelTree(PLAIN).flatten(load_model(whole / "model"))
    before = ModelTree(PLAIN).flatten(load_model(start))
    stem = "decoder.stages.0.mlp.down"
    base = np.asarray(dequantise(params[f"{stem}.kernel_codes"], params[f"{stem}.kernel_scale"]))
    update = 2.0 * params[f"{stem}.lora_a"] @ params[f"{stem}.lora_b"]
    assert np.abs(update).max() > 1e-4
    np.testing.assert_allclose(found[f"{stem}.kernel"].astype(np.float32), base + update, rtol=2**-8)
    import_adapter(whole / "adapter", tmp_path / "merged", start)
    merged = ModelTree(PLAIN).flatten(load_model(tmp_path / "merged"))
    np.testing.assert_allclose(merged[f"{stem}.kernel"], np.asarray(before[f"{stem}.kernel"]) + update, atol=1e-6)
    np.testing.assert_array_equal(merged["projector.fc1.kernel"], params["projector.fc1.kernel"])
    np.testing.assert_array_equal(merged["decoder.norm.scale"], before["decoder.norm.scale"])


@pytest.mark.parametrize(
    ("changes", "modules"),
    [
        ({"lora.targets": ("decoder.stages.1.*",)}, 7),
        ({"lora.targets": ("decoder.stages.0.attn.q.kernel", "encoder.stages.1.mlp.*")}, 1 + 2),
        ({"lora.targets": ("decoder.*.mlp.*",), "trainable": ("decoder.stages.1.attn.*",)}, 6),
    ],
)
def test_an_adapter_of_some_stages_names_their_layers_alone(changes, modules, tmp_path):
    """Its files count through all layers of a stack."""
    config = tiny_run(**{"lora.rank": 2, "trainable": (), "frozen_dtype": "float32"}, **ONE).replace(changes)
    program, model = program_of(config), random_model(tiny_config(), scale=0.1)
    save_model(tmp_path / "base", model)
    export_state(tmp_path, program.tree, state_of(program, model), None, config=config)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(name.endswith(".lora_A.weight") for name in tensors) == modules
    import_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    found, expected = (ModelTree(tiny_config()).flatten(load_model(tmp_path / one)) for one in ("merged", "model"))
    for path, array in expected.items():
        np.testing.assert_allclose(found[path], array, atol=1e-6, err_msg=path)


def test_a_merged_model_is_float32_where_the_frozen_parameters_are():
    config = plain_run(**LORA, **ONE, frozen_dtype="float32")
    program = program_of(config)
    model = random_model(PLAIN, scale=0.1)
    merged = merged_model(program.tree, create_state(program.tree, program.optimizer, program.abstract, model))
    # B is zero at first.
    jax.tree.map(np.testing.assert_array_equal, merged, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora.targets": ("decodr.*",)},
            r"config\.lora\.targets: 'decodr\.\*' matches no parameter; did you mean decoder",
        ),
        (
            {"lora.targets": ("q_proj",)},
            r"'q_proj' matches no parameter; there are .*\*\.attn\.q\.kernel, .*\*\.mlp\.up\.kernel",
        ),
        (
            {"lora.targets": ("*.norm.scale",)},
            r"config\.lora\.targets: '\*\.norm\.scale' matches no kernel that can have",
        ),
        (
            {"lora.targets": ("decoder.embed.*",)},
            r"matches no kernel that can have an adapter, only e\.g\. decoder\.embed",
        ),
        ({"lora.targets": ()}, r"config\.lora\.targets is empty"),
        ({"lora.rank": 0}, r"config\.lora\.alpha = 8\.0 has no effect with config\.lora\.rank = 0"),
        ({"trainable": ("refusio.*",)}, r"config\.trainable: 'refusio\.\*' matches no parameter"),
        (
            {"optimizer.lr_groups": (("decoder.*.kernel", 1e-4),)},
            r"'decoder\.\*\.kernel' matches frozen parameters only",
        ),
    ],
)
def test_settings_without_effect_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        program_of(tiny_run(**ONE).replace(LORA | changes))


def test_nothing_to_quantise_is_refused():
    with pytest.raises(ConfigError, match=r"config\.frozen_dtype = 'nf4': no kernel of a linear layer is frozen"):
        program_of(tiny_run(**ONE, trainable=("*",), frozen_dtype="nf4"))


def test_a_run_may_train_adapters_alone():
    program = program_of(tiny_run(**LORA | {"trainable": ()}, **ONE))
    assert program.trainable
    assert all(path.endswith(ADAPTER) for path in program.trainable)


def test_a_target_is_frozen_whatever_trainable_says():
    program = program_of(tiny_run(**LORA | {"trainable": ("decoder.*",)}, **ONE))
    assert "decoder.stages.0.attn.q.kernel" in program.abstract.frozen
    assert "decoder.stages.0.attn.q.bias" in program.abstract.params
