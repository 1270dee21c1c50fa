"""Training data in a bucket are those of a disk: JSON with images, parquet, and prepared sets."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vr_jax.data.demo.export import write_llava
from vr_jax.data.demo.source import DemoSource
from vr_jax.data.fingerprint import fingerprint
from vr_jax.data.images import decode_rgb, open_image
from vr_jax.data.skips import SkipRecord
from vr_jax.data.sources import open_source
from vr_jax.errors import UserError
from vr_jax.storage import StoreError, UploadedFolder

COUNT = 6


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Six samples as JSON with image files, and as two shards of parquet with the images inside."""
    folder = tmp_path_factory.mktemp("local")
    write_llava(DemoSource("train", COUNT, turns=1), folder / "json")
    source = open_source(folder / "json" / "data.json", images=folder / "json" / "images")
    rows = [
        {
            "id": one.id,
            "image": {"bytes": one.images[0].read_bytes(), "path": None},
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": one.id}],
        }
        for one in (source[k] for k in range(COUNT))
    ]
    (folder / "shards").mkdir()
    for number, part in enumerate((rows[:4], rows[4:])):
        name = folder / "shards" / f"train-{number:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part), name, row_group_size=2)
    return folder


@pytest.fixture
def remote(local, bucket):
    import shutil

    with UploadedFolder(bucket) as files:
        shutil.copytree(local, files.local, dirs_exist_ok=True)
        files.upload()
    return bucket


def pixels(record):
    return [np.asarray(decode_rgb(open_image(image))) for image in record.images]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) == COUNT
    for k in range(COUNT):
        assert (ours[k].id, ours[k].turns) == (theirs[k].id, theirs[k].turns)
        for one, other in zip(pixels(ours[k]), pixels(theirs[k]), strict=True):
            np.testing.assert_array_equal(one, other)


def test_json_and_images(local, remote):
    def opened(root):
        return open_source(f"{root}/json/*.json", images=f"{root}/json/images")

    assert_same(opened(remote), opened(local))
    assert_same(pickle.loads(pickle.dumps(opened(remote))), opened(local))  # as a worker process gets it
    assert fingerprint(opened(remote))["records"] == COUNT


def test_parquet(local, remote):
    assert_same(open_source(str(remote / "shards")), open_source(str(local / "shards")))
    (remote / "shards" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"shards"):
        open_source(str(remote / "shards"))


def test_a_prepared_set(local, remote):
    from vr_jax.data.tfds_builder import prepare

    source = open_source(str(local / "shards"))
    made = prepare({"train": source}, remote / "prepared", records_per_shard=2)
    assert str(made.folder).startswith(f"{remote}/prepared/")
    assert_same(open_source(str(remote / "prepared")), source)
    with pytest.raises(UserError, match="there is a prepared set already"):
        prepare({"train": source}, remote / "prepared")


def test_an_image_that_is_absent_is_skipped_and_a_store_that_fails_is_not(remote, object_store, monkeypatch):
    """Else a run would go on with other samples than one whose store answers."""
    image = remote / "json" / "images" / "absent.png"
    with pytest.raises(SkipRecord, match="does not exist"):
        open_image(image)
    monkeypatch.setattr("gcsfs.retry.retry_request", None)
    object_store.inject({"times": 1000, "kind": "status", "status": 400})
    with pytest.raises(StoreError, match="the store answered 400"):
        open_image(image)
