import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conftest import png
from tests.golden.discovery import DATA_ROOT, needs_data
from vr_jax.data.records import SourceError
from vr_jax.data.sources import Joined, open_source
from vr_jax.data.types import Conversation, Skip, Turn

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Größe 😀"}]


def record(k: int, **changes) -> dict:
    return {"id": f"r{k}", "image": f"{k % 3}.png", "conversations": TALK} | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for k in range(3):
        (tmp_path / "images" / f"{k}.png").write_bytes(png(seed=k))
    return tmp_path


def as_list(source) -> list:
    return [source[k] for k in range(len(source))]


def expected(k: int, image) -> Conversation:
    return Conversation(f"r{k}", (Turn("user", "<image>\nWhat?"), Turn("assistant", "Größe 😀")), (image,))


RECORDS = [record(k) for k in range(7)]
LAYOUTS = {
    "list.json": json.dumps(RECORDS),
    "pretty.json": json.dumps(RECORDS, indent=2, ensure_ascii=False),
    "lines.jsonl": "\n".join(json.dumps(r) for r in RECORDS) + "\n",
    "windows.jsonl": "\r\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS) + "\r\n\r\n",
    "marked.json": "\ufeff" + json.dumps(RECORDS, ensure_ascii=False),
    "lines.json": "\n\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_json_layouts(folder, name):
    (folder / name).write_bytes(LAYOUTS[name].encode())
    source = open_source({"path": folder / name, "images": folder / "images"})
    found = as_list(source)
    assert found == [expected(k, (folder / "images" / f"{k % 3}.png").resolve()) for k in range(7)]
    copy = pickle.loads(pickle.dumps(source))
    assert as_list(copy) == found
    assert len(pickle.dumps(source)) < 2000  # the index, not the records


def test_images_default_to_the_files_folder(folder):
    (folder / "images" / "data.json").write_text(json.dumps(RECORDS[:1]))
    (found,) = as_list(open_source({"path": str(folder / "images" / "data.json")}))
    assert found.images[0].read_bytes() == png(seed=0)


def test_several_files_patterns_and_empty_lists(folder):
    (folder / "a.json").write_text(json.dumps(RECORDS[:3]))
    (folder / "b.jsonl").write_text(json.dumps(RECORDS[3]) + "\n")
    (folder / "c.json").write_text("[]")
    both = open_source(
        {"path": [folder / "a.json", folder / "b.jsonl", folder / "c.json"], "images": folder / "images"}
    )
    assert [one.id for one in as_list(both)] == ["r0", "r1", "r2", "r3"]
    assert isinstance(both, Joined)
    assert both.blocks is None
    globbed = open_source({"path": str(folder / "*.json"), "images": folder / "images"})
    assert [one.id for one in as_list(globbed)] == ["r0", "r1", "r2"]
    with pytest.raises(IndexError):
        both[4]


def test_multi_image_text_only_and_message_schemas(folder):
    records = [
        record(0, image=["0.png", "1.png"]),
        {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"id": 17, "image": None, "conversations": [{"from": "system", "value": "S"}, *TALK]},
    ]
    (folder / "data.json").write_text(json.dumps(records))
    several, text, system = as_list(open_source({"path": folder / "data.json", "images": folder / "images"}))
    assert [path.name for path in several.images] == ["0.png", "1.png"]
    assert text == Conversation("data.json#1", (Turn("user", "Hi"), Turn("assistant", "Ho")))
    assert system.id == "17"
    assert system.turns[0] == Turn("system", "S")


MALFORMED = {
    "no object": ("text", "malformed_record"),
    "no conversations": ({"id": "x"}, "malformed_record"),
    "conversations no list": ({"id": "x", "conversations": "hi"}, "malformed_record"),
    "no turns": ({"id": "x", "conversations": []}, "empty_conversation"),
    "turn no object": ({"id": "x", "conversations": ["hi"]}, "malformed_record"),
    "unknown role": ({"id": "x", "conversations": [{"from": "robot", "value": "hi"}]}, "unknown_role"),
    "role no text": ({"id": "x", "conversations": [{"from": 3, "value": "hi"}]}, "unknown_role"),
    "no text": ({"id": "x", "conversations": [{"from": "human"}]}, "malformed_record"),
    "text no text": ({"id": "x", "conversations": [{"from": "human", "value": ["hi"]}]}, "malformed_record"),
    "image no name": (record(0, image=3), "malformed_record"),
    "image empty": (record(0, image=""), "malformed_record"),
    "image zero byte": (record(0, image="a\0b.png"), "malformed_record"),
    "image in a list": (record(0, image=[["0.png"]]), "malformed_record"),
    "absolute": (record(0, image="/etc/passwd"), "outside_folder"),
    "climbing": (record(0, image="../secret.png"), "outside_folder"),
    "climbing in the middle": (record(0, image="sub/../../secret.png"), "outside_folder"),
    "link": (record(0, image="link.png"), "outside_folder"),
    "linked folder": (record(0, image="linked/secret.png"), "outside_folder"),
    "too long a name": (record(0, image="a" * 5000), "missing_image"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_records_that_cannot_be_used(folder, name):
    raw, reason = MALFORMED[name]
    (folder / "secret.png").write_bytes(png())
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    (folder / "images" / "linked").symlink_to(folder)
    (folder / "data.json").write_text(json.dumps([raw, record(1)]))
    found, usable = as_list(open_source({"path": folder / "data.json", "images": folder / "images"}))
    assert isinstance(usable, Conversation)
    if reason == "missing_image":  # the processor finds out
        from vr_jax.data.images import open_image
        from vr_jax.data.skips import SkipRecord

        with pytest.raises(SkipRecord, match="missing_image"):
            open_image(found.images[0])
        return
    assert isinstance(found, Skip)
    assert found.reason == reason
    assert "\n" not in found.detail


def test_links_on_request_and_inside_the_folder(folder):
    (folder / "other.png").write_bytes(png(seed=9))
    (folder / "images" / "out.png").symlink_to(folder / "other.png")
    (folder / "images" / "in.png").symlink_to(folder / "images" / "1.png")
    (folder / "data.json").write_text(json.dumps([record(0, image="out.png"), record(0, image="in.png")]))
    spec = {"path": folder / "data.json", "images": folder / "images"}
    out, inside = as_list(open_source(spec))
    assert out.reason == "outside_folder"
    assert inside.images[0].read_bytes() == png(seed=1)
    out, _ = as_list(open_source(spec | {"follow_links": True}))
    assert out.images[0].read_bytes() == png(seed=9)
    (folder / "data.json").write_text(json.dumps([record(0, image="../other.png")]))
    assert open_source(spec | {"follow_links": True})[0].reason == "outside_folder"


BROKEN_FILES = {
    "cut.json": ('[{"id": "a"},\n{"id": ', r"cut.json, line 2 \(record 1\): not JSON"),
    "comma.json": ('[{"id": "a"}\n{"id": "b"}]', r"comma.json, line 2 \(record 1\): not JSON \(expected ',' or ']'"),
    "after.json": ('[{"id": "a"}]\nmore', r"after.json, line 2 \(record 1\): not JSON \(more text after the list"),
    "line.jsonl": ('{"id": "a"}\n\n{"id": }\n', r"line.jsonl, line 3: not JSON"),
    "number.json": ("3", r"number.json, line 1: expected a list of records, or one object per line, found a int"),
    "nested.json": ("[" * 100_000, r"nested.json, line 1 \(record 0\): not JSON"),
    "empty.json": ("", "no records"),
    "empty_list.json": (" [ ] ", "no records"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_json_files_are_named_with_the_line(folder, name):
    content, message = BROKEN_FILES[name]
    (folder / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        open_source({"path": folder / name})


def test_other_unusable_files(folder):
    (folder / "latin.json").write_bytes('[\n{"id": "é"}]'.encode("latin-1"))
    (folder / "notes.txt").write_text("hello")
    (folder / "a.json").write_text(json.dumps(RECORDS))
    (folder / "x.parquet").write_bytes(b"PAR1 not really")
    (folder / "set").mkdir()
    for spec, message in [
        ({}, "`path` is not set"),
        ({"path": "a.json", "image_folder": "b"}, r"unknown field\(s\) \['image_folder'\], known are"),
        ({"path": folder / "absent.json"}, "absent.json: no such file"),
        ({"path": folder / "absent"}, "absent: no such file or folder"),
        ({"path": folder / "set"}, "cannot tell the format"),
        ({"path": str(folder / "*.jsonl")}, "no file matches this pattern"),
        ({"path": folder / "notes.txt"}, "cannot tell the format"),
        ({"path": folder / "notes.txt", "format": "csv"}, r"format \['csv'\], expected one of"),
        ({"path": folder / "latin.json"}, "latin.json, line 2: not UTF-8"),
        ({"path": folder / "a.json", "images": folder / "nowhere"}, "nowhere: no such image folder"),
        ({"path": folder / "x.parquet"}, "x.parquet: not a readable parquet file"),
        ({"path": folder / "set", "format": "array_record"}, "expected one prepared set"),
        ({"path": folder / "set", "format": "llava_parquet"}, "no parquet file"),
        ({"format": "demo", "path": "x"}, "unknown field"),
        ({"format": "demo", "split": "x"}, "demo split 'x'"),
    ]:
        with pytest.raises(SourceError, match=message):
            open_source(spec)


def test_a_file_changed_behind_our_back(folder):
    path = folder / "a.json"
    path.write_text(json.dumps(RECORDS))
    source = open_source({"path": path, "images": folder / "images"})
    path.write_text("x" * path.stat().st_size)
    assert source[3].reason == "malformed_record"
    assert "changed while it was in use" in source[3].detail


def write_parquet(path: Path, rows: list[dict], image_type: pa.DataType | None = None, group: int = 2) -> None:
    image_type = image_type or pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    talk = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    schema = pa.schema(
        [("id", pa.string()), ("image", image_type), ("conversations", talk), ("data_source", pa.string())]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)


def test_parquet_shards(folder):
    rows = [record(k, image={"bytes": png(seed=k), "path": f"{k}.png"}, data_source="x") for k in range(7)]
    rows[5]["image"] = None
    write_parquet(folder / "train-00000.parquet", rows[:5])
    write_parquet(folder / "train-00001.parquet", rows[5:])
    source = open_source({"path": folder, "format": "llava_parquet"})
    assert source.blocks == [0, 2, 4, 5]
    found = as_list(source)
    assert found[:5] + found[6:] == [expected(k, png(seed=k)) for k in (0, 1, 2, 3, 4, 6)]
    assert found[5].images == ()
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[k] for k in (6, 0, 3)] == [found[6], found[0], found[3]]
    with pytest.raises(IndexError):
        source[7]
    joined = Joined([source, source])
    assert joined.blocks == [0, 2, 4, 5, 7, 9, 11, 12]
    assert joined[9].id == "r2"


def test_parquet_reads_only_the_row_groups_it_needs(folder, monkeypatch):
    rows = [record(k, image={"bytes": png(seed=k), "path": None}) for k in range(8)]
    write_parquet(folder / "a.parquet", rows)
    source = open_source({"path": folder / "a.parquet"})
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, k, **options: (read.append(k), original(self, k, **options))[1]
    )
    for k in (0, 1, 0, 5, 4, 1):
        source[k]
    assert read == [0, 2]


def test_parquet_image_variants_and_names(folder):
    write_parquet(folder / "b.parquet", [record(0, image=png())], pa.binary())
    assert open_source({"path": folder / "b.parquet"})[0].images == (png(),)
    write_parquet(folder / "c.parquet", [record(1)], pa.string())
    source = open_source({"path": folder / "c.parquet", "images": folder / "images"})
    assert source[0].images[0].read_bytes() == png(seed=1)
    unknown_folder = open_source({"path": folder / "c.parquet"})[0]
    assert unknown_folder.reason == "missing_image"
    assert "no image folder is set" in unknown_folder.detail


def test_parquet_schema_errors_name_file_and_columns(folder):
    pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), folder / "columns.parquet")
    with pytest.raises(
        SourceError, match=r"columns.parquet: no column\(s\) \['image', 'conversations'\]; .*found \['id', 'text'\]"
    ):
        open_source({"path": folder / "columns.parquet"})
    pq.write_table(pa.table({"id": ["a"], "image": ["b"], "conversations": ["c"]}), folder / "types.parquet")
    with pytest.raises(
        SourceError, match=r"types.parquet: column 'conversations' is string, expected a list of structs"
    ):
        open_source({"path": folder / "types.parquet"})


def test_damaged_row_groups_become_skips(folder):
    rows = [record(k, image={"bytes": os.urandom(4000), "path": None}) for k in range(4)]
    write_parquet(folder / "a.parquet", rows)
    data = bytearray((folder / "a.parquet").read_bytes())
    data[4:200] = b"\xff" * 196  # the first page's header
    (folder / "a.parquet").write_bytes(bytes(data))
    source = open_source({"path": folder / "a.parquet"})
    found = as_list(source)
    assert any(isinstance(one, Skip) and one.reason == "malformed_record" for one in found)
    assert all(isinstance(one, Skip | Conversation) for one in found)


def test_demo_set():
    source = open_source({"format": "demo", "split": "train", "size": 5, "seed": 3})
    assert len(source) == 5
    assert isinstance(source[4], Conversation)


@needs_data("natural", "instruct_llava.json")
def test_real_llava_file():
    source = open_source({"path": DATA_ROOT / "natural" / "instruct_llava.json"})
    found = as_list(source)
    assert len(found) > 0
    assert all(isinstance(one, Conversation) and one.images[0].is_file() for one in found)
