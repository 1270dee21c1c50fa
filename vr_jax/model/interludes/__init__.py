"""What acts on the hidden states between two decoder stages.

To add one: a config class in `model/config.py`, and a module in this folder with
`prepare(config, levels) -> features` (run once per forward pass) and a block class
`Block(config, model_config, *, dtype, rngs)`, `__call__(stream, vision) -> stream`; then its name in INTERLUDES."""

from vr_jax.model.interludes import vision_remember

INTERLUDES = {"vision_remember": vision_remember}
