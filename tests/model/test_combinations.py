"""Every encoder, projector, re-fusion block and kind of decoder together: a model runs, or its config says why not."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import pytest

from tests.model.families import family_batch, family_config
from tests.tiny import tiny_config, tiny_decoder, tiny_encoder, tiny_projector, tiny_refusion
from vr_jax.errors import ConfigError
from vr_jax.model import registry
from vr_jax.model.config import VlmConfig
from vr_jax.model.encoders.clip import ClipConfig
from vr_jax.model.refusion.deepstack import DeepStackConfig
from vr_jax.model.refusion.sva import SvaConfig
from vr_jax.model.vlm import abstract_model

ENCODERS = {
    "siglip": lambda **changes: tiny_config(encoder=tiny_encoder(num_layers=3), **changes),
    "clip": lambda **changes: tiny_config(
        encoder=ClipConfig(
            hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, image_size=24, patch_size=4
        ),
        **changes,
    ),
    "qwen2_5_vision": functools.partial(family_config, "qwen2_5_vl"),
    "siglip_slices": functools.partial(family_config, "minicpm_v"),
}
# The family whose batches each encoder reads.
FAMILY = {"siglip": "llava", "clip": "llava", "qwen2_5_vision": "qwen2_5_vl", "siglip_slices": "minicpm_v"}
LEVELS = {"insert_after": (1,), "levels": (1, 2)}
REFUSIONS = {
    "none": lambda: None,
    "vision_remember": lambda: tiny_refusion(**LEVELS, cross_heads=2),
    "vision_remember, plain": lambda: tiny_refusion(**LEVELS, cross_heads=2, cross_attention="plain"),
    "vision_remember, global": lambda: tiny_refusion(**LEVELS, cross_heads=2, interaction="global"),
    "vision_remember, deformable": lambda: tiny_refusion(**LEVELS, cross_heads=2, interaction="deformable"),
    "deepstack": lambda: DeepStackConfig(insert_after=(1,), levels=(2,)),
    "deepstack, patch merger": lambda: DeepStackConfig(insert_after=(1,), levels=(2,), merger="qwen3_vl"),
    "sva": lambda: SvaConfig(insert_after=(1,), levels=(2,), width=16, heads=4),
}
SMALL = {"num_layers": 2, "hidden_size": 32}
DECODERS = {
    "qwen2": lambda: tiny_decoder(**SMALL),
    "qwen3": lambda: tiny_decoder(**SMALL, query_key_norm=True, attention_bias=False, head_width=12),
    "llama": lambda: tiny_decoder(**SMALL, attention_bias=False, tie_word_embeddings=False),
    "minicpm": lambda: tiny_decoder(
        **SMALL, attention_bias=False, embedding_scale=3.0, residual_scale=0.7, logit_scale=0.5
    ),
    "several axes": lambda: tiny_decoder(**SMALL, rope_sections=(1, 2, 1)),
}
PROJECTORS = registry.names("projector")
# The refusals of the layouts that are no full squares: a whole message, with the names in the place of (...).
REASONS = (
    r"projector '\w+' with the encoder '(qwen2_5_vision|siglip_slices)': it reads tiles of the layout "
    r"'square'( or '\w+')?, and the encoder gives '(windows'; set projector\.name to one of 'merger', 'mlp', "
    r"'pixel_shuffle', 'pool'|raster'; set projector\.name to one of 'resampler')",
    r"refusion 'sva' with the encoder '(qwen2_5_vision|siglip_slices)': it reads tiles of the layout 'square', and the "
    r"encoder gives '(windows|raster)'; set refusion\.name to one of 'deepstack', 'vision_remember'",
    r"refusion\.interaction = '(global|deformable)': it reads whole tiles, and those of the layout '(windows|raster)' "
    r"hold places without a patch; set it to 'local'",
    r"refusion\.merger = 'qwen3_vl' with an encoder of the layout 'raster': it joins the patches of a window, and the "
    r"windows of slices have no common size; set it to 'pool_mlp'",
)
# What runs with the encoders whose tiles are no full squares.
WINDOWS = {"merger", "mlp", "pixel_shuffle", "pool"}
BLOCKS = {"none", "vision_remember", "vision_remember, plain", "deepstack", "deepstack, patch merger"}


def config_of(encoder: str, projector: str, refusion: str, decoder: str) -> VlmConfig:
    """A tiny model of four parts by their names."""
    part = tiny_projector(projector)
    if (encoder, projector) == ("siglip_slices", "resampler"):
        part = family_config("minicpm_v").projector  # It has queries of its own, as slices have no cells.
    return ENCODERS[encoder](projector=part, refusion=REFUSIONS[refusion](), decoder=DECODERS[decoder]())


def run_shapes(encoder: str, config: VlmConfig) -> None:
    """Traces a model on a packed batch of its encoder's family, and checks the shape of the logits."""
    batch = family_batch(FAMILY[encoder], config)
    logits = jax.eval_shape(lambda model, batch: model.logits(model(batch)[0]), abstract_model(config), batch)
    assert logits.shape == (*batch.tokens.shape, config.decoder.vocab_size)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_combination_is_a_model_or_is_refused_in_one_line_with_its_reason(encoder: str):
    """No combination ends in another error, and those with square tiles are all models."""
    models, refusals = set(), set()
    for parts in itertools.product(PROJECTORS, REFUSIONS, DECODERS):
        try:
            config_of(encoder, *parts)
            models.add(parts)
        except ConfigError as error:
            refusals.add(str(error))
    unknown = [text for text in refusals if not any(re.fullmatch(reason, text) for reason in REASONS)]
    assert not unknown
    runs = {
        "qwen2_5_vision": (WINDOWS, BLOCKS, DECODERS),
        "siglip_slices": ({"resampler"}, BLOCKS - {"deepstack, patch merger"}, DECODERS),
    }
    assert models == set(itertools.product(*runs.get(encoder, (PROJECTORS, REFUSIONS, DECODERS))))


# A forward pass is traced for each of 72, 20 and 4 models.
@pytest.mark.slow
@pytest.mark.parametrize("encoders", [("siglip", "clip"), ("qwen2_5_vision",), ("siglip_slices",)], ids=" or ".join)
def test_every_model_has_a_forward_pass(encoders: tuple[str, ...]):
    """The encoders of one layout and the kinds of decoders take turns with the projectors and blocks."""
    parts = zip(
        itertools.cycle(encoders), itertools.product(PROJECTORS, REFUSIONS), itertools.cycle(DECODERS), strict=False
    )
    for encoder, (projector, refusion), decoder in parts:
        try:
            config = config_of(encoder, projector, refusion, decoder)
        except ConfigError:
            continue
        run_shapes(encoder, config)


# A forward pass is traced for each kind of decoder.
@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_runs_with_every_decoder(encoder: str):
    projector = "resampler" if encoder == "siglip_slices" else "pool"
    for decoder in DECODERS:
        run_shapes(encoder, config_of(encoder, projector, "vision_remember", decoder))
