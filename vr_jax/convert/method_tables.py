"""Rules for projectors and re-fusion blocks, with the tensor names of the official code of each (see `tables`)."""

from __future__ import annotations

from vr_jax.convert.tables import (
    TRANSPOSE,
    Rule,
    Table,
    Transform,
    linear,
    mlp_projector,
    norm,
    packed_attention,
    prefixed,
)

# A depthwise kernel is (channels, 1, 3, 3) in torch and (3, 3, 1, channels) here. A 1 x 1 convolution is a matrix here.
DEPTHWISE = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
POINTWISE = Transform(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
LEADING_ONE = Transform(lambda x: x[0], lambda x: x[None])


def _pointwise(theirs: str, ours: str, *, bias: bool = False) -> Table:
    """The rules of a 1 x 1 convolution."""
    kernel = Rule(f"{theirs}.weight", (f"{ours}.kernel",), POINTWISE)
    return (kernel, Rule(f"{theirs}.bias", (f"{ours}.bias",))) if bias else (kernel,)


def _bottleneck(theirs: str, ours: str) -> Table:
    """The rules of timm:models/regnet.py Bottleneck."""
    return (
        *_pointwise(f"{theirs}.conv1.conv", f"{ours}.fc1"),
        *norm(f"{theirs}.conv1.bn", f"{ours}.norm1"),
        Rule(f"{theirs}.conv2.conv.weight", (f"{ours}.conv.kernel",), DEPTHWISE),
        *norm(f"{theirs}.conv2.bn", f"{ours}.norm2"),
        *_pointwise(f"{theirs}.se.fc1", f"{ours}.se.fc1", bias=True),
        *_pointwise(f"{theirs}.se.fc2", f"{ours}.se.fc2", bias=True),
        *_pointwise(f"{theirs}.conv3.conv", f"{ours}.fc2"),
        *norm(f"{theirs}.conv3.bn", f"{ours}.norm3"),
    )


_PERCEIVER = "vision_resampler.perceiver"
_LAYER = f"{_PERCEIVER}.layers.{{n}}"
# By projector, with the names that its official code gives them. The file of each projector names that code.
PROJECTORS: dict[str, Table] = {
    "c_abstractor": (
        Rule("pos_emb", ("projector.position_embedding",), LEADING_ONE),
        *_bottleneck("net.0.b{i}", "projector.before.b{i}"),
        *_bottleneck("net.2.b{i}", "projector.after.b{i}"),
        *mlp_projector("readout.0", "readout.2"),
    ),
    "ldpv2": (
        *mlp_projector("mlp.mlp.0", "mlp.mlp.2"),
        Rule("peg.peg.0.weight", ("projector.conv.kernel",), DEPTHWISE),
        Rule("peg.peg.0.bias", ("projector.conv.bias",)),
    ),
    "merger": (*norm("ln_q", "projector.norm", bias=False), *mlp_projector("mlp.0", "mlp.2")),
    "mlp": mlp_projector("0", "2"),
    "perceiver": (
        Rule(f"{_PERCEIVER}.latents", ("projector.latents",)),
        *norm(f"{_LAYER}.0.norm_media", "projector.layers.ln_media"),
        *norm(f"{_LAYER}.0.norm_latents", "projector.layers.ln_latents"),
        *linear(f"{_LAYER}.0.to_q", "projector.layers.attn.q", bias=False),
        Rule(
            f"{_LAYER}.0.to_kv.weight",
            ("projector.layers.attn.k.kernel", "projector.layers.attn.v.kernel"),
            TRANSPOSE,
        ),
        *linear(f"{_LAYER}.0.to_out", "projector.layers.attn.out", bias=False),
        *norm(f"{_LAYER}.1.0", "projector.layers.norm"),
        *linear(f"{_LAYER}.1.1", "projector.layers.fc1", bias=False),
        *linear(f"{_LAYER}.1.3", "projector.layers.fc2", bias=False),
        *norm(f"{_PERCEIVER}.norm", "projector.norm"),
        *mlp_projector("mm_projector.0", "mm_projector.2"),
    ),
    "pixel_shuffle": (*norm("mlp1.0", "projector.norm"), *mlp_projector("mlp1.1", "mlp1.3")),
    "pool": mlp_projector("mlp_projector.0", "mlp_projector.2"),
    "resampler": (  # `pos_embed` of the official code is a constant, which is computed here
        Rule("query", ("projector.query",)),
        *linear("kv_proj", "projector.kv_proj", bias=False),
        *norm("ln_q", "projector.ln_q"),
        *norm("ln_kv", "projector.ln_kv"),
        *packed_attention("attn", "projector.attn"),
        *norm("ln_post", "projector.ln_post"),
        Rule("proj", ("projector.proj.kernel",)),
    ),
    "token_packer": (
        *linear("q_proj_1", "projector.q_proj", bias=False),
        *norm("ln_q_1", "projector.ln_q"),
        *linear("k_proj_1.0", "projector.keys.fc1"),
        *linear("k_proj_1.2", "projector.keys.fc2"),
        *norm("ln_k_1", "projector.keys.norm"),
        *linear("v_proj_1.0", "projector.values.fc1"),
        *linear("v_proj_1.2", "projector.values.fc2"),
        *norm("ln_v_1", "projector.values.norm"),
        *packed_attention("clip_attn", "projector.attn"),
        *mlp_projector("mlp.0", "mlp.2"),
    ),
}
# By projector, with the names in a whole model of LLaVA's layout. They are those of an official fork of LLaVA if any.
LLAVA_PROJECTORS: dict[str, Table] = {
    **{name: prefixed("model.mm_projector.", table) for name, table in PROJECTORS.items()},
    "perceiver": prefixed("model.", PROJECTORS["perceiver"]),
    "pool": prefixed("model.mm_projector.", PROJECTORS["mlp"]),
}

_BLOCK = "refusion.blocks.{i}"

# The names of Qwen3VLVisionPatchMerger in transformers 5.23; the pooled merger takes the same ones.
DEEPSTACK: Table = (
    *norm("deepstack_merger_list.{i}.norm", f"{_BLOCK}.merger.norm"),
    *linear("deepstack_merger_list.{i}.linear_fc1", f"{_BLOCK}.merger.fc1"),
    *linear("deepstack_merger_list.{i}.linear_fc2", f"{_BLOCK}.merger.fc2"),
)

_SAMPLER = "vision_sampler_layers.{i}.layers.{n}"
# The names of cambrian:model/multimodal_projector/vision_sampler.py and cambrian_arch.py, with one encoder.
SVA: Table = (
    *linear("mm_projector_aux_0.0", "refusion.features.fc1"),
    *linear("mm_projector_aux_0.2", "refusion.features.fc2"),
    *norm("mm_projector_aux_0.3", "refusion.features.norm"),
    *linear(f"{_SAMPLER}.proj_context", f"{_BLOCK}.layers.proj_context", bias=False),
    *linear(f"{_SAMPLER}.proj_in", f"{_BLOCK}.layers.proj_in", bias=False),
    Rule(f"{_SAMPLER}.pos_embed_0", (f"{_BLOCK}.layers.pos_embed",)),
    *norm(f"{_SAMPLER}.cross_attn.q_proj.0", f"{_BLOCK}.layers.cross_attn.ln_q"),
    *linear(f"{_SAMPLER}.cross_attn.q_proj.1", f"{_BLOCK}.layers.cross_attn.q", bias=False),
    *norm(f"{_SAMPLER}.cross_attn.k_proj_0.0", f"{_BLOCK}.layers.cross_attn.ln_k"),
    *linear(f"{_SAMPLER}.cross_attn.k_proj_0.1", f"{_BLOCK}.layers.cross_attn.k", bias=False),
    *norm(f"{_SAMPLER}.cross_attn.v_proj_0.0", f"{_BLOCK}.layers.cross_attn.ln_v"),
    *linear(f"{_SAMPLER}.cross_attn.v_proj_0.1", f"{_BLOCK}.layers.cross_attn.v", bias=False),
    *linear(f"{_SAMPLER}.cross_attn.o_proj", f"{_BLOCK}.layers.cross_attn.out", bias=False),
    *norm(f"{_SAMPLER}.norm", f"{_BLOCK}.layers.norm"),
    *linear(f"{_SAMPLER}.proj_out.linear_1", f"{_BLOCK}.layers.fc1", bias=False),
    *linear(f"{_SAMPLER}.proj_out.linear_2", f"{_BLOCK}.layers.fc2", bias=False),
)
