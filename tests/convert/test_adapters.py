"""Adapters of PEFT and of LLaVA: merged into their base as formulas say, and every field read or refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert.conftest import TEXT, llava_layout, torch, weights_of, write_checkpoint
from vr_jax.convert import import_adapter
from vr_jax.convert.adapter_fields import ADAPTER_TABLE
from vr_jax.errors import UserError
from vr_jax.model_directory import load_params

CONFIG = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 6,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "down_proj", "fc1"],
    "bias": "none",
    "task_type": "CAUSAL_LM",
}
LANGUAGE = "base_model.model.model.language_model.layers.1."
VISION = "base_model.model.model.vision_tower.encoder.layers.0."
WIDTHS = {
    f"{LANGUAGE}self_attn.q_proj": (24, 24),
    f"{LANGUAGE}mlp.down_proj": (32, 24),
    f"{VISION}mlp.fc1": (16, 24),
}
OURS = {
    f"{LANGUAGE}self_attn.q_proj": ("decoder.layers.attn.q.kernel", 1),
    f"{LANGUAGE}mlp.down_proj": ("decoder.layers.mlp.down.kernel", 1),
    f"{VISION}mlp.fc1": ("encoder.layers.mlp.fc1.kernel", 0),
}


def matrices(rank=3, seed=0):
    """A (rank, in) and B (out, rank) of each module, as torch keeps them."""
    rng = np.random.default_rng(seed)
    found = {}
    for module, (inputs, outputs) in WIDTHS.items():
        found[f"{module}.lora_A.weight"] = rng.normal(size=(rank, inputs)).astype(np.float32)
        found[f"{module}.lora_B.weight"] = rng.normal(size=(outputs, rank)).astype(np.float32)
    return found


def write_adapter(directory, tensors=None, **changes):
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    save_file(matrices() if tensors is None else tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture(scope="module")
def base(hf_dirs, tmp_path_factory):
    """A model directory of a tiny LLaVA-OneVision."""
    from vr_jax.convert import import_checkpoint

    target = tmp_path_factory.mktemp("base") / "model"
    import_checkpoint(hf_dirs("onevision")[1], target)
    return target


def changes(target, base):
    """What differs from the base, by path."""
    found, before = load_params(target), load_params(base)
    assert found.keys() == before.keys()
    difference = {path: np.asarray(array) - np.asarray(before[path]) for path, array in found.items()}
    return {path: array for path, array in difference.items() if np.any(array)}


def expected_changes(scales):
    expected = {}
    tensors = matrices()
    for module, (path, layer) in OURS.items():
        update = (
            scales[module.rpartition(".")[2]] * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        )
        expected[path] = np.zeros((3, *update.T.shape))
        expected[path][layer] = update.T
    return expected


@pytest.mark.parametrize(
    ("fields", "scales"),
    [
        ({}, {"q_proj": 2, "down_proj": 2, "fc1": 2}),
        ({"use_rslora": True}, dict.fromkeys(("q_proj", "down_proj", "fc1"), 6 / 3**0.5)),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 30, ".*fc1": 9}}, {"q_proj": 10, "down_proj": 2, "fc1": 3}),
        ({"r": 8, "rank_pattern": {"q_proj|down_proj|fc1": 3}}, {"q_proj": 2, "down_proj": 2, "fc1": 2}),
        ({"target_modules": r".*\.(q_proj|down_proj|fc1)"}, {"q_proj": 2, "down_proj": 2, "fc1": 2}),
        ({"target_modules": "all-linear"}, {"q_proj": 2, "down_proj": 2, "fc1": 2}),
    ],
)
def test_an_adapter_is_added_to_the_kernels_of_its_modules(base, tmp_path, fields, scales):
    adapter = write_adapter(tmp_path / "adapter", **fields)
    import_adapter(adapter, tmp_path / "merged", base)
    found, expected = changes(tmp_path / "merged", base), expected_changes(scales)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_allclose(found[path], array, atol=1e-5, err_msg=path)


def test_a_checkpoint_of_transformers_is_a_base_too(hf_dirs, base, tmp_path, converted):
    adapter = write_adapter(tmp_path / "adapter")
    printed = converted(
        "import", f"--from={adapter}", f"--base={hf_dirs('onevision')[1]}", f"--to={tmp_path / 'merged'}"
    )
    assert "LoRA of 3 modules merged" in printed
    found, expected = (
        changes(tmp_path / "merged", base),
        expected_changes(dict.fromkeys(("q_proj", "down_proj", "fc1"), 2)),
    )
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_allclose(found[path], array, atol=1e-5, err_msg=path)


def test_modules_to_save_are_put_in(base, tmp_path):
    name = "base_model.model.model.multi_modal_projector.linear_1"
    rng = np.random.default_rng(1)
    full = {f"{name}.weight": rng.normal(size=(24, 16)), f"{name}.bias": rng.normal(size=24)}
    full = {name: array.astype(np.float32) for name, array in full.items()}
    adapter = write_adapter(tmp_path / "adapter", matrices() | full, modules_to_save=["multi_modal_projector"])
    import_adapter(adapter, tmp_path / "merged", base)
    found = load_params(tmp_path / "merged")
    np.testing.assert_array_equal(found["projector.fc1.kernel"], full[f"{name}.weight"].T)
    np.testing.assert_array_equal(found["projector.fc1.bias"], full[f"{name}.bias"])
    other = write_adapter(tmp_path / "other", matrices() | full)
    with pytest.raises(UserError, match=r"linear_1\.\w+: neither a matrix of LoRA .* nor of modules_to_save"):
        import_adapter(other, tmp_path / "refused", base)


def test_what_llava_writes_after_lora_completes_a_language_model_and_an_encoder(hf_dirs, tmp_path, converted):
    model, _ = hf_dirs("onevision")
    config, tensors = llava_layout(model)
    rest = {name: t for name, t in tensors.items() if "mm_projector" in name or "newline" in name}
    folder = write_adapter(
        tmp_path / "llava-lora",
        {
            "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": matrices()[
                f"{LANGUAGE}self_attn.q_proj.lora_A.weight"
            ],
            "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": matrices()[
                f"{LANGUAGE}self_attn.q_proj.lora_B.weight"
            ],
        },
    )
    (folder / "config.json").write_text(json.dumps(config))
    in_full = {f"base_model.model.{name}": torch.tensor(t) for name, t in rest.items()}
    torch.save(in_full, folder / "non_lora_trainables.bin")
    text = {
        name: t
        for name, t in tensors.items()
        if name.startswith(("model.layers", "model.embed", "model.norm", "lm_head"))
    }
    language = {
        **TEXT,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
    }
    base = write_checkpoint(tmp_path / "qwen2", language, text)
    (base / "tokenizer_config.json").write_text("{}")
    _, encoder = hf_dirs("siglip_vision")
    converted("import", f"--from={folder}", f"--base={base}", f"--encoder={encoder}", f"--to={tmp_path / 'merged'}")
    found = load_params(tmp_path / "merged")
    weights = weights_of(model)
    a, b = (matrices()[f"{LANGUAGE}self_attn.q_proj.lora_{x}.weight"] for x in "AB")
    expected = weights["model.language_model.layers.1.self_attn.q_proj.weight"] + 2 * b @ a
    np.testing.assert_allclose(found["decoder.layers.attn.q.kernel"][1], expected.T, atol=1e-5)
    np.testing.assert_array_equal(
        found["decoder.layers.attn.q.kernel"][0], weights["model.language_model.layers.0.self_attn.q_proj.weight"].T
    )
    np.testing.assert_array_equal(
        found["projector.fc2.kernel"], weights["model.multi_modal_projector.linear_2.weight"].T
    )
    np.testing.assert_array_equal(found["image_newline"], weights["model.image_newline"])


REFUSED = {
    "use_dora": (True, r"use_dora = True is not supported, expected False"),
    "bias": ("all", r"bias = 'all' is not supported, expected 'none'"),
    "fan_in_fan_out": (True, r"fan_in_fan_out = True is not supported"),
    "init_lora_weights": ("pissa", r"init_lora_weights = 'pissa' is not supported"),
    "layer_replication": ([[0, 2]], r"layer_replication = \[\[0, 2\]\] is not supported"),
    "lora_bias": (True, r"lora_bias = True is not supported"),
    "trainable_token_indices": ([3], r"trainable_token_indices = \[3\] is not supported"),
    "target_parameters": (["w"], r"target_parameters = \['w'\] is not supported"),
    "peft_type": ("LOHA", r"peft_type = 'LOHA': only adapters of LoRA can be imported"),
    "r": (0, r"r and rank_pattern = \[0\]: expected positive integers"),
    "lora_alpha": ("8", r"lora_alpha = '8': expected a number"),
    "alpha_pattern": ({"q_proj": float("nan")}, r"lora_alpha and alpha_pattern = \[6, nan\]: expected finite numbers"),
    "modules_to_save": (["lm_head"], r"modules_to_save names 'lm_head', which the model has and the file lacks"),
    "layers_to_transform": ([0], r"layers\.1\.self_attn\.q_proj\.lora_A\.weight: target_modules and the other fields"),
    "exclude_modules": (["q_proj"], r"q_proj\.lora_A\.weight: target_modules and the other fields of its config leave"),
    "rank_pattern": ({"q_proj": 5}, r"q_proj: found .* expected A \(5, 24\) and B \(24, 5\)"),
    "nonsense": (1, r"the field 'nonsense' = 1 is not known"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_is_not_computed_is_refused_by_name(base, tmp_path, field):
    value, message = REFUSED[field]
    with pytest.raises(UserError, match=message):
        import_adapter(write_adapter(tmp_path / "adapter", **{field: value}), tmp_path / "merged", base)
    assert not (tmp_path / "merged").exists()


def test_every_field_of_peft_is_known():
    peft = pytest.importorskip("peft")
    fields = set(peft.LoraConfig(target_modules=["q_proj"]).to_dict())
    assert fields <= set(ADAPTER_TABLE.known)
    ADAPTER_TABLE.check({**peft.LoraConfig().to_dict(), "peft_type": "LORA"}, "the default")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n.replace("q_proj", "q_projj"): a for n, a in t.items()}, r"leave this module out"),
        (lambda t: {n.replace("layers.1.", "layers.7."): a for n, a in t.items()}, r"no linear layer of this name"),
        (lambda t: {n: a[:, :-1] if "q_proj.lora_A" in n else a for n, a in t.items()}, r"q_proj: found .*\(3, 23\)"),
        (lambda t: {n: a for n, a in t.items() if "q_proj.lora_B" not in n}, r"q_proj: found \{'A': \(3, 24\)\}"),
        (lambda t: {n: a * np.float32("nan") if "q_proj.lora_A" in n else a for n, a in t.items()}, r"holds NaN"),
        (
            lambda t: t | {f"module.{LANGUAGE}self_attn.q_proj.lora_A.weight": np.ones((3, 24), np.float32)},
            r"the file holds this matrix twice, also as ",
        ),
        (lambda t: {}, r"its weight file holds no tensor"),
        (
            lambda t: t | {f"{LANGUAGE}self_attn.q_proj.lora_magnitude_vector": np.ones(3, np.float32)},
            r"neither a matrix",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(base, tmp_path, change, message):
    adapter = write_adapter(tmp_path / "adapter", change(matrices()))
    with pytest.raises(UserError, match=message):
        import_adapter(adapter, tmp_path / "merged", base)


def test_an_update_that_float32_does_not_hold_is_refused(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", lora_alpha=1e300)
    with pytest.raises(UserError, match=r"multiplied with each other and with 3\.33333e\+299, are larger than float32"):
        import_adapter(adapter, tmp_path / "merged", base)
    assert not (tmp_path / "merged").exists()


def test_two_tensors_of_one_parameter_are_refused(base, tmp_path):
    """An adapter and a kernel in full for one module, of which the kernel would silently undo the adapter."""
    weight = {f"{LANGUAGE}self_attn.q_proj.weight": np.ones((24, 24), np.float32)}
    adapter = write_adapter(tmp_path / "adapter", matrices() | weight, modules_to_save=["q_proj"])
    with pytest.raises(UserError, match=r"q_proj: there is .*q_proj\.weight for it too"):
        import_adapter(adapter, tmp_path / "merged", base)


def test_the_order_of_the_names_does_not_tell_the_matrices_apart(base, tmp_path):
    """Names with and without the prefix of DistributedDataParallel, which sort B before A."""
    names = {name: f"module.{name}" if "lora_A" in name else name for name in matrices()}
    adapter = write_adapter(tmp_path / "adapter", {names[name]: array for name, array in matrices().items()})
    import_adapter(adapter, tmp_path / "merged", base)
    expected = expected_changes(dict.fromkeys(("q_proj", "down_proj", "fc1"), 2))
    for path, array in changes(tmp_path / "merged", base).items():
        np.testing.assert_allclose(array, expected[path], atol=1e-5, err_msg=path)


def test_an_adapter_is_no_base(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"--base .* is an adapter itself"):
        import_adapter(adapter, tmp_path / "merged", adapter)
