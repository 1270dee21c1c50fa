"""Parameter counts of the paper's models (docs/design/methods.md#parameter-counts), without allocating them."""

import math

import jax
import pytest
import torch
from flax import nnx
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.qwen2_5_vl import model_config
from tests.tiny import abstract_projector
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.refusion.deepstack import DeepStackConfig
from vr_jax.model.refusion.sva import SvaConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model.registry import ProjectorConfig, RefusionConfig
from vr_jax.model.vlm import VisionLanguageModel, abstract_model

TEXTS = {
    "0.5B": TransformerConfig(),
    "1.5B": TransformerConfig(hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12),
    "7B": TransformerConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        tie_word_embeddings=False,
    ),
}


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree_util.tree_leaves(tree))


@pytest.fixture(scope="module", params=TEXTS)
def model(request):
    config = VlmConfig(decoder=TEXTS[request.param], refusion=VisionRememberConfig())
    return request.param, abstract_model(config)


def test_vision_tower(model):
    _, llava = model
    vision = llava.encoder
    assert count(vision) == pytest.approx(303.69e6, abs=5e3)  # 24 blocks, without the pooling head
    assert count(vision.stages) / 24 == pytest.approx(12.596e6, abs=5e2)
    assert count(vision) - count(vision.stages) / 24 == pytest.approx(291.09e6, abs=5e3)  # the official tower's 23


def test_decoder(model):
    name, llava = model
    decoder = llava.decoder
    total, layers = {"0.5B": (494.03, 357.90), "1.5B": (1543.7, 1310.3), "7B": (7615.6, 6525.6)}[name]
    tolerance = 0.005 if name == "0.5B" else 0.05
    assert count(decoder) == pytest.approx(total * 1e6, abs=tolerance * 1e6)
    assert count(decoder.stages) == pytest.approx(layers * 1e6, abs=tolerance * 1e6)
    assert hasattr(decoder, "lm_head") == (name == "7B")


def test_projector(model):
    name, llava = model
    millions = {"0.5B": 1.722, "1.5B": 3.935, "7B": 16.52}[name]
    assert count(llava.projector) == pytest.approx(millions * 1e6, abs=5e3 if name == "7B" else 5e2)


def test_vision_remember(model):
    name, llava = model
    blocks = llava.refusion.blocks
    assert len(blocks) == 2
    assert count(blocks) == pytest.approx({"0.5B": 93.0, "1.5B": 113.3, "7B": 222.4}[name] * 1e6, abs=5e4)
    if name == "0.5B":
        assert [count(block) for block in blocks] == [46_494_592, 46_494_592]


@pytest.mark.parametrize(
    ("changes", "per_block"),
    [
        # Tab. 5a "+Local": inner width 1024; 9.25M of another count hold a self-attention of 3.22M as well.
        ({"levels": (23,)}, pytest.approx(9.25e6, abs=1e4)),
        ({"shared_weights": True}, 46_494_592),
    ],
)
def test_vision_remember_variants(changes, per_block):
    config = VlmConfig(refusion=VisionRememberConfig(**changes))
    llava = abstract_model(config)
    blocks = llava.refusion.blocks
    assert len(blocks) == (1 if changes.get("shared_weights") else 2)
    assert count(blocks[0]) == per_block


def refusion_parts(config: RefusionConfig, text: str = "0.5B"):
    """The features' module and the blocks."""
    llava = nnx.eval_shape(
        lambda: VisionLanguageModel(VlmConfig(decoder=TEXTS[text], refusion=config), rngs=nnx.Rngs(0))
    )
    return llava.refusion.features, llava.refusion.blocks


# In millions (docs/design/methods.md#parameter-counts)
@pytest.mark.parametrize(("text", "per_layer"), [("0.5B", 9.19), ("1.5B", 10.50), ("7B", 14.70)])
def test_sva(text, per_layer):
    features, blocks = refusion_parts(SvaConfig(), text)
    assert count(features) == pytest.approx(2.10e6, abs=5e3)
    assert [count(block) for block in blocks] == [pytest.approx(per_layer * 1e6, abs=5e3)] * 2


def test_deepstack_with_the_pooled_merger():
    features, blocks = refusion_parts(DeepStackConfig())
    assert (count(features), len(blocks)) == (0, 3)
    assert count(blocks) == pytest.approx(5.17e6, abs=5e3)


@pytest.mark.parametrize(("text", "total"), [("0.5B", 279.7), ("1.5B", 297.4), ("7B", 354.0)])
def test_deepstack_with_the_published_merger(text, total):
    _, blocks = refusion_parts(DeepStackConfig(merger="qwen3_vl"), text)
    assert count(blocks) == pytest.approx(total * 1e6, abs=5e4)


