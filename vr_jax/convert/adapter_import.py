"""Merges an adapter of PEFT or LLaVA into its base, and writes the model directory of the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vr_jax.convert.adapters import ADAPTER_FILES, Adapter, formats_of, is_adapter
from vr_jax.convert.exporting import choose_format
from vr_jax.convert.importing import import_checkpoint
from vr_jax.errors import UserError
from vr_jax.model_directory import FORMAT, load_params, read_json, read_sections, save_params
from vr_jax.storage import PathLike, as_path, check_target

logger = logging.getLogger("vr_jax.convert")


def import_adapter(
    source: PathLike,
    target: PathLike,
    base: PathLike,
    *,
    encoder: PathLike | None = None,
    dtype: str | None = None,
    ignore: Sequence[str] = (),
    overwrite: bool = False,
    report: Callable[[str], None] = logger.info,
) -> None:
    """Writes the model directory of a base with an adapter merged into it.

    The base is a model directory, or a checkpoint of any known format. What LLaVA writes after training with LoRA
    completes a language model, which is then the base, and an encoder.

    Args:
        source: The folder of the adapter.
        target: The model directory, which appears only when it is complete.
        base: The model that the adapter was trained on.
        encoder: The directory of an encoder that neither of the two holds.
        dtype: Type of the stored parameters, "float32" or "bfloat16"; None keeps those of the base.
        ignore: Names of fields and files of the folders that are left out of consideration.
        overwrite: Whether an existing directory is replaced.
        report: Receives lines about what was merged.

    Raises:
        UserError: A folder cannot be read, the adapter does not fit the base, or the target cannot be written.
    """
    check_target(as_path(target), overwrite=overwrite)
    if is_adapter(base):
        raise UserError(f"--base {base} is an adapter itself: give the model that it was trained on")
    adapter = Adapter(source, ignore)

    def merge(params: dict[str, np.ndarray], sections: Mapping[str, Any], *, with_full: bool = True) -> None:
        architecture, _ = choose_format(sections, as_path(base))
        adapter.merge(params, sections, formats_of(architecture), report, with_full=with_full)

    if _is_model_directory(base):
        if encoder is not None:
            raise UserError(f"--base {base} is a model directory, which holds its encoder; leave --encoder out")
        sections = read_sections(base)
        params = {path: np.array(array, jnp.dtype(dtype or array.dtype)) for path, array in load_params(base).items()}
        merge(params, sections)
        device = jax.local_devices(backend="cpu")[0]
        arrays = {path: jax.device_put(params.pop(path), device) for path in list(params)}
        save_params(target, sections, arrays, base, overwrite=overwrite)
        report(f"{target}: {sum(array.size for array in arrays.values()):,} parameters")
        return
    files = [name for name in ADAPTER_FILES if (as_path(source) / name).exists()]
    completes = adapter.whole and adapter.in_full is not None
    import_checkpoint(
        source if completes else base,
        target,
        encoder=encoder,
        decoder=base if completes else None,
        dtype=dtype,
        ignore=[*(name for name in ignore if name not in adapter.ignored), *(files if completes else ())],
        overwrite=overwrite,
        report=report,
        change=lambda params, sections: merge(params, sections, with_full=not completes),
    )


def _is_model_directory(base: PathLike) -> bool:
    path = as_path(base) / "config.json"
    return path.is_file() and read_json(path).get("format") == FORMAT
