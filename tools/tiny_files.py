"""Tiny files under the names that the pages use, in place of what a reader would have downloaded, and tiny settings.

The models have the classes and the depth that the config files of the paper expect, and widths that two CPU cores
compute in no time. The images and texts are those of the demo.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 24,  # the paper's levels are 7, 15 and 23
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
DECODER = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,  # the last insertion is after layer 4
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},  # as Qwen2 is released
}
# What makes the models of the paper's configs as small as these checkpoints.
TINY_MODEL = {
    "model.encoder.hidden_size": 32,
    "model.encoder.intermediate_size": 64,
    "model.encoder.num_heads": 2,
    "model.encoder.image_size": 24,
    "model.encoder.patch_size": 4,
    "model.image.tile_size": 24,
    "model.decoder.vocab_size": 512,
    "model.decoder.hidden_size": 32,
    "model.decoder.intermediate_size": 64,
    "model.decoder.num_layers": 5,
    "model.decoder.num_heads": 4,
    "model.decoder.num_kv_heads": 2,
    "batch.rows": 8,
    "batch.tokens": 512,
    "batch.tiles": 12,
}
TINY = TINY_MODEL | {"steps": 2, "data.workers": 0}  # and their runs as short


def flags_of(fields: Mapping[str, object]) -> tuple[str, ...]:
    """The flags of a command that set fields of its config."""
    return tuple(f"--config.{field}={value}" for field, value in fields.items())


def write_models(root: Path) -> None:
    """Writes SigLIP, Qwen2 and LLaVA-OneVision in the format of Hugging Face below `root/models`."""
    import transformers

    from vr_jax.data.demo.tokenizer import demo_tokenizer

    vision, text = transformers.SiglipVisionConfig(**ENCODER), transformers.Qwen2Config(**DECODER)
    onevision = transformers.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=511,
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
        vision_feature_select_strategy="full",
    )
    for name, model in {
        "siglip-large-patch16-384": transformers.SiglipVisionModel(vision),
        "Qwen2-0.5B-Instruct": transformers.Qwen2ForCausalLM(text),
        "llava-onevision-qwen2-0.5b-ov-hf": transformers.LlavaOnevisionForConditionalGeneration(onevision),
    }.items():
        model.save_pretrained(root / "models" / name)
        if "siglip" not in name:
            demo_tokenizer().save_pretrained(root / "models" / name)


def write_data(root: Path) -> None:
    """Writes LLaVA's two training sets below `root/data`, with twenty images, and two images of ChartQA."""
    from vr_jax.data.demo.export import write_chartqa, write_llava
    from vr_jax.data.demo.source import DemoSource

    (root / "data").mkdir()
    write_llava(DemoSource("train", 20, turns=1), root / "llava")
    (root / "llava" / "images").rename(root / "data" / "images")
    records = json.loads((root / "llava" / "data.json").read_text())
    (root / "data" / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(records))
    for record in records:
        record["image"] = f"images/{record['image']}"
    (root / "data" / "llava_next.json").write_text(json.dumps(records))
    write_chartqa(DemoSource("held_out", 2), root / "data" / "ChartQA")


def write_checkpoints(root: Path) -> None:
    """Writes the model directories of a LLaVA-VR and of its baseline, with random parameters, below `root/runs`."""
    import jax
    import numpy as np

    from vr_jax.data.demo.tokenizer import demo_tokenizer
    from vr_jax.model.config import ImageConfig, VlmConfig
    from vr_jax.model.decoders.transformer import TransformerConfig
    from vr_jax.model.encoders.siglip import SiglipConfig
    from vr_jax.model.projectors.pool import PoolConfig
    from vr_jax.model.refusion.vision_remember import VisionRememberConfig
    from vr_jax.model.vlm import abstract_model
    from vr_jax.model_directory import save_model
    from vr_jax.sharding import path_of

    tokenizer = root / "tokenizer"
    demo_tokenizer().save_pretrained(tokenizer)
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.Array) -> np.ndarray:
        noise = rng.normal(size=leaf.shape) * 0.3
        return np.asarray(1 + noise if path_of(path).endswith("scale") else noise, np.float32)

    for name, refusion in {
        "llava_vr": VisionRememberConfig(insert_after=(1, 2), levels=(1, 2, 3), cross_heads=2),
        "baseline": None,
    }.items():
        config = VlmConfig(
            encoder=SiglipConfig(
                hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, image_size=36, patch_size=4
            ),
            decoder=TransformerConfig(
                vocab_size=512, hidden_size=24, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2
            ),
            projector=PoolConfig(stride=3),
            refusion=refusion,
            image=ImageConfig(tile_size=36, aspect_ratio="anyres_max", grids=((1, 2), (2, 1), (2, 2))),
            vision_feature_layer=3,
        )
        model = jax.tree_util.tree_map_with_path(draw, abstract_model(config))
        save_model(root / "runs" / name / "model", model, tokenizer)
