"""The options of Vision Remember; `model/refusion/vision_remember.py` is the block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vr_jax.model.registry import RefusionConfig, check, check_choice

if TYPE_CHECKING:
    from vr_jax.model.config import VlmConfig


@dataclass(frozen=True, kw_only=True)
class VisionRememberConfig(RefusionConfig):
    """Vision Remember (methods.md 5.4-5.9); each field with choices is one row of the ambiguity register 5.9."""

    name: str = "vision_remember"
    # What a vision token re-reads (paper, Table 5b): its window, its whole tile, or sampled points of its tile.
    interaction: Literal["local", "deformable", "global"] = "local"
    # The same function of local and global, plain is the reference; deformable has one form only.
    cross_attention: Literal["absorbed", "plain"] = "absorbed"
    # What computes the local interaction: docs/kernels.md. auto: the faster one for the platform and the shapes.
    kernel: Literal["auto", "reference", "pallas_tpu", "pallas_gpu"] = "auto"
    cross_heads: int | None = None  # None: one head per 128 channels, deformable: per 64
    points: int = 4  # deformable: per head and level
    self_attention: bool = True
    self_heads: int | None = None  # None: the decoder's query heads
    up: Literal["linear", "mlp"] = "linear"  # mlp: two layers up, out-projection straight to the decoder's width
    residual_gate: Literal["none", "tanh"] = "none"
    init: Literal["zero_out", "torch_default"] = "zero_out"
    feature_norm: Literal["per_level", "joint", "none"] = "per_level"
    order: Literal["cross_self", "self_cross"] = "cross_self"
    ffn_multiplier: int = 0  # 0: no feed-forward sub-layer
    self_scope: Literal["image", "tile"] = "image"
    newline_in_self: bool = False
    # Text that the text-guided token pools. all leaks the answers: tests only. all_human leaks them too where a sample has
    # several turns, as a later question has read the answers before it.
    text_pool: Literal["none", "first_turn", "all_human", "all"] = "first_turn"
    self_positions: Literal["none", "rope"] = "none"
    shared_weights: bool = False

    def __post_init__(self):
        owner = "VisionRememberConfig"
        for name, choices in {
            "interaction": ("local", "deformable", "global"),
            "cross_attention": ("absorbed", "plain"),
            "kernel": ("auto", "reference", "pallas_tpu", "pallas_gpu"),
            "up": ("linear", "mlp"),
            "residual_gate": ("none", "tanh"),
            "init": ("zero_out", "torch_default"),
            "feature_norm": ("per_level", "joint", "none"),
            "order": ("cross_self", "self_cross"),
            "self_scope": ("image", "tile"),
            "text_pool": ("none", "first_turn", "all_human", "all"),
            "self_positions": ("none", "rope"),
        }.items():
            check_choice(owner, name, getattr(self, name), choices)
        check(self.points >= 1, f"{owner}.points = {self.points}: expected an integer >= 1")
        super().__post_init__()

    @property
    def blocks(self) -> int:
        return 1 if self.shared_weights else len(self.insert_after)

    @property
    def pooled_text(self) -> str:
        return self.text_pool

    def heads(self, model: VlmConfig) -> tuple[int, int]:
        """Heads of the cross-attention and of the self-attention."""
        depth = 64 if self.interaction == "deformable" else 128
        return self.cross_heads or max(1, self.inner_width(model) // depth), self.self_heads or model.decoder.num_heads

    def check_model(self, model: VlmConfig) -> None:
        widths = self.inner_width(model), model.decoder.hidden_size
        for name, heads, width in zip(("cross_heads", "self_heads"), self.heads(model), widths, strict=True):
            check(width % heads == 0, f"refusion.{name} = {heads} does not divide the width {width}; set a divisor")
        check(
            self.init != "zero_out" or self.residual_gate == "none",
            "re-fusion block: residual_gate 'tanh' starts at zero; with init 'zero_out' no gradient would reach the block, "
            "use init 'torch_default'",
        )

    def flops_per_tile(self, model: VlmConfig) -> float:
        queries, patches, hidden = model.cells_per_tile, model.encoder.grid**2, model.decoder.hidden_size
        inner, (heads, _) = self.inner_width(model), self.heads(model)
        query = 2 * queries * (hidden * inner + inner**2)
        out = 2 * queries * (inner**2 + inner * hidden)
        if self.up == "mlp":
            query += 2 * queries * inner**2
            out = 2 * queries * inner * hidden
        seen = patches if self.interaction == "global" else model.projector.stride**2  # keys of a query
        if self.interaction == "deformable":
            samples = queries * heads * len(self.levels) * self.points
            # Values of all levels; three numbers for each sample (offset and weight); four corners of each.
            cross = 2 * len(self.levels) * patches * inner**2 + 6 * samples * inner + 8 * samples * inner // heads
            query -= 2 * queries * inner**2  # no query projection
        elif self.cross_attention == "plain":
            cross = 4 * patches * inner**2 + 4 * queries * seen * inner
        else:  # keys and values absorbed: two more products per query, raw features shared by all heads
            cross = 4 * queries * inner**2 + 4 * queries * seen * inner * heads
        self_attention = 8 * queries * hidden**2 if self.self_attention else 0
        block = query + cross + out + self_attention + 4 * queries * self.ffn_multiplier * hidden**2
        return len(self.insert_after) * block

    def inner_width(self, model: VlmConfig) -> int:
        """Width of the cross-attention: all levels side by side; the levels stay apart in the deformable one."""
        return model.encoder.hidden_size * (1 if self.interaction == "deformable" else len(self.levels))
