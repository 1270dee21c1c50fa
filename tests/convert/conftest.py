"""Tiny random checkpoints, as transformers and LLaVA write them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from vr_jax.cli.main import main

torch = pytest.importorskip("torch", reason="tiny Hugging Face models are made with torch")
transformers = pytest.importorskip("transformers")

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
PINPOINTS = [[24, 48], [48, 24], [48, 48]]  # (height, width)


def llava_config(kind: str, **changes):
    config_class = {"onevision": transformers.LlavaOnevisionConfig, "next": transformers.LlavaNextConfig}[kind]
    return config_class(
        vision_config=transformers.SiglipVisionConfig(**VISION),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_index=39,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        **changes,
    )


def make(kind: str):
    """Makes a tiny torch model with random values everywhere, also in norms and biases."""
    from tests.torch_weights import randomize

    model = {
        "siglip_vision": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)),
        "siglip": lambda: transformers.SiglipModel(
            transformers.SiglipConfig(
                vision_config=VISION,
                text_config={**VISION, "vocab_size": 40, "bos_token_id": None, "eos_token_id": None},
            )
        ),
        "clip_vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)),
        "clip_projection": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)),
        "clip": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                vision_config=VISION,
                text_config={**VISION, "vocab_size": 40, "bos_token_id": None, "eos_token_id": 3},
            )
        ),
        "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT, head_dim=8)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, rms_norm_eps=1e-5)),
        "mistral": lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(**TEXT, sliding_window=None, head_dim=8)
        ),
        "qwen2_tied": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT, tie_word_embeddings=True)),
        "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)),
        "onevision": lambda: transformers.LlavaOnevisionForConditionalGeneration(llava_config("onevision")),
        "onevision_tied": lambda: transformers.LlavaOnevisionForConditionalGeneration(
            llava_config("onevision", tie_word_embeddings=True)
        ),
        "next": lambda: transformers.LlavaNextForConditionalGeneration(llava_config("next", vision_feature_layer=-2)),
    }[kind]()
    randomize(model)
    return model


@pytest.fixture(scope="session")
def hf_dirs(tmp_path_factory):
    """Returns a function from a kind to its torch model and the directory that transformers saves, made once each."""
    made: dict[str, tuple] = {}

    def get(kind: str):
        if kind not in made:
            directory = tmp_path_factory.mktemp("hf") / kind
            model = make(kind)
            model.save_pretrained(directory)
            (directory / "tokenizer_config.json").write_text("{}")
            made[kind] = model, directory
        return made[kind]

    return get


@pytest.fixture
def convert(capsys):
    """Returns a function that runs the command and returns its exit status, standard output and standard error."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["convert", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def converted(convert):
    """Returns a function that runs the command, expects success and returns standard output."""

    def run(*arguments) -> str:
        status, out, err = convert(*arguments)
        assert status == 0, err
        return out

    return run


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def write_checkpoint(directory: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, directory / "model.safetensors")
    return directory


def llava_layout(onevision) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns config.json and tensors of a OneVision model as LLaVA's own code writes them.

    LLaVA drops the last layer of the encoder.
    """
    weights = weights_of(onevision)
    tensors = {}
    last = f"encoder.layers.{VISION['num_hidden_layers'] - 1}."
    for name, tensor in weights.items():
        name = name.removeprefix("model.")
        if name.startswith("vision_tower.") and "head." not in name:
            inner = name.removeprefix("vision_tower.").removeprefix("vision_model.")
            if not inner.startswith(last):
                tensors[f"model.vision_tower.vision_tower.vision_model.{inner}"] = tensor
        elif name.startswith("language_model."):
            tensors["model." + name.removeprefix("language_model.").removeprefix("model.")] = tensor
        elif name.startswith("multi_modal_projector."):
            name = name.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
            tensors[name.replace("multi_modal_projector.linear_2", "model.mm_projector.2")] = tensor
        elif name == "image_newline":
            tensors["model.image_newline"] = tensor
        elif name == "lm_head.weight":
            tensors[name] = tensor
    config = {
        **{name: value for name, value in TEXT.items() if not name.endswith("token_id")},
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "mm_vision_tower": "google/siglip-tiny",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": "(1x1),...,(3x3)",
    }
    return config, tensors
