"""Opening of data by path: formats are recognised, several files become one source, mistakes are stated."""

import json
import os

import pytest

from tests.data.samples import as_list, png, record
from tests.data.test_llava_parquet import write_parquet
from tests.golden.discovery import DATA_ROOT, needs_data
from vr_jax.data.sources import ConcatenatedSource, concatenated, open_source
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
    assert joined.blocks == [0, 3, 5, 7, 8], "without groups of its own, a source has groups of the others' mean size"
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
        (folder / "set", {}, "set: the folder has no data that are known"),
        (str(folder / "*.jsonl"), {}, "no file matches this pattern"),
        (folder / "notes.txt", {}, "the name does not tell the format"),
        (folder / "notes.txt", {"format": "csv"}, "data format = 'csv': expected one of 'llava_json', "),
        ([folder / "a.json", folder / "x.parquet"], {}, "x.parquet: the file cannot be read as parquet"),
        (folder / "a.json", {"images": folder / "nowhere"}, "nowhere: no such image folder"),
        (folder / "set", {"format": "array_record"}, "expected one prepared set"),
        (folder / "set", {"format": "llava_parquet"}, "there is no parquet file in the folder"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(path, **options)


def ids(source):
    return [one.id for one in as_list(source)]


def write(path, numbers, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([record(k, **changes) for k in numbers]))


def test_several_paths_stand_in_one_text(folder):
    write(folder / "a.json", [0, 1])
    write(folder / "b.json", [2])
    images = folder / "images"
    assert ids(open_source(f"{folder}/a.json, {folder}/b.json", images=images)) == ["r0", "r1", "r2"]
    assert ids(open_source(f"{folder}/b.json,{folder}/[a].json", images=images)) == ["r2", "r0", "r1"]
    write(folder / "a.json, b.json", [3])
    write(folder / "c[1].json", [4])
    assert ids(open_source(f"{folder}/a.json, b.json", images=images)) == ["r3"], "what exists is no list"
    assert ids(open_source(f"{folder}/c[1].json", images=images)) == ["r4"], "what exists is no pattern"


def test_a_pattern_with_two_stars_reads_all_depths(folder):
    for k, name in enumerate(["top.json", "one/a.json", "one/two/b.json"]):
        write(folder / "data" / name, [k])
    assert sorted(ids(open_source(f"{folder}/data/**/*.json", images=folder / "images"))) == ["r0", "r1", "r2"]


def parquet(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, [record(k, image={"bytes": png(seed=k), "path": None}) for k in numbers])


def test_a_folder_of_parquet_shards_is_read_by_split(folder):
    for k, split in enumerate(["train", "validation", "test"]):
        parquet(folder / "set" / "data" / f"{split}-00000-of-00001.parquet", [k])
    assert ids(open_source(folder / "set")) == ["r0"]
    assert ids(open_source(folder / "set", split="test")) == ["r2"]
    with pytest.raises(UserError, match=r"no file of the split 'minitrain'; .* state test, train, validation"):
        open_source(folder / "set", split="minitrain")


def test_an_incomplete_download_is_refused_and_a_pattern_of_it_is_told(folder, caplog):
    for k in (0, 4):
        parquet(folder / "set" / f"train-{k:05d}-of-00010.parquet", [k])
    with pytest.raises(UserError, match="only 2 of 10 files are there, the numbers 1, 2, 3, 5, 6, 7, 8, 9 are missing"):
        open_source(folder / "set")
    assert ids(open_source(f"{folder}/set/*.parquet")) == ["r0", "r4"]
    assert "only 2 of 10 files match the pattern" in caplog.text


def test_the_root_of_folders_of_parquet_is_read(folder):
    """As in LLaVA-OneVision-Data, which has a folder for each of its data sets."""
    parquet(folder / "set" / "ai2d(gpt4v)" / "train-00000-of-00001.parquet", [0])
    parquet(folder / "set" / "chart2text(cauldron)" / "train-00000-of-00001.parquet", [1, 2])
    assert ids(open_source(folder / "set")) == ["r0", "r1", "r2"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.json", "b.json"], r"set: the folder has several JSON files \(a.json, b.json\); give one of them, several"),
        (["below/a.json"], r"Below it is below/a.json: give this file, or a pattern such as .*set/\*\*/\*.json"),
        (["data.json.gz"], r"It has data.json.gz, which must be unpacked first"),
        (["test.json"], r"no file of the split 'train'; the names of the 1 files state test"),
        (["train-00000-of-00002.json"], "only 1 of 2 files are there"),
        (["notes.txt"], "the folder has no data that are known"),
    ],
)
def test_folders_that_leave_open_what_is_meant(folder, names, message):
    for name in names:
        write(folder / "set" / name, [0])
    with pytest.raises(UserError, match=message) as caught:
        open_source(folder / "set")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [["only.json"], ["train.json", "test.json"], ["x_train.jsonl", "x_val.jsonl"]])
def test_a_folder_with_one_json_file_of_the_split(folder, names):
    for k, name in enumerate(names):
        (folder / "set").mkdir(exist_ok=True)
        (folder / "set" / name).write_text(json.dumps(record(k)) + "\n")
    assert ids(open_source(folder / "set", images=folder / "images")) == ["r0"]


def test_sources_of_several_formats_follow_one_another(folder):
    write(folder / "a.json", [0])
    parquet(folder / "b.parquet", [1])
    write(folder / "c.json", [2])
    joined = open_source([folder / "a.json", folder / "b.parquet", folder / "c.json"], images=folder / "images")
    assert ids(joined) == ["r0", "r1", "r2"]
    assert concatenated([joined]) is joined


@pytest.mark.parametrize("links", ["file", "folder"])
def test_links_out_of_the_image_folder_are_followed_only_when_asked(folder, links):
    """Links are how people lay out data: a folder of links, or links to other folders."""
    (folder / "links").mkdir()
    if links == "file":
        os.symlink(folder / "images" / "0.png", folder / "links" / "0.png")
        write(folder / "a.json", [0])
    else:
        os.symlink(folder / "images", folder / "links" / "coco")
        write(folder / "a.json", [0], image="coco/0.png")
    (skip,) = as_list(open_source(folder / "a.json", images=folder / "links"))
    assert (skip.reason, "follow_links" in skip.detail) == ("outside_folder", True)
    (found,) = as_list(open_source(folder / "a.json", images=folder / "links", follow_links=True))
    assert found.images[0].read_bytes() == png(seed=0)


@needs_data("natural", "instruct_llava.json")
def test_real_conversations_are_read():
    found = as_list(open_source(DATA_ROOT / "natural" / "instruct_llava.json"))
    assert len(found) > 0
    assert all(isinstance(one, Conversation) and one.images[0].is_file() for one in found)
