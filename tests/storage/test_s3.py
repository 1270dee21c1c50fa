"""Paths of S3 against moto's server: files, folders, leases, and data and results of the commands.

It runs where s3fs and moto with its server are installed: pip install 's3fs' 'moto[s3,server]'.
"""

import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import pytest

from vr_jax.data.demo.export import write_llava
from vr_jax.data.demo.source import DemoSource
from vr_jax.data.images import open_image
from vr_jax.data.sources import open_source
from vr_jax.errors import UserError
from vr_jax.storage import (
    AppendedFile,
    UploadedFolder,
    as_path,
    complete_directory,
    directory_lock,
    is_complete,
    lease,
    move_folder,
    remove_folder,
    results_folder,
    store,
    write_json,
)
from vr_jax.storage.bucket_lease import BucketLeaseFile, S3Object

pytest.importorskip("s3fs", reason="s3:// needs s3fs")
pytest.importorskip("moto.server", reason="the tests' S3 is moto's server")


@pytest.fixture(scope="module")
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(300):
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5)
            break
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


@pytest.fixture
def folder(address, monkeypatch):
    values = {"ENDPOINT_URL": address, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with suppress(Exception):
        store.filesystem("s3://bkt").mkdir("bkt")
    return as_path(f"s3://bkt/{secrets.token_hex(6)}")


def test_files_and_folders(folder):
    with complete_directory(folder / "m") as written:
        (written / "a.txt").write_text("a")
        (written / "b" / "c.txt").write_text("c")
    assert is_complete(folder / "m")
    with AppendedFile(folder / "j.jsonl") as file:
        file.append(b"1\n")
    assert sorted(path.name for path in folder.rglob("*.*")) == ["a.txt", "c.txt", "j.jsonl"]
    move_folder(folder / "m", folder / "n")
    assert (folder / "n" / "b" / "c.txt").read_text() == "c"
    with pytest.raises(FileNotFoundError):
        (folder / "m" / "a.txt").read_bytes()
    with (folder / "n" / "a.txt").open("rb") as file:
        assert file.read() == b"a"
    remove_folder(folder)
    assert not folder.exists()


def test_a_lease_is_given_once(folder):
    one, other = (BucketLeaseFile(str(folder / ".lock")) for _ in range(2))
    mine = one.create(b"me\n", 1.0)
    assert other.create(b"other\n", 1.0) is None
    seen = other.read()
    mine = one.refresh(mine, 2.0)
    assert not other.remove(seen)
    assert one.remove(mine)
    assert one.read() is None
    with directory_lock(folder), pytest.raises(UserError, match="in use by another run"), lease(folder / ".lock"):
        pass


def test_a_condition_that_does_not_hold_changes_nothing(folder):
    found = S3Object(str(folder / "x"))
    first = found.put(b"1", "")
    second = found.put(b"2", first)
    assert found.put(b"3", first) is None
    assert found.put(b"3", "") is None
    assert found.get() == (b"2", second)


def test_data_and_results(folder, tmp_path):
    write_llava(DemoSource("train", 3, turns=1), tmp_path / "json")
    with UploadedFolder(folder / "data") as files:
        (tmp_path / "json").rename(files.local / "json")
        files.upload()
    source = open_source(str(folder / "data" / "json" / "data.json"), images=folder / "data" / "json" / "images")
    assert len(source) == 3
    assert open_image(source[2].images[0]).size[0] > 0
    with results_folder(folder / "results", "r.json") as results:
        write_json(results / "r.json", {"score": 1})
    with pytest.raises(UserError, match=r"r\.json exists"), results_folder(folder / "results", "r.json"):
        pass
