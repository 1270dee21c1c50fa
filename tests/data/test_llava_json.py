"""JSON and JSONL files of every layout are read record by record; damaged files are named with the line."""

import json
import pickle

import pytest

from tests.data.samples import as_list, conversation, record
from vr_jax.data.llava_json import LlavaJsonSource
from vr_jax.errors import UserError

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
def test_every_layout_gives_the_same_records(folder, name):
    (folder / name).write_bytes(LAYOUTS[name].encode())
    source = LlavaJsonSource(folder / name, folder / "images")
    found = as_list(source)
    assert found == [conversation(k, (folder / "images" / f"{k % 3}.png").resolve()) for k in range(7)]
    pickled = pickle.dumps(source)
    assert as_list(pickle.loads(pickled)) == found
    assert len(pickled) < 2000, "the pickle contains the index, not the records"


def test_a_record_without_id_is_named_by_file_and_index(folder):
    (folder / "data.json").write_text(json.dumps([record(0), {"conversations": record(1)["conversations"]}]))
    assert LlavaJsonSource(folder / "data.json", folder / "images")[1].id == "data.json#1"


BROKEN_FILES = {
    "cut.json": ('[{"id": "a"},\n{"id": ', r"cut.json, line 2 \(record 1\): the text is not JSON"),
    "comma.json": ('[{"id": "a"}\n{"id": "b"}]', r"comma.json, line 2 \(record 1\): .* \(expected ',' or ']'"),
    "after.json": ('[{"id": "a"}]\nmore', r"after.json, line 2 \(record 1\): .* \(more text after the list"),
    "line.jsonl": ('{"id": "a"}\n\n{"id": }\n', r"line.jsonl, line 3: the text is not JSON"),
    "number.json": ("3", r"number.json, line 1: expected a list of records or one object per line, found a int"),
    "nested.json": ("[" * 100_000, r"nested.json, line 1 \(record 0\): the text is not JSON"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_named_with_the_line(folder, name):
    content, message = BROKEN_FILES[name]
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        LlavaJsonSource(folder / name)


def test_a_key_that_is_there_twice_and_a_number_without_end(folder):
    talk = json.dumps(record(0)["conversations"])
    (folder / "twice.json").write_text(f'[{{"image": "0.png", "image": "1.png", "conversations": {talk}}}]')
    found = LlavaJsonSource(folder / "twice.json", folder / "images")[0]
    assert found.reason == "malformed_record"
    assert "the key 'image' twice" in found.detail
    for name, content in (("long.json", "[{}, {}]"), ("long.jsonl", "{}\n{}")):
        (folder / name).write_text(content.replace("{}", '{"id": 1}', 1).replace("{}", '{"id": ' + "9" * 5000 + "}"))
        with pytest.raises(
            UserError, match=f"{name}, line . .*the text is not JSON|{name}, line .: the text is not JSON"
        ):
            LlavaJsonSource(folder / name)


def test_other_unusable_files_are_named(folder):
    (folder / "latin.json").write_bytes('[\n{"id": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.json, line 2: the text is not UTF-8"):
        LlavaJsonSource(folder / "latin.json")
    with pytest.raises(UserError, match=r"absent\.json: no such file"):
        LlavaJsonSource(folder / "absent.json")
    with pytest.raises(UserError, match="images: expected a file"):
        LlavaJsonSource(folder / "images")


def test_a_file_that_changes_while_it_is_in_use_gives_a_skip(folder):
    path = folder / "a.json"
    path.write_text(json.dumps(RECORDS))
    source = LlavaJsonSource(path, folder / "images")
    path.write_text("x" * path.stat().st_size)
    assert source[3].reason == "malformed_record"
    assert "changed while it was in use" in source[3].detail
