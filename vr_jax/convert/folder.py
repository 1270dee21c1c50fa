"""A foreign checkpoint folder, read as one thing: what each of its files says belongs together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vr_jax.convert.weights import Checkpoint
from vr_jax.errors import UserError
from vr_jax.fields import shown
from vr_jax.model_directory import FORMAT, GENERATION_FILE, is_there, kept_fields, read_json
from vr_jax.storage import Path

CONFIG_FILE = "config.json"
IMAGE_PROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class JsonFile:
    """A JSON object of the folder.

    Attributes:
        values: Its fields, without those that are to be ignored.
        where: What messages call it: the path of its file, and the field that holds it where that is a part of it.
    """

    values: Mapping[str, Any]
    where: str

    def section(self, name: str) -> JsonFile:
        """Returns the object that a field holds; an absent one has no fields.

        Raises:
            UserError: The field holds something else.
        """
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f"{self.where}: {name} = {shown(value)}: expected an object")
        return JsonFile(value or {}, f"{self.where}: {name}")


@dataclass(frozen=True)
class ForeignFolder:
    """The files of a checkpoint folder of transformers or LLaVA.

    Attributes:
        directory: The folder.
        config: config.json.
        image_processor: What transformers would make the image processor of: `image_processor` in processor_config.json
            if that holds it, else preprocessor_config.json, or None.
        processor: processor_config.json, or None.
        generation: generation_config.json, or None.
        checkpoint: The weight files that transformers would take.
        ignored: Names of fields and files that are there and are left out of consideration, because the user said so.
    """

    directory: Path
    config: JsonFile
    image_processor: JsonFile | None
    processor: JsonFile | None
    generation: JsonFile | None
    checkpoint: Checkpoint
    ignored: frozenset[str]


def read_folder(directory: Path, ignored: Collection[str] = ()) -> ForeignFolder:
    """Reads the files of a folder, and the headers of its weight files.

    Args:
        directory: The folder.
        ignored: Names of fields and files that are left out of consideration.

    Raises:
        UserError: A file is missing or damaged, the weights are quantised, or there is an adapter beside them.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a folder of a checkpoint")
    found: set[str] = set()
    _check_one_model(directory)
    config = JsonFile(_without(read_json(directory / CONFIG_FILE), ignored, found), str(directory / CONFIG_FILE))
    if config.values.get("format") == FORMAT:
        raise UserError(f"{directory} is a model directory of vr_jax already; it needs no import")
    _check_quantised(config.values, config.where)
    for name in _ADAPTER_FILES:
        if not (directory / name).exists():
            continue
        found.add(name)
        if name not in ignored:
            raise UserError(
                f"{directory / name} is an adapter, which transformers adds to the weights; give the model that it was "
                f"trained on with --base, or leave it out with `--ignore={name}`"
            )

    def optional(name: str) -> JsonFile | None:
        path = directory / name
        return JsonFile(_without(read_json(path), ignored, found), str(path)) if is_there(path) else None

    processor = optional(PROCESSOR_FILE)
    nested = processor is not None and processor.values.get("image_processor") is not None
    image_processor = processor.section("image_processor") if processor and nested else optional(IMAGE_PROCESSOR_FILE)
    generation = optional(GENERATION_FILE)
    return ForeignFolder(
        directory=directory,
        config=config,
        image_processor=image_processor,
        processor=processor,
        generation=generation,
        checkpoint=Checkpoint(directory),
        ignored=frozenset(found.intersection(ignored)),
    )


def _check_quantised(values: Mapping[str, Any], where: str) -> None:
    """Raises UserError if a config.json, or a section of it, says that the weights are quantised."""
    places = {where: values, **{f"{where}: {name}": one for name, one in values.items() if isinstance(one, Mapping)}}
    for place, fields in places.items():
        found = fields.get("quantization_config")
        if found is not None:
            raise UserError(
                f"{place}: quantization_config = {shown(found)} is not supported: quantised weights are not read; take "
                "the checkpoint in float32, float16 or bfloat16 that these were made of"
            )


def _check_one_model(directory: Path) -> None:
    """Raises UserError for a folder that holds the folders of models in place of the files of one."""
    if is_there(directory / CONFIG_FILE):
        return
    inside = sorted(path.name for path in directory.iterdir() if (path / CONFIG_FILE).exists())
    if inside:
        raise UserError(
            f"{directory / CONFIG_FILE} is missing, but {len(inside)} of its folders have one: {', '.join(inside)}; "
            f"give one of them, e.g. {directory / inside[0]}"
        )
    raise UserError(f"{directory / CONFIG_FILE} is missing; give the folder of a checkpoint, which holds this file")


def _without(values: Mapping[str, Any], ignored: Collection[str], found: set[str]) -> dict[str, Any]:
    """The fields of an object and of the objects in it that are not to be ignored; `found` receives all names."""
    found.update(values)
    return {
        name: _without(value, ignored, found) if isinstance(value, Mapping) else value
        for name, value in kept_fields(values, ignored).items()
    }