def test_interactions():
    """Table 5b: global has the parameters of local; the deformable block is counted without its
    self-attention (3.2M)."""
    _, local = refusion_parts(VisionRememberConfig())
    _, tile = refusion_parts(VisionRememberConfig(interaction="global"))
    assert count(tile) == count(local)
    _, sampled = refusion_parts(VisionRememberConfig(interaction="deformable", self_attention=False))
    assert [count(block) for block in sampled] == [pytest.approx(4.5e6, abs=5e4)] * 2


def test_the_ladder_of_table_5a():
    """Each step adds its part: 9.25M for the first inner width (with the self-attention)."""
    one, three = {"levels": (23,)}, {"levels": (7, 15, 23)}
    steps = [
        one | {"self_attention": False},
        three | {"self_attention": False},
        three | {"text_pool": "none"},
        three | {"text_pool": "first_turn"},
    ]
    sizes = [count(refusion_parts(VisionRememberConfig(**step))[1][0]) for step in steps]
    self_attention = 4 * (896**2 + 896) + 2 * 896
    assert sizes[0] + self_attention == pytest.approx(9.25e6, abs=1e4)
    assert sizes[1:] == [46_494_592 - self_attention, 46_494_592, 46_494_592]


def test_the_uncompressed_projector_has_the_same_size():
    config = VlmConfig(projector=MlpConfig())
    assert count(abstract_model(config).projector) == pytest.approx(1.722e6, abs=5e2)


@pytest.mark.parametrize(
    ("projector", "millions"),
    [
        ({"name": "mlp", "stride": 1}, {"0.5B": 1.722, "1.5B": 3.935, "7B": 16.52}),
        ({"name": "pool", "stride": 3}, {"0.5B": 1.722, "1.5B": 3.935, "7B": 16.52}),
        ({"name": "ldpv2", "stride": 3}, {"0.5B": 1.731, "1.5B": 3.951, "7B": 16.56}),
        ({"name": "pixel_shuffle", "stride": 3}, {"0.5B": 9.081, "1.5B": 16.54, "7B": 45.90}),
        ({"name": "token_packer", "stride": 3}, {"0.5B": 17.47, "1.5B": 19.68, "7B": 32.27}),
        # Without its mlp2x.
        ({"name": "perceiver", "stride": 3}, {"0.5B": 31.54, "1.5B": 31.54, "7B": 31.54}),
    ],
    ids=lambda value: value.get("name"),
)
@pytest.mark.parametrize("text", TEXTS)
def test_projectors(projector, millions, text):
    tree = abstract_projector(VlmConfig(decoder=TEXTS[text], projector=ProjectorConfig.from_dict(projector)))
    counted = count(tree) - (count((tree.fc1, tree.fc2)) if projector["name"] == "perceiver" else 0)
    digits = 0.005 if millions[text] >= 9.5 else 0.0005  # half of the last one given
    assert counted == pytest.approx(millions[text] * 1e6, abs=1.01 * digits * 1e6)


# The sizes of the released models: the text part of `Qwen2_5_VLConfig`, and whether the head is tied.
QWEN2_5_VL = {
    "3B": ((2048, 11008, 36, 16, 2, 151936), True),
    "7B": ((3584, 18944, 28, 28, 4, 152064), False),
}


@pytest.mark.parametrize("name", QWEN2_5_VL)
def test_qwen2_5_vl(name: str):
    sizes, tied = QWEN2_5_VL[name]
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text = dict(zip((*fields, "vocab_size"), sizes, strict=True)) | {"rms_norm_eps": 1e-6}
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    rope = {"rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    with torch.device("meta"):
        theirs = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                vision_config=vision | {"out_hidden_size": text["hidden_size"]},
                text_config=text | {"rope_parameters": rope | {"rope_type": "default"}},
                tie_word_embeddings=tied,
            )
        )
    refusion = VisionRememberConfig(levels=(8, 16, 24))
    ours = abstract_model(model_config(vision, text | rope, tied=tied, refusion=refusion))
    visual, language = theirs.model.visual, theirs.model.language_model
    head = 0 if tied else theirs.lm_head.weight.numel()

    def count_torch(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    # Their patch embedding has a kernel for each of two equal frames.
    second_frame = 3 * 14**2 * 1280
    assert count(ours.encoder) == count_torch(visual) - count_torch(visual.merger) - second_frame
    assert count(ours.projector) == count_torch(visual.merger)
    assert count(ours.decoder) == count_torch(language) + head
    newline = count(ours.image_newline)  # It stands in every model of ours, and no token of this family is one.
    total = count(ours) - count(ours.refusion) - newline + second_frame
    assert total == sum(parameter.numel() for parameter in theirs.parameters())
    if name == "3B":
        assert [count(block) for block in ours.refusion.blocks] == [91_533_568] * 2
