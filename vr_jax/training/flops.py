"""The floating-point operations that a model needs for a training step, for model FLOPs utilisation (docs/train.md).

Every matrix product of the parts that run counts, with two operations per multiply-add, at used positions only:
padding does not count, and attention is causal within samples. Recomputation by remat, normalisation and other
elementwise work do not count, and neither does the attention among vision tokens inside Vision Remember, which is below
1 % of the total.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax

from vr_jax.model.adaptation import ADAPTER
from vr_jax.model.config import VlmConfig

# The dense bfloat16 peak of one JAX device in FLOP/s, by a prefix of `device_kind`. The longest match counts.
# The numbers are those of cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, 7x) and NVIDIA's data sheets, without sparsity.
PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # one of the two cores of a chip
    "NVIDIA A100": 312e12,
    "NVIDIA H20": 148e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Returns the peak of a device in FLOP/s, or None where it is not known."""
    known = [kind for kind in PEAK_FLOPS if (device.device_kind + " ").startswith(kind + " ")]
    return PEAK_FLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """The operations of a training step, forward and backward, per unit of work.

    Attributes:
        per_tile: For an image tile: encoder, projector and re-fusion blocks.
        per_token: For a token: the decoder's linear layers.
        per_pair: For a query and a key that it sees: the decoder's attention.
        per_target: For a token with a loss: the vocabulary projection.
    """

    per_tile: float
    per_token: float
    per_pair: float
    per_target: float

    def total(self, *, tiles: float, tokens: float, pairs: float, targets: float) -> float:
        """Returns the operations of a step with the given numbers of units."""
        return self.per_tile * tiles + self.per_token * tokens + self.per_pair * pairs + self.per_target * targets


def forward_flops(config: VlmConfig) -> dict[str, float]:
    """Returns the operations of the forward pass by part.

    The values at the paper's sizes are in docs/design/methods.md#flops.

    Args:
        config: The model.

    Returns:
        `encoder`, `projector` and `refusion` for a tile, `decoder` for a token, `attention` for a query and a key that
        it sees, `head` for a token with a loss.
    """
    return {
        "encoder": config.encoder.flops_per_tile(max(config.feature_levels)),
        "projector": config.projector.flops_per_tile(config.spec),
        "refusion": config.refusion.flops_per_tile(config.spec) if config.refusion else 0.0,
        "decoder": config.decoder.flops_per_token(),
        "attention": config.decoder.flops_per_pair(),
        "head": 2 * config.decoder.hidden_size * config.decoder.vocab_size,
    }


def step_flops(config: VlmConfig, trainable: Iterable[str]) -> StepFlops:
    """Returns the operations of a training step per unit of work.

    In units of its forward pass, a linear layer costs 1, another 1 for the gradient of its input where anything before
    it is trained, and another 1 for the gradient of its weights where they are trained. A product of attention has no
    weights and costs 1 forward and 2 backward. An adapter counts as something that is trained; its own two products,
    some per cent of those of its layer, do not count, and neither does dequantisation.

    Args:
        config: The model.
        trainable: The paths of the trained parameters.
    """
    trainable = list(trainable)

    def trains(*prefixes: str) -> bool:
        return any(path.startswith(prefix) for path in trainable for prefix in prefixes)

    inputs = trains("encoder.", "projector.", "image_newline", "decoder.embed.", "refusion.")
    layers = trains("decoder.stages.")
    in_full = [path for path in trainable if not path.endswith(ADAPTER)]

    def weights(*parts: str) -> bool:
        return any(path.startswith(parts) for path in in_full)

    head = trains("decoder.embed." if config.decoder.tie_word_embeddings else "decoder.lm_head.")
    forward = forward_flops(config)
    encoder = 1 + trains("encoder.") + weights("encoder.")
    decoder = 1 + (inputs or layers) + weights("decoder.stages.")
    return StepFlops(
        per_tile=encoder * forward["encoder"]
        + (1 + trains("projector.", "encoder.") + weights("projector.", "encoder.")) * forward["projector"]
        + (1 + inputs + weights("refusion.")) * forward["refusion"],
        per_token=decoder * forward["decoder"],
        per_pair=(3 if inputs or layers else 1) * forward["attention"],
        per_target=(1 + (inputs or layers) + head) * forward["head"],
    )
