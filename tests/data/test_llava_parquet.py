"""Parquet shards are read by row group; wrong columns and damaged row groups are stated."""

import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.samples import as_list, conversation, png, record
from vr_jax.data.llava_parquet import LlavaParquetSource
from vr_jax.data.sources import open_source
from vr_jax.data.types import Conversation, Skip
from vr_jax.errors import UserError


def write_parquet(path: Path, rows: list[dict], image_type: pa.DataType | None = None, group: int = 2) -> None:
    """Writes records with `group` of them in each row group."""
    image_type = image_type or pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    talk = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    schema = pa.schema(
        [("id", pa.string()), ("image", image_type), ("conversations", talk), ("data_source", pa.string())]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)


def test_a_folder_of_shards_is_one_source(folder):
    rows = [record(k, image={"bytes": png(seed=k), "path": f"{k}.png"}, data_source="x") for k in range(7)]
    rows[5]["image"] = None
    write_parquet(folder / "train-00000.parquet", rows[:5])
    write_parquet(folder / "train-00001.parquet", rows[5:])
    source = open_source(folder, format="llava_parquet")
    assert isinstance(source, LlavaParquetSource)
    assert source.blocks == [0, 2, 4, 5]
    found = as_list(source)
    assert found[:5] + found[6:] == [conversation(k, png(seed=k)) for k in (0, 1, 2, 3, 4, 6)]
    assert found[5].images == ()
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[k] for k in (6, 0, 3)] == [found[6], found[0], found[3]]
    with pytest.raises(IndexError, match=r"record 7: .* has records 0\.\.6"):
        source[7]


def test_only_the_needed_row_groups_are_read(folder, monkeypatch):
    rows = [record(k, image={"bytes": png(seed=k), "path": None}) for k in range(8)]
    write_parquet(folder / "a.parquet", rows)
    source = open_source(folder / "a.parquet")
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, k, **options: (read.append(k), original(self, k, **options))[1]
    )
    for k in (0, 1, 0, 5, 4, 1):
        source[k]
    assert read == [0, 2]


def test_the_image_column_may_contain_bytes_or_names(folder):
    write_parquet(folder / "b.parquet", [record(0, image=png())], pa.binary())
    assert open_source(folder / "b.parquet")[0].images == (png(),)
    write_parquet(folder / "c.parquet", [record(1)], pa.string())
    source = open_source(folder / "c.parquet", images=folder / "images")
    assert source[0].images[0].read_bytes() == png(seed=1)
    without_folder = open_source(folder / "c.parquet")[0]
    assert without_folder.reason == "missing_image"
    assert "no image folder (`images`) is set" in without_folder.detail


def test_wrong_columns_are_named_with_the_file(folder):
    pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), folder / "columns.parquet")
    message = r"columns.parquet: the columns \['image', 'conversations'\] are missing; .*found \['id', 'text'\]"
    with pytest.raises(UserError, match=message):
        open_source(folder / "columns.parquet")
    pq.write_table(pa.table({"id": ["a"], "image": ["b"], "conversations": ["c"]}), folder / "types.parquet")
    message = r"types.parquet: the column 'conversations' has the type string; expected a list of structs"
    with pytest.raises(UserError, match=message):
        open_source(folder / "types.parquet")
    (folder / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"x.parquet: the file cannot be read as parquet"):
        open_source(folder / "x.parquet")


def test_records_of_damaged_row_groups_become_skips(folder):
    rows = [record(k, image={"bytes": os.urandom(4000), "path": None}) for k in range(4)]
    write_parquet(folder / "a.parquet", rows)
    data = bytearray((folder / "a.parquet").read_bytes())
    data[4:200] = b"\xff" * 196  # This overwrites the header of the first page.
    (folder / "a.parquet").write_bytes(bytes(data))
    found = as_list(open_source(folder / "a.parquet"))
    assert any(isinstance(one, Skip) and one.reason == "malformed_record" for one in found)
    assert all(isinstance(one, Skip | Conversation) for one in found)
