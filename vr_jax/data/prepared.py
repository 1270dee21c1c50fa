"""Sets prepared as array_record files (`vr-jax prepare`), read without tensorflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError

from vr_jax.data.records import SourceError, conversation_of, require_file
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Conversation, Skip

# What reading a damaged chunk raises: array_record itself, or TFDS on what array_record then returns.
DAMAGE = (RuntimeError, ValueError, LookupError, DecodeError)


class ArrayRecord:
    """A set written by `vr-jax prepare`: array_record files, read through TensorFlow Datasets."""

    def __init__(self, directory: str | Path, split: str = "train"):
        import tensorflow_datasets as tfds  # slow to import, and needed by this source only

        self.directory = Path(directory)
        if not (self.directory / "dataset_info.json").is_file():
            found = sorted(self.directory.glob("**/dataset_info.json"))
            if len(found) != 1:
                raise SourceError(
                    f"{self.directory}: expected one prepared set (a dataset_info.json there or below), "
                    f"found {len(found)}"
                )
            self.directory = found[0].parent
        try:
            builder = tfds.builder_from_directory(str(self.directory))
        except (ParseError, ValueError, OSError) as error:
            raise SourceError(f"{self.directory}: not a readable prepared set ({error})") from error
        if split not in builder.info.splits:
            raise SourceError(f"{self.directory}: no split {split!r}, there are {sorted(builder.info.splits)}")
        for path in builder.info.splits[split].filepaths:
            require_file(Path(path))
        self._data = builder.as_data_source(split=split)
        try:
            if len(self._data):
                self._data[len(self._data) - 1]  # a file that was cut off shows here
        except DAMAGE as error:
            raise SourceError(f"{self.directory}: split {split!r} is damaged ({error})") from error

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Conversation | Skip:
        record_id = f"{self.directory.name}#{index}"
        try:
            row = self._data[index]
        except DAMAGE as error:
            return SkipRecord("malformed_record", str(error)).as_skip(record_id)
        messages = zip(row["conversations"]["from"], row["conversations"]["value"], strict=True)
        record = {
            "id": row["id"].decode(),
            "image": [bytes(image) for image in row["images"]] or None,
            "conversations": [{"from": who.decode(), "value": text.decode()} for who, text in messages],
        }
        return conversation_of(record, record_id, _no_files)

    def __repr__(self) -> str:
        return f"ArrayRecord({str(self.directory)!r}, {len(self)} records)"


def _no_files(name: Any) -> Path:
    raise SkipRecord("malformed_record", f"image: expected bytes, found {name!r}")
