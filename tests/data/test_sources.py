"""Opening of data by path: formats are recognised, several files become one source, mistakes are stated."""

import json

import pytest

from tests.data.samples import as_list, png, record
from tests.golden.discovery import DATA_ROOT, needs_data
from vr_jax.data.sources import ConcatenatedSource, open_source
from vr_jax.data.types import Conversation
from vr_jax.errors import UserError

RECORDS = [record(k) for k in range(7)]


def test_image_names_are_relative_to_the_folder_of_the_file_by_default(folder):
    (folder / "images" / "data.json").write_text(json.dumps(RECORDS[:1]))
    (found,) = as_list(open_source(str(folder / "images" / "data.json")))
    assert found.images[0].read_bytes() == png(seed=0)


def test_several_files_and_patterns_become_one_source(folder):
    (folder / "a.json").write_text(json.dumps(RECORDS[:3]))
    (folder / "b.jsonl").write_text(json.dumps(RECORDS[3]) + "\n")
    (folder / "c.json").write_text("[]")
    both = open_source([folder / "a.json", folder / "b.jsonl", folder / "c.json"], images=folder / "images")
    assert [one.id for one in as_list(both)] == ["r0", "r1", "r2", "r3"]
    assert isinstance(both, ConcatenatedSource)
    assert both.blocks is None
    globbed = open_source(str(folder / "*.json"), images=folder / "images")
    assert [one.id for one in as_list(globbed)] == ["r0", "r1", "r2"]
    with pytest.raises(IndexError, match=r"record 4: .* has records 0\.\.3"):
        both[4]


class Numbers:
    """A source of `count` records that is read in blocks."""

    def __init__(self, count, blocks=None):
        self.count = count
        self.blocks = blocks

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Conversation(f"{self.count}/{index}", ())


def test_blocks_of_concatenated_sources_follow_one_another():
    joined = ConcatenatedSource([Numbers(5, [0, 3]), Numbers(2), Numbers(4, [0, 1])])
    assert joined.blocks == [0, 3, 5, 6, 7, 8]
    assert [one.id for one in as_list(joined)][4:8] == ["5/4", "2/0", "2/1", "4/0"]


def test_mistakes_are_stated(folder):
    (folder / "notes.txt").write_text("hello")
    (folder / "a.json").write_text(json.dumps(RECORDS))
    (folder / "empty.json").write_text("")
    (folder / "empty_list.json").write_text(" [ ] ")
    (folder / "x.parquet").write_bytes(b"PAR1 not really")
    (folder / "set").mkdir()
    for path, options, message in [
        ("", {}, "The data path is empty"),
        (folder / "absent.json", {}, "absent.json: no such file"),
        (folder / "absent", {}, "absent: no such file or folder"),
        (folder / "empty.json", {}, "there are no records"),
        (folder / "empty_list.json", {}, "there are no records"),
        (folder / "set", {}, "the name does not tell the format"),
        (str(folder / "*.jsonl"), {}, "no file matches this pattern"),
        (folder / "notes.txt", {}, "the name does not tell the format"),
        (folder / "notes.txt", {"format": "csv"}, "data format = 'csv': expected one of 'llava_json', "),
        ([folder / "a.json", folder / "x.parquet"], {}, r"several formats: .*a.json \(llava_json\), .*x.parquet"),
        (folder / "a.json", {"images": folder / "nowhere"}, "nowhere: no such image folder"),
        (folder / "set", {"format": "array_record"}, "expected one prepared set"),
        (folder / "set", {"format": "llava_parquet"}, "There is no parquet file"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(path, **options)


@needs_data("natural", "instruct_llava.json")
def test_real_conversations_are_read():
    found = as_list(open_source(DATA_ROOT / "natural" / "instruct_llava.json"))
    assert len(found) > 0
    assert all(isinstance(one, Conversation) and one.images[0].is_file() for one in found)
