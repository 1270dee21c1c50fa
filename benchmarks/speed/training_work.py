"""The model, its weights and the samples of one update, which both sides of `benchmarks.speed.training_step` share."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass

import jax
import numpy as np

from vr_jax import experiments
from vr_jax.model.config import VlmConfig, anyres9
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.parameters import flatten_params, merge_stages
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.vlm import abstract_model

LEARNING_RATE, CLIP = 1e-4, 1.0
COMPARED = 3  # Updates whose losses are compared.
TRAINABLE = ("decoder.*", "projector.*")  # As in phase 2, without the newline vector, which has no token here.


@dataclass(frozen=True)
class Work:
    """The model and the samples of one update.

    A sample is text, the cells of an image's tiles, and text again.

    Attributes:
        config: The model.
        rows: Packed rows.
        per_row: Samples of a row.
        sample_tokens: Tokens of a sample; all samples are equally long.
        sample_tiles: Tiles of a sample.
        targets: Tokens at the end of a sample that are learned.
        micro_batch: Samples that torch processes at a time, because LLaVA's scripts accumulate gradients.
    """

    config: VlmConfig
    rows: int
    per_row: int
    sample_tokens: int
    sample_tiles: int
    targets: int
    micro_batch: int

    @property
    def samples(self) -> int:
        """Samples of an update."""
        return self.rows * self.per_row

    @property
    def cells(self) -> int:
        """Vision tokens of a sample."""
        return self.sample_tiles * self.config.cells_per_tile

    @property
    def before(self) -> int:
        """Text tokens before the image."""
        return (self.sample_tokens - self.cells) // 2

    def tokens(self) -> np.ndarray:
        """Random tokens of all samples; those at the place of the image are ignored."""
        rng = np.random.default_rng(0)
        return rng.integers(0, self.config.decoder.vocab_size, (self.samples, self.sample_tokens), np.int32)

    def pixels(self) -> np.ndarray:
        """Random tiles of all samples."""
        side = self.config.image.tile_size
        rng = np.random.default_rng(1)
        return rng.integers(0, 256, (self.samples, self.sample_tiles, side, side, 3), np.uint8)


def work(size: str, dtype: str, remat: str = "full") -> Work:
    """The work of an update.

    Args:
        size: A decoder of `experiments.DECODERS`, with about the shapes of its config file's phase 2; or "tiny".
        dtype: Type of the activations.
        remat: What vr_jax recomputes in the backward pass.
    """
    if size == "tiny":
        config = VlmConfig(
            encoder=SiglipConfig(
                hidden_size=32, intermediate_size=64, num_layers=3, num_heads=2, image_size=48, patch_size=8
            ),
            decoder=TransformerConfig(
                vocab_size=256, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2
            ),
            projector=PoolConfig(stride=3),
            vision_feature_layer=2,
            image=anyres9(48),
        )
        sizes = {"rows": 2, "per_row": 2, "sample_tokens": 24, "sample_tiles": 2, "targets": 6, "micro_batch": 2}
    else:
        config = experiments.BASELINE.config(experiments.DECODERS[size], "anyres9")
        sizes = {"rows": 8, "per_row": 4, "sample_tokens": 512, "sample_tiles": 5, "targets": 64, "micro_batch": 8}
    return Work(dataclasses.replace(config, dtype=dtype, remat=remat), **sizes)  # type: ignore[arg-type]  # VlmConfig checks both.


def weights(config: VlmConfig) -> dict[str, np.ndarray]:
    """Random float32 parameters by merged path (`vr_jax.model.parameters`).

    Each is drawn from a seed that depends on its path, so that two processes have the same.
    """
    model = abstract_model(config)
    drawn = {}
    for path, leaf in jax.eval_shape(lambda model: merge_stages(flatten_params(model)), model).items():
        if path.endswith("scale"):
            drawn[path] = np.ones(leaf.shape, np.float32)
        else:
            # They are uniform with a standard deviation of 0.02, because normal numbers take ten times as long to draw.
            drawn[path] = np.random.default_rng(zlib.crc32(path.encode())).random(leaf.shape, np.float32)
            drawn[path] -= 0.5
            drawn[path] *= 0.02 * 12**0.5
    return drawn
