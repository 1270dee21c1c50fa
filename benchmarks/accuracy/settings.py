"""The sizes of a comparison: `cpu` (two cores, hours), `h200` (one NVIDIA H200), `toy` (seconds, for the test)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from benchmarks.accuracy.tasks import VOCABULARY, Page
from vr_jax.model.decoders.qwen2 import Qwen2Config
from vr_jax.model.encoders.siglip import SiglipConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    steps: int
    batch: int  # images
    learning_rate: float  # AdamW's peak; linear warm-up over a twentieth of the steps, then cosine to zero
    muon: bool = False  # kernels by Muon at ten times the rate: finds the look-up circuits in half the steps


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str
    page: Page
    vision: SiglipConfig
    text: Qwen2Config
    levels: Mapping[int, int]  # the paper's encoder hidden states -> this encoder's; the last one feeds the projectors
    cross_heads: int  # of Vision Remember
    # The paper's insertion layers, of 24 -> this decoder's, where it is shallower; every third layer becomes every one.
    insertions: Mapping[int, int] | None = None
    images: int  # training images, the same for all stages
    held_out: int  # images, of contents that never occur in training
    variants: int  # rows of questions per image
    encoder: Schedule
    alignment: Schedule  # of the uncompressed model, see `reader`
    focus: Schedule
    focus_patches: int
    reading: Schedule
    late_arrival: int  # layers without the image in half of the reader's last stage
    system_alignment: Schedule  # of every other system: its projector alone, then everything but the encoder
    system: Schedule
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def kept_levels(self) -> tuple[int, ...]:
        """Encoder hidden states that are cached, shallow to deep."""
        return tuple(sorted(set(self.levels.values())))


def _vision(page: Page, width: int, layers: int, heads: int) -> SiglipConfig:
    return SiglipConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=layers,
        num_heads=heads,
        image_size=page.side,
        patch_size=page.patch,
    )


_CPU_PAGE = Page(grid=12, patch=8)
_H200_PAGE = Page(grid=24, patch=16)
_TOY_PAGE = Page(grid=12, patch=8)

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            name="cpu",
            page=_CPU_PAGE,
            vision=_vision(_CPU_PAGE, 64, 4, 4),
            # A third of Qwen2-0.5B's depth: insertions after layers 1, 4 and 7 of 24 are after 1, 2 and 3 here.
            text=Qwen2Config(
                vocab_size=len(VOCABULARY),
                hidden_size=64,
                intermediate_size=160,
                num_layers=8,
                num_heads=2,  # content is matched in 32 channels each, of which a large theta leaves most unturned
                num_kv_heads=2,
                rope_theta=1e6,
                initializer_range=0.1,
            ),
            levels={7: 2, 12: 1, 15: 3, 16: 2, 22: 3, 23: 4},
            cross_heads=8,
            insertions={1: 1, 4: 2, 7: 3},
            images=20_000,
            held_out=1_000,
            variants=4,
            encoder=Schedule(steps=800, batch=64, learning_rate=3e-3),
            alignment=Schedule(steps=600, batch=32, learning_rate=3e-3, muon=True),
            focus=Schedule(steps=400, batch=64, learning_rate=3e-3, muon=True),
            focus_patches=16,
            reading=Schedule(steps=400, batch=48, learning_rate=2e-3, muon=True),
            late_arrival=2,
            system_alignment=Schedule(steps=300, batch=32, learning_rate=3e-3, muon=True),
            system=Schedule(steps=300, batch=32, learning_rate=1e-3, muon=True),
        ),
        Setting(
            name="h200",
            page=_H200_PAGE,
            vision=_vision(_H200_PAGE, 384, 12, 6),
            text=Qwen2Config(vocab_size=len(VOCABULARY)),  # Qwen2-0.5B but for the vocabulary
            levels={7: 4, 12: 6, 15: 8, 16: 9, 22: 11, 23: 12},
            cross_heads=24,
            images=40_000,
            held_out=2_000,
            variants=4,
            encoder=Schedule(steps=4_000, batch=128, learning_rate=5e-4),
            alignment=Schedule(steps=400, batch=128, learning_rate=5e-4),
            focus=Schedule(steps=2_000, batch=128, learning_rate=5e-4, muon=True),
            focus_patches=24,
            reading=Schedule(steps=3_000, batch=128, learning_rate=5e-4, muon=True),
            late_arrival=2,
            system_alignment=Schedule(steps=400, batch=128, learning_rate=5e-4, muon=True),
            system=Schedule(steps=2_000, batch=64, learning_rate=2e-4),
            dtype="bfloat16",
        ),
        Setting(
            name="toy",
            page=_TOY_PAGE,
            vision=_vision(_TOY_PAGE, 16, 4, 2),
            text=Qwen2Config(
                vocab_size=len(VOCABULARY),
                hidden_size=16,
                intermediate_size=32,
                num_layers=8,
                num_heads=2,
                num_kv_heads=1,
                initializer_range=0.1,
            ),
            levels={7: 2, 12: 1, 15: 3, 16: 2, 22: 3, 23: 4},
            cross_heads=4,
            insertions={1: 1, 4: 2, 7: 3},
            images=20,
            held_out=10,
            variants=1,
            encoder=Schedule(steps=2, batch=5, learning_rate=1e-3),
            alignment=Schedule(steps=2, batch=5, learning_rate=1e-3),
            focus=Schedule(steps=2, batch=5, learning_rate=1e-3, muon=True),
            focus_patches=10,
            reading=Schedule(steps=2, batch=4, learning_rate=1e-3, muon=True),
            late_arrival=2,
            system_alignment=Schedule(steps=2, batch=5, learning_rate=1e-3),
            system=Schedule(steps=2, batch=5, learning_rate=1e-3),
        ),
    )
}
