"""What both sides of benchmarks/speed/training_step.py share: the model, its weights, the samples of one update."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from vr_jax import experiments
from vr_jax.model.config import VlmConfig, anyres9
from vr_jax.model.decoders.qwen2 import Qwen2Config
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.parameters import flatten_params, merge_stages
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.vlm import VisionLanguageModel

LEARNING_RATE, CLIP = 1e-4, 1.0
COMPARED = 3  # updates whose losses are compared
TRAINABLE = ("decoder.*", "projector.*")  # phase 2, without the newline vector, which has no token here


@dataclass(frozen=True)
class Work:
    """`rows` packed rows of `per_row` equally long samples: text, the cells of an image's tiles, text, of which the
    last `targets` tokens are learnt. micro_batch: samples that torch takes at a time, as LLaVA's scripts accumulate."""

    config: VlmConfig
    rows: int
    per_row: int
    sample_tokens: int
    sample_tiles: int
    targets: int
    micro_batch: int

    @property
    def samples(self) -> int:
        return self.rows * self.per_row

    @property
    def cells(self) -> int:
        return self.sample_tiles * self.config.cells_per_tile

    @property
    def before(self) -> int:
        """Text tokens in front of the image."""
        return (self.sample_tokens - self.cells) // 2

    def tokens(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        return rng.integers(0, self.config.decoder.vocab_size, (self.samples, self.sample_tokens), np.int32)

    def pixels(self) -> np.ndarray:
        side = self.config.image.tile_size
        rng = np.random.default_rng(1)
        return rng.integers(0, 256, (self.samples, self.sample_tiles, side, side, 3), np.uint8)


def work(size: str, dtype: str, remat: str = "full") -> Work:
    """size: a key of experiments.DECODERS, in about the shapes of its recipe's phase 2, or "tiny"."""
    if size == "tiny":
        config = VlmConfig(
            encoder=SiglipConfig(
                hidden_size=32, intermediate_size=64, num_layers=3, num_heads=2, image_size=48, patch_size=8
            ),
            decoder=Qwen2Config(
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
    return Work(dataclasses.replace(config, dtype=dtype, remat=remat), **sizes)  # type: ignore[arg-type]


def weights(config: VlmConfig) -> dict[str, np.ndarray]:
    """float32 parameters by merged path (vr_jax/model/parameters.py), each drawn from its path, so that two processes
    have     the same."""
    model = nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0)))
    drawn = {}
    for path, leaf in jax.eval_shape(lambda model: merge_stages(flatten_params(model)), model).items():
        if path.endswith("scale"):
            drawn[path] = np.ones(leaf.shape, np.float32)
        else:
            # Uniform, because normal numbers take ten times as long to draw; of deviation 0.02.
            drawn[path] = np.random.default_rng(zlib.crc32(path.encode())).random(leaf.shape, np.float32)
            drawn[path] -= 0.5
            drawn[path] *= 0.02 * 12**0.5
    return drawn
