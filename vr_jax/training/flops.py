"""Floating-point operations the model needs for a training step, and model FLOPs utilisation (docs/train.md).

Counted: every matrix product of the parts that run, two operations per multiply-add, at used positions only (no
padding, causal attention within samples). Not counted: recomputation by remat, normalisation and other elementwise
work, the attention among vision tokens inside Vision Remember (below 1 % of the total)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax

from vr_jax.model.config import VlmConfig

# Dense bfloat16 peaks in FLOP/s of one JAX device, by a prefix of `device_kind`; the longest match counts.
# Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, 7x) and NVIDIA's data sheets, without sparsity.
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
    """Peak of one device in FLOP/s, or None where it is not known (then utilisation is not reported)."""
    known = [kind for kind in PEAK_FLOPS if (device.device_kind + " ").startswith(kind + " ")]
    return PEAK_FLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Operations of one training step (forward and backward) per unit of work."""

    per_tile: float  # encoder, projector, re-fusion blocks
    per_token: float  # the decoder's linear layers
    per_pair: float  # attention, per query and visible key
    per_target: float  # the vocabulary projection

    def total(self, *, tiles: float, tokens: float, pairs: float, targets: float) -> float:
        return self.per_tile * tiles + self.per_token * tokens + self.per_pair * pairs + self.per_target * targets


def forward_flops(config: VlmConfig) -> dict[str, float]:
    """Operations of the forward pass: `encoder`, `projector`, `refusion` per tile, `decoder` per token, `attention`
    per visible pair, `head` per target. Reference values: methods.md 9.2."""
    return {
        "encoder": config.encoder.flops_per_tile(max(config.feature_levels)),
        "projector": config.projector.flops_per_tile(config.spec),
        "refusion": config.refusion.flops_per_tile(config.spec) if config.refusion else 0.0,
        "decoder": config.decoder.flops_per_token(),
        "attention": config.decoder.flops_per_pair(),
        "head": 2 * config.decoder.hidden_size * config.decoder.vocab_size,
    }


def step_flops(config: VlmConfig, trainable: Iterable[str]) -> StepFlops:
    """Forward and backward operations, for the parameter paths in `trainable`.

    A linear layer costs 1 forward, 1 for the gradient of its input where anything before it is trained, and 1 for the
    gradient of its weights where they are trained. Attention products have no weights: 1 forward, 2 backward."""
    trainable = list(trainable)

    def trains(*prefixes: str) -> bool:
        return any(path.startswith(prefix) for path in trainable for prefix in prefixes)

    inputs = trains("encoder.", "projector.", "image_newline", "decoder.embed.", "refusion.")
    layers = trains("decoder.stages.")
    head = trains("decoder.embed." if config.decoder.tie_word_embeddings else "decoder.lm_head.")
    forward = forward_flops(config)
    encoder = 3 if trains("encoder.") else 1
    decoder = 1 + (inputs or layers) + layers
    return StepFlops(
        per_tile=encoder * forward["encoder"]
        + (3 if trains("projector.") else encoder) * forward["projector"]
        + (1 + inputs + trains("refusion.")) * forward["refusion"],
        per_token=decoder * forward["decoder"],
        per_pair=(3 if inputs or layers else 1) * forward["attention"],
        per_target=(1 + (inputs or layers) + head) * forward["head"],
    )
