"""Parquet shards are read by row group; wrong columns and damaged row groups are stated."""

import dataclasses
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.samples import TALK, as_list, conversation, png, record
from vr_jax.data.llava_parquet import LlavaParquetSource
from vr_jax.data.sources import open_source
from vr_jax.data.types import IMAGE, Conversation, Skip, Turn
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
    message = r"columns.parquet: the columns 'conversations' and 'messages' are missing; .*found \['id', 'text'\]"
    with pytest.raises(UserError, match=message):
        open_source(folder / "columns.parquet")
    pq.write_table(pa.table({"id": ["a"], "image": ["b"], "conversations": ["c"]}), folder / "types.parquet")
    message = r"types.parquet: the column 'conversations' has the type string; expected a list of structs"
    with pytest.raises(UserError, match=message):
        open_source(folder / "types.parquet")
    (folder / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"x.parquet: the file cannot be read as parquet"):
        open_source(folder / "x.parquet")


def talks(count, list_type=pa.list_, text=None):
    """A column of the same messages."""
    text = text or pa.string()
    return pa.array([TALK] * count, list_type(pa.struct([("from", text), ("value", text)])))


PARTS = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is <image> in", "index": None},
            {"type": "image", "text": None, "index": 0},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "A tag.", "index": None}]},
]
IMAGES = [png(seed=0), png(seed=1)]
SAME = [conversation(k, image) for k, image in enumerate(IMAGES)]
NAMED = ["r0", "r1"]
COLUMNS = {
    "no id": {"image": IMAGES, "conversations": talks(2)},
    "views": {
        "id": pa.array(NAMED, pa.string_view()),
        "image": pa.array(IMAGES, pa.binary_view()),
        "conversations": talks(2),
    },
    "dictionaries": {
        "id": pa.array(NAMED).dictionary_encode(),
        "image": pa.array(IMAGES).dictionary_encode(),
        "conversations": talks(2),
    },
    "large types": {
        "id": pa.array(NAMED, pa.large_string()),
        "images": pa.array([[one] for one in IMAGES], pa.large_list(pa.large_binary())),
        "conversations": talks(2, pa.large_list, pa.large_string()),
    },
    "list views": {"id": NAMED, "image": IMAGES, "conversations": talks(2, pa.list_view)},
    "a struct of lists": {
        "id": NAMED,
        "image": IMAGES,
        "conversations": [{key: [one[key] for one in TALK] for key in ("from", "value")}] * 2,
    },
    "columns without meaning": {
        "id": NAMED,
        "image": IMAGES,
        "conversations": talks(2),
        "embedding": [[0.5], [0.25]],
        "video": pa.nulls(2),
        "image_id": ["a", "b"],
        "system": pa.array([None, ""]),
    },
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_every_type_give_the_same_records(folder, name):
    try:
        pq.write_table(pa.table(COLUMNS[name]), folder / "a.parquet")
    except pa.ArrowNotImplementedError as error:
        pytest.skip(f"pyarrow {pa.__version__} reads such a file but cannot write one: {error}")
    found = as_list(open_source(folder / "a.parquet"))
    if "id" not in COLUMNS[name]:
        assert [one.id for one in found] == ["a.parquet#0", "a.parquet#1"]
        found = [dataclasses.replace(one, id=other.id) for one, other in zip(found, SAME, strict=True)]
    assert found == SAME


def test_nested_parts_and_null_images(folder):
    images = [[{"bytes": IMAGES[0], "path": None}], None]
    text = [{"role": "user", "content": [{"type": "text", "text": "Hi", "index": None}]}, PARTS[1]]
    pq.write_table(pa.table({"images": images, "messages": [PARTS, text]}), folder / "a.parquet")
    first, second = as_list(open_source(folder / "a.parquet"))
    assert first.turns[0] == Turn("user", "What is <image> in", IMAGE)
    assert first.images == (IMAGES[0],)
    assert second.turns == (Turn("user", "Hi"), Turn("assistant", "A tag."))
    assert second.images == ()


def test_a_column_that_brings_media_is_refused_where_it_does(folder):
    columns = {"image": IMAGES, "conversations": talks(2), "video": [None, "a.mp4"], "jpg": [b"x", None]}
    pq.write_table(pa.table(columns), folder / "a.parquet")
    first, second = as_list(open_source(folder / "a.parquet"))
    assert "the key 'jpg'" in first.detail
    assert "the key 'video'" in second.detail
    pq.write_table(pa.table({"conversations": talks(1), "file": ["a.jpg"]}), folder / "b.parquet")
    (named,) = as_list(open_source(folder / "b.parquet"))
    assert "the key 'file', which names a file of an image" in named.detail


def test_two_columns_of_one_name_are_refused(folder):
    table = pa.table([pa.array(["a"]), pa.array(["b"]), talks(1)], names=["image", "image", "conversations"])
    pq.write_table(table, folder / "a.parquet")
    with pytest.raises(UserError, match="several columns have the name 'image'"):
        open_source(folder / "a.parquet")


def test_records_of_damaged_row_groups_become_skips(folder):
    rows = [record(k, image={"bytes": os.urandom(4000), "path": None}) for k in range(4)]
    write_parquet(folder / "a.parquet", rows)
    data = bytearray((folder / "a.parquet").read_bytes())
    data[4:200] = b"\xff" * 196  # This overwrites the header of the first page.
    (folder / "a.parquet").write_bytes(bytes(data))
    found = as_list(open_source(folder / "a.parquet"))
    assert any(isinstance(one, Skip) and one.reason == "malformed_record" for one in found)
    assert all(isinstance(one, Skip | Conversation) for one in found)
