"""Input data: from files on disk to batches of static shape.

A `Source` gives conversations, a `Processor` turns a conversation into an `Example`, and `collate` puts examples into a
batch. Four modules are imported on their own, because what they need takes seconds to import: `vr_jax.data.pipeline`
has the training iterator and `vr_jax.data.finite` a finite one (Grain), `vr_jax.data.tfds_builder` writes prepared sets
(tensorflow_datasets), and `vr_jax.data.demo.tokenizer` makes the tokenizer of the demo (transformers).
"""

from vr_jax.data.collate import collate
from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipRecord, SkipStatistics, TooManySkips
from vr_jax.data.sources import Source, open_source
from vr_jax.data.types import Conversation, Example, HostBatch, Skip, Turn

__all__ = [
    "Conversation",
    "Example",
    "HostBatch",
    "Processor",
    "Skip",
    "SkipRecord",
    "SkipStatistics",
    "Source",
    "TooManySkips",
    "Turn",
    "collate",
    "open_source",
]
