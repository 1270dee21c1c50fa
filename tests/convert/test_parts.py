"""Encoders and decoders alone, through files: what is computed is what transformers computes, both ways."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert.conftest import TEXT, VISION, torch, transformers
from tests.tiny import quick
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.stages import DecoderInputs
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.registry import DecoderConfig, EncoderConfig
from vr_jax.model_directory import read_sections, warm_start

PROMPT, NEW_TOKENS = (5, 9, 2, 30, 17, 3), 16
SIDE = VISION["image_size"]


def started(directory):
    """A model whose encoder and decoder are those of a directory of parts."""
    sections = read_sections(directory)
    image = {**sections["pixels"], "tile_size": SIDE, "aspect_ratio": "square", "unpad": False}
    config = VlmConfig(
        encoder=EncoderConfig.from_dict(sections["encoder"]),
        decoder=DecoderConfig.from_dict(sections["decoder"]),
        projector=MlpConfig(),
        image=ImageConfig.from_dict(image),
        vision_feature_layer=2,
    )
    return warm_start([directory], config)[0]


@jax.jit
def logits_of(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    inputs = DecoderInputs(hidden=model.decoder.embed(tokens), positions=positions, segment_ids=jnp.ones_like(tokens))
    return model.logits(model.decoder(inputs)[0])


def greedy(model) -> tuple[np.ndarray, list[int]]:
    """Logits of the prompt, and a greedy reply; later tokens do not act on earlier ones."""
    tokens = np.zeros((1, len(PROMPT) + NEW_TOKENS), np.int32)
    tokens[0, : len(PROMPT)] = PROMPT
    first = None
    for place in range(len(PROMPT), tokens.shape[1]):
        logits = np.asarray(logits_of(model, tokens))
        first = logits[0, : len(PROMPT)] if first is None else first
        tokens[0, place] = logits[0, place - 1].argmax()
    return first, tokens[0, len(PROMPT) :].tolist()


def replied(model) -> tuple[np.ndarray, list[int]]:
    """What transformers computes."""
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return logits, output[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("kind", quick(["qwen3", "llama", "mistral"], "qwen3"))
def test_clip_and_a_decoder_in_one_directory(kind, hf_dirs, tmp_path, converted):
    clip, text = hf_dirs("clip"), hf_dirs(kind)
    out = converted("import", "--encoder", clip[1], "--decoder", text[1], "--to", tmp_path / "parts")
    assert "CLIP, " in out
    assert "(CLIP's text tower)" in out
    assert "ignored on purpose: 2 tensors (CLIP's projections; LLaVA takes hidden states)" in out
    model = started(tmp_path / "parts")
    assert model.config.encoder.name == "clip"
    assert model.config.image.image_mean == (0.48145466, 0.4578275, 0.40821073)

    expected, reply = replied(text[0].eval())
    logits, tokens = greedy(model)
    assert np.abs(logits - expected).max() <= 2e-4
    assert tokens == reply
    assert len(set(reply)) > 2

    pixels = np.random.default_rng(0).integers(0, 256, (1, 1, SIDE, SIDE, 3), dtype=np.uint8)
    image = model.config.image
    scale, shift = (np.asarray(one, np.float32) for one in (image.pixel_scale, image.pixel_shift))
    values = torch.from_numpy((pixels[0] * scale - shift).transpose(0, 3, 1, 2))
    with torch.no_grad():
        states = clip[0].eval().vision_model(values, output_hidden_states=True).hidden_states
    (found,) = jax.jit(lambda model, pixels: model.encoder(pixels, (2,)))(model, pixels)
    assert np.abs(np.asarray(found)[0, 0, :, 0] - states[2][0, 1:].numpy()).max() <= 2e-5


@pytest.mark.parametrize("kind", quick(["qwen3", "llama", "mistral"], "mistral"))
def test_transformers_computes_the_same_with_an_exported_decoder(kind, hf_dirs, tmp_path, converted):
    model, source = hf_dirs(kind)
    converted("import", "--from", source, "--to", tmp_path / "ours")
    converted("export", "--from", tmp_path / "ours", "--to", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    (expected, reply), (logits, tokens) = replied(model.eval()), replied(again)
    np.testing.assert_array_equal(logits, expected)
    assert tokens == reply


def test_a_clip_has_the_processor_of_its_family(hf_dirs, tmp_path, converted):
    """That of openai/clip-vit-large-patch14-336, with numbers for sizes and the older name of its class."""
    source = tmp_path / "clip"
    shutil.copytree(hf_dirs("clip")[1], source)
    file = {
        "crop_size": SIDE,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
        "resample": 3,
        "size": SIDE,
    }
    (source / "preprocessor_config.json").write_text(json.dumps(file))
    converted("import", "--from", source, "--to", tmp_path / "ours")
    assert read_sections(tmp_path / "ours")["pixels"]["image_mean"] == [0.4, 0.5, 0.6]
    converted("export", "--from", tmp_path / "ours", "--to", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (written["image_processor_type"], written["size"]) == ("CLIPImageProcessor", {"shortest_edge": SIDE})
    assert (written["do_center_crop"], written["crop_size"]) == (True, {"height": SIDE, "width": SIDE})
    assert written["image_mean"] == [0.4, 0.5, 0.6]


def test_siglip_2_of_a_fixed_size_is_a_siglip(hf_dirs, tmp_path, converted):
    """The fields that google/siglip2-base-patch16-224 has: no sizes of the vision tower but those that differ."""
    source = tmp_path / "siglip2"
    shutil.copytree(hf_dirs("siglip")[1], source)
    config = json.loads((source / "config.json").read_text())
    config["text_config"] |= {"vocab_size": 256000, "projection_size": 768}
    (source / "config.json").write_text(json.dumps(config))
    processor = {
        "do_convert_rgb": None,
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "SiglipProcessor",
        "resample": 2,
        "size": {"height": SIDE, "width": SIDE},
    }
    (source / "preprocessor_config.json").write_text(json.dumps(processor))
    converted("import", "--from", source, "--to", tmp_path / "ours")
    sections = read_sections(tmp_path / "ours")
    assert sections["encoder"]["name"] == "siglip"
    assert sections["pixels"]["resample"] == "bilinear"


# What is refused by name, as a change of config.json and the message.
REFUSED = [
    ("mistral", {"sliding_window": 16}, "sliding_window = 16, which acts up to max_position_embeddings = 131072"),
    ("mistral", {"sliding_window": ...}, "sliding_window is absent, and its class takes 4096"),
    ("llama", {"attention_bias": True}, "attention_bias = True is not supported, expected False"),
    ("llama", {"mlp_bias": True}, "mlp_bias = True is not supported, expected False"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        "rope type 'llama3' is not supported, expected 'default'",
    ),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window = True is not supported, expected False"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "has 'sliding_attention'"),
    ("clip_vision", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported, expected 'quick_gelu' or 'gelu'"),
    ("clip_vision", {"num_channels": 1}, "num_channels = 1 is not supported, expected 3"),
    (
        "siglip_vision",
        {"architectures": ["Siglip2VisionModel"], "model_type": "siglip2_vision_model"},
        "this is a NaFlex SigLIP 2, which takes images of any shape; the ones of a fixed size are SiglipModel",
    ),
]


@pytest.mark.parametrize(("kind", "change", "message"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(kind, change, message, hf_dirs, tmp_path, convert):
    source = tmp_path / "hf"
    shutil.copytree(hf_dirs(kind)[1], source)
    values = json.loads((source / "config.json").read_text()) | change
    values = {name: value for name, value in values.items() if value is not ...}
    if "rope_scaling" in change:
        values.pop("rope_parameters", None)
    (source / "config.json").write_text(json.dumps(values))
    status, _, err = convert("import", "--from", source, "--to", tmp_path / "out")
    assert status == 2
    assert message in err
    assert f"{source / 'config.json'}" in err
    assert err.count("\n") == 1


def test_a_window_that_reaches_every_position_is_none(hf_dirs, tmp_path, converted):
    source = tmp_path / "hf"
    shutil.copytree(hf_dirs("mistral")[1], source)
    values = json.loads((source / "config.json").read_text())
    values |= {"sliding_window": 4096, "max_position_embeddings": 4096}
    (source / "config.json").write_text(json.dumps(values))
    converted("import", "--from", source, "--to", tmp_path / "out")
    decoder = read_sections(tmp_path / "out")["decoder"]
    assert (decoder["head_width"], decoder["num_kv_heads"]) == (8, TEXT["num_key_value_heads"])


def test_the_end_of_a_reply_is_that_of_the_class_where_no_file_says_it(hf_dirs, tmp_path, converted):
    """An absent field stands for Llama's </s>; null stands for none."""
    for values, expected in (({}, [2]), ({"eos_token_id": None}, None)):
        source, target = tmp_path / f"hf{len(values)}", tmp_path / f"out{len(values)}"
        shutil.copytree(hf_dirs("llama")[1], source)
        (source / "generation_config.json").unlink(missing_ok=True)
        config = json.loads((source / "config.json").read_text())
        config.pop("eos_token_id", None)
        (source / "config.json").write_text(json.dumps(config | values))
        converted("import", "--from", source, "--to", target)
        file = target / "generation_config.json"
        found = json.loads(file.read_text())["eos_token_id"] if file.exists() else None
        assert found == (expected[0] if expected else None)
