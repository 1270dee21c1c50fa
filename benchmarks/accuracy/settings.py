"""The sizes of a comparison.

`cpu` takes hours on two cores, `h200` is for one NVIDIA H200, and `toy` takes seconds and is for the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from benchmarks.accuracy.tasks import VOCABULARY
from vr_jax.data.demo.pages import Page
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The length of a training and its learning rate.

    Attributes:
        steps: Updates.
        batch: Images of an update.
        learning_rate: The highest rate of AdamW. The rate warms up linearly over a twentieth of the steps and then
            falls to zero along a cosine.
        muon: Whether Muon updates the kernels, at ten times the rate. The attention that finds patches then forms in
            half the steps.
    """

    steps: int
    batch: int
    learning_rate: float
    muon: bool = False


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All sizes of a comparison.

    Attributes:
        name: Name of the setting.
        page: Size of the images.
        vision: The encoder.
        text: The decoder.
        levels: This encoder's hidden state for each of the paper's; the last one feeds the projectors.
        cross_heads: Heads of Vision Remember's cross-attention.
        insertions: This decoder's insertion layer for each of the paper's, where it is shallower than 24 layers. Rows
            that insert after every third layer then insert after every layer.
        images: Training images, the same for all stages.
        held_out: Held-out images, with contents that never occur in training.
        variants: Rows of questions for each image.
        encoder: Schedule of the encoder.
        alignment: Schedule of the uncompressed model's first stage (see `reader`).
        focus: Schedule of its second stage.
        focus_patches: Patches in a row of the second stage.
        reading: Schedule of its third stage.
        late_arrival: Layers without the image, in half of the rows of the third stage.
        system_alignment: Schedule of every other system's projector alone.
        system: Schedule of everything but the encoder, afterwards.
        dtype: Type of the activations.
    """

    name: str
    page: Page
    vision: SiglipConfig
    text: TransformerConfig
    levels: Mapping[int, int]
    cross_heads: int
    insertions: Mapping[int, int] | None = None
    images: int
    held_out: int
    variants: int
    encoder: Schedule
    alignment: Schedule
    focus: Schedule
    focus_patches: int
    reading: Schedule
    late_arrival: int
    system_alignment: Schedule
    system: Schedule
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def kept_levels(self) -> tuple[int, ...]:
        """The encoder's hidden states that are cached, from shallow to deep."""
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
            text=TransformerConfig(
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
            text=TransformerConfig(vocab_size=len(VOCABULARY)),  # Qwen2-0.5B but for the vocabulary
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
            text=TransformerConfig(
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
