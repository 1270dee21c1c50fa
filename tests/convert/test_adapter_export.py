"""The adapter that a run writes: peft loads it onto the exported base and computes what our model computes."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.convert.conftest import torch, transformers
from vr_jax import sharding
from vr_jax.convert import import_adapter, import_checkpoint
from vr_jax.model.decoders.stages import DecoderInputs
from vr_jax.model_directory import load_model, load_params, read_config
from vr_jax.settings import TrainConfig
from vr_jax.training.adapters import export_adapter
from vr_jax.training.export import export_state
from vr_jax.training.program import build_program
from vr_jax.training.state import create_state

TARGETS = ("decoder.*", "encoder.*")


@pytest.fixture(scope="module")
def run(hf_dirs, tmp_path_factory):
    """The base as transformers and as we keep it, and the folder of a run with random adapters and projector."""
    _, theirs = hf_dirs("onevision")
    folder = tmp_path_factory.mktemp("run")
    import_checkpoint(theirs, folder / "base")
    model = dataclasses.replace(read_config(folder / "base"), dtype="float32")
    config = TrainConfig(model=model).replace(
        {
            **{"lora.rank": 4, "lora.alpha": 6.0, "lora.targets": TARGETS, "lora.rslora": True},
            **{
                "trainable": ("projector.*", "decoder.norm.*"),
                "frozen_dtype": "float32",
                "init_from": str(folder / "base"),
            },
        }
    )
    program = build_program(config, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]), 10)
    state = create_state(program.tree, program.optimizer, program.abstract, load_model(folder / "base", config=model))
    rng = np.random.default_rng(0)
    params = {
        path: array + rng.normal(size=array.shape).astype(np.float32) * 0.1 for path, array in state.params.items()
    }
    state = dataclasses.replace(state, params=params)
    export_state(folder, program.tree, state, None, config=config)
    return theirs, folder, config, state


def test_the_files_say_what_was_trained(run):
    _, folder, _, _ = run
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 6.0, True)
    assert config["modules_to_save"] == [
        "model.language_model.norm",
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    ]
    assert "model.language_model.layers.2.mlp.gate_proj" in config["target_modules"]
    assert "model.vision_tower.encoder.layers.0.self_attn.out_proj" in config["target_modules"]
    assert len(config["target_modules"]) == 3 * 7 + 3 * 6
    assert config["base_model_name_or_path"] == str(folder / "base")


def test_our_import_of_it_is_the_exported_model(run, tmp_path):
    _, folder, _, _ = run
    import_adapter(folder / "adapter", tmp_path / "merged", folder / "base")
    found, expected = load_params(tmp_path / "merged"), load_params(folder / "model")
    for path, array in expected.items():
        np.testing.assert_allclose(found[path], array, atol=1e-6, err_msg=path)


def test_what_stands_beside_a_trained_parameter_is_written_as_it_is_quantised(run, tmp_path):
    """PEFT keeps whole modules, so that a trained bias takes the frozen kernel of its layer along."""
    _, folder, config, _ = run
    changed = config.replace(
        {
            **{"lora.targets": ("decoder.*.mlp.*",), "trainable": ("decoder.*.attn.q.bias",)},
            **{"frozen_dtype": "int8"},
        }
    )
    program = build_program(changed, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]), 10)
    base = load_model(folder / "base", config=config.model)
    state = create_state(program.tree, program.optimizer, program.abstract, base)
    export_adapter(tmp_path / "adapter", changed, program.tree, state)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
    stem = "decoder.stages.0.attn.q"
    codes, scales = (state.frozen[f"{stem}.kernel_{end}"] for end in ("codes", "scale"))
    np.testing.assert_array_equal(found[f"{name}.weight"], (np.float32(codes) * np.asarray(scales))[1].T)
    np.testing.assert_array_equal(found[f"{name}.bias"], state.params[f"{stem}.bias"][1])


@pytest.mark.slow  # imports peft, and runs three models of transformers
def test_peft_computes_what_the_exported_model_computes(run, converted, tmp_path):
    """Text alone against our own logits; text and an image against transformers with the exported, merged model."""
    peft = pytest.importorskip("peft")
    theirs, folder, config, _ = run
    kind = transformers.LlavaOnevisionForConditionalGeneration
    adapted = peft.PeftModel.from_pretrained(kind.from_pretrained(theirs), str(folder / "adapter")).eval()
    converted("export", f"--from={folder / 'model'}", f"--to={tmp_path / 'merged'}")
    merged = kind.from_pretrained(tmp_path / "merged").eval()
    plain = kind.from_pretrained(theirs).eval()

    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 38, (1, 12))
    with torch.no_grad():
        found = adapted(input_ids=torch.tensor(tokens)).logits.numpy()
    ours = load_model(folder / "model", config=config.model)
    hidden = ours.decoder.embed(tokens)
    inputs = DecoderInputs(
        hidden=hidden, positions=np.arange(12)[None], segment_ids=np.ones((1, 12), np.int32), grid_positions=None
    )
    np.testing.assert_allclose(found, ours.logits(ours.decoder(inputs)[0]), atol=2e-4)

    image = {"pixel_values": torch.tensor(rng.normal(size=(1, 3, 3, 24, 24)), dtype=torch.float32)}
    image["image_sizes"] = torch.tensor([[48, 24]])
    with torch.no_grad():
        count = len(plain.model.get_image_features(**image).pooler_output[0])
        prompt = torch.tensor([[1, *[39] * count, *rng.integers(0, 38, 6)]])
        logits = [one(input_ids=prompt, **image).logits.numpy() for one in (adapted, merged, plain)]
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-4)
    assert np.abs(logits[0] - logits[2]).max() > 0.1
