"""Converts checkpoints of Hugging Face and of LLaVA to model directories and back (docs/convert.md).

The formats are described by data: `architectures` tells how a format is recognised, `configs` translates its
config.json, and `tables` and `method_tables` name its tensors. `importing` and `exporting` follow these descriptions.
"""

from vr_jax.convert.adapter_export import write_adapter
from vr_jax.convert.adapter_import import import_adapter
from vr_jax.convert.exporting import SHARD_BYTES, export_checkpoint
from vr_jax.convert.importing import import_checkpoint

__all__ = ["SHARD_BYTES", "export_checkpoint", "import_adapter", "import_checkpoint", "write_adapter"]
