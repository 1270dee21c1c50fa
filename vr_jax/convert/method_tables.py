"""Names of the official code of every projector and interlude but Vision Remember; see `tables.py`."""

from __future__ import annotations

from vr_jax.convert.tables import Rule, Table, linear, norm

_BLOCK = "decoder.interludes.{i}"

# Qwen3-VL in transformers 5.23 (`Qwen3VLVisionPatchMerger`); the pooled merger takes the same names.
DEEPSTACK: Table = (
    *norm("deepstack_merger_list.{i}.norm", f"{_BLOCK}.merger.norm"),
    *linear("deepstack_merger_list.{i}.linear_fc1", f"{_BLOCK}.merger.fc1"),
    *linear("deepstack_merger_list.{i}.linear_fc2", f"{_BLOCK}.merger.fc2"),
)

_SAMPLER = "vision_sampler_layers.{i}.layers.{n}"
# cambrian `vision_sampler.py`, `cambrian_arch.py`, with one encoder.
SVA: Table = (
    *linear("mm_projector_aux_0.0", "decoder.interlude_features.fc1"),
    *linear("mm_projector_aux_0.2", "decoder.interlude_features.fc2"),
    *norm("mm_projector_aux_0.3", "decoder.interlude_features.norm"),
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
