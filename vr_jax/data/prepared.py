"""A source of prepared sets: array_record files that `vr-jax prepare` wrote, read without tensorflow."""

from __future__ import annotations

import json

from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError

from vr_jax.data.records import conversation_of, require_file
from vr_jax.data.skips import SkipRecord, one_line
from vr_jax.data.types import Conversation, Skip
from vr_jax.errors import UserError
from vr_jax.storage import Path, as_path, in_order

# The features of a record: its name, its encoded images, and the JSON of its messages in the form of transformers, in
# which a part {"type": "image"} stands for the next image.
FEATURES = ("id", "images", "messages")
# A damaged chunk raises one of these, either in array_record or in TFDS when it parses what array_record returns.
DAMAGE_ERRORS: tuple[type[Exception], ...] = (RuntimeError, ValueError, LookupError, DecodeError)


class ArrayRecordSource:
    """One split of a prepared set, read record by record through TensorFlow Datasets.

    Attributes:
        directory: The folder that contains the set's `dataset_info.json`.
    """

    def __init__(self, directory: str | Path, split: str = "train"):
        """Opens the set and reads its last record, which reveals a truncated file.

        Args:
            directory: The folder of the set, or a folder above it that contains no other set.
            split: The name of the split.

        Raises:
            UserError: There is no such set or split, or its files are damaged.
        """
        import tensorflow_datasets as tfds  # It takes seconds to import, and only this source needs it.

        self.directory = as_path(directory)
        if not (self.directory / "dataset_info.json").is_file():
            found = in_order(self.directory.glob("**/dataset_info.json"))
            if len(found) != 1:
                raise UserError(
                    f"{self.directory}: expected one prepared set, that is one dataset_info.json in this folder or "
                    f"below it, found {len(found)}; give the folder of one set."
                )
            self.directory = found[0].parent
        try:
            builder = tfds.builder_from_directory(str(self.directory))
        except (ParseError, ValueError, OSError) as error:
            raise UserError(
                f"{self.directory}: the prepared set cannot be read ({one_line(str(error), 200)}); write it anew."
            ) from error
        if split not in builder.info.splits:
            known = ", ".join(sorted(builder.info.splits))
            raise UserError(f"{self.directory}: there is no split {split!r}; the set has {known}.")
        if set(builder.info.features) != set(FEATURES):
            raise UserError(
                f"{self.directory}: the set has the features {', '.join(sorted(builder.info.features))}, but must have "
                f"{', '.join(FEATURES)}; write it anew with vr-jax prepare."
            )
        self.files = [as_path(path) for path in builder.info.splits[split].filepaths]
        for path in self.files:
            require_file(path)
        self._data = builder.as_data_source(split=split)
        try:
            if len(self._data):
                self._data[len(self._data) - 1]
        except DAMAGE_ERRORS as error:
            raise UserError(
                f"{self.directory}: the split {split!r} is damaged ({one_line(str(error), 200)}); write it anew."
            ) from error

    def __len__(self) -> int:
        """Returns the number of records of the split."""
        return len(self._data)

    def __getitem__(self, index: int) -> Conversation | Skip:
        """Reads a record; one in a damaged part of a file is a `Skip`."""
        record_id = f"{self.directory.name}#{index}"
        try:
            row = self._data[index]
        except DAMAGE_ERRORS as error:
            detail = f"Record {index} of {self.directory} is damaged: {error}."
            return SkipRecord("malformed_record", detail).as_skip(record_id)
        record = {
            "id": row["id"].decode(),
            "images": [bytes(image) for image in row["images"]],
            "messages": json.loads(row["messages"]),
        }
        return conversation_of(record, record_id, _refuse_name)

    def __repr__(self) -> str:
        """Names the folder and the number of records."""
        return f"ArrayRecordSource({str(self.directory)!r}, {len(self)} records)"


def _refuse_name(name: object) -> Path:
    """Refuses an image that is a file name, because a prepared set contains its images."""
    raise SkipRecord("malformed_record", f"The field 'image' contains {name!r}, but must contain encoded bytes.")
