"""Where data lies: one folder for several benchmarks, and the hub (a local server that plays it)."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.evaluation.test_benchmarks_data import publish
from vr_jax.errors import UserError
from vr_jax.evaluation.benchmarks import get_benchmark
from vr_jax.evaluation.data_folders import data_folder


@pytest.mark.parametrize("folder", ["chartqa", "ChartQA", "CHARTQA", "lmms-lab/ChartQA", "lmms-lab-encoder/ChartQA"])
def test_one_folder_for_several_benchmarks(folder, tmp_path):
    chartqa = get_benchmark("chartqa")
    (tmp_path / "docvqa").mkdir()
    (tmp_path / folder).mkdir(parents=True)
    assert data_folder(chartqa, tmp_path, several=True) == tmp_path / folder
    assert data_folder(chartqa, tmp_path, several=False) == tmp_path / folder
    assert data_folder(chartqa, tmp_path / folder, several=False) == tmp_path / folder
    with pytest.raises(UserError, match=r"holds other benchmarks .* and no folder for gqa; choose its own"):
        data_folder(get_benchmark("gqa"), tmp_path, several=False)
    (tmp_path / "test.jsonl").touch()
    assert data_folder(chartqa, tmp_path, several=False) == tmp_path
    assert data_folder(get_benchmark("gqa"), tmp_path, several=False) == tmp_path
    assert data_folder(chartqa, None, several=True) is None
    with pytest.raises(
        UserError,
        match=r"no folder for gqa \(looked for gqa, GQA, lmms-lab/GQA, .*\); found .*'docvqa'.*leave --data",
    ):
        data_folder(get_benchmark("gqa"), tmp_path, several=True)
    with pytest.raises(UserError, match="no such folder"):
        data_folder(chartqa, tmp_path / "absent", several=True)
    assert data_folder(get_benchmark("demo"), tmp_path, several=True) is None


@pytest.mark.parametrize(
    ("name", "others"), [("realworldqa", "ai2d"), ("realworldqa", "lmms-lab/ai2d"), ("textvqa", "DocVQA/DocVQA")]
)
def test_another_benchmarks_rows_are_not_taken(name, others, tmp_path):
    """Their columns would do: nothing else tells them apart."""
    benchmark, other = get_benchmark(name), others.split("/")[-1].lower()
    folder = tmp_path / "several"
    publish(other, folder / others.removesuffix("/DocVQA"))
    assert len(benchmark.items(folder)) == 2
    with pytest.raises(UserError, match=rf"several holds other benchmarks \(.*{others}.*\) and no folder for {name}"):
        data_folder(benchmark, folder, several=False)
    own = publish(name, tmp_path / "own")
    for data in (own, own / "data"):  # the data set's folder itself, and the one with its files
        assert data_folder(benchmark, data, several=False) == data
        assert len(benchmark.items(data)) == 2
    publish(name, folder / name)
    assert data_folder(benchmark, folder, several=False) == folder / name


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub's interface for `snapshot_download`: repositories are folders `root/<owner>/<name>`."""

    root: Path
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        self.asked.append(path)
        parts = path.split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[1:3])
        folder = self.root / repo
        if not folder.is_dir():
            self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api":
            files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            listed = [
                {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": "1" * 40}
                for name in files
            ]
            info = {"id": repo, "sha": "a" * 40, "siblings": [{"rfilename": name} for name in files]}
            self.answer(200, json.dumps(listed if "tree" in parts else info).encode(), {})
        else:
            content = folder.joinpath(*parts[5:]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": "a" * 40})

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


READ = """
import sys
from vr_jax.errors import UserError
from vr_jax.evaluation.benchmarks import get_benchmark
for name in sys.argv[1:]:
    try:
        items = get_benchmark(name).items(None)
        print(name, len(items), [item.problem for item in items], len(items[0].images[0]))
    except UserError as error:
        print(error)
"""


def read(tmp_path, endpoint, *names, offline=False):
    """In a process of its own: the client reads its settings when it is imported."""
    env = {
        "PATH": "",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HF_HOME": str(tmp_path / "cache"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    result = subprocess.run(
        [sys.executable, "-c", READ, *names], env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow  # Three processes import the hub's client.
def test_the_hub_and_its_mirror(hub, tmp_path):
    handler, endpoint = hub
    publish("gqa", handler.root / "lmms-lab" / "GQA")
    publish("docvqa", handler.root / "lmms-lab-encoder" / "DocVQA")
    other = handler.root / "lmms-lab-encoder" / "DocVQA" / "InfographicVQA" / "validation-00000-of-00001.parquet"
    other.parent.mkdir()
    other.write_bytes(b"not asked for")
    publish("mmstar", handler.root / "Lin-Chen" / "MMStar")
    lines = read(tmp_path, endpoint, "gqa", "docvqa", "mmstar", "mme")
    assert [line.split(" [None, None] ")[0] for line in lines[:3]] == ["gqa 2", "docvqa 2", "mmstar 2"]
    assert len(lines) == 4
    assert lines[3] == (
        "mme: the data cannot be downloaded from the Hugging Face hub (lmms-lab/MME: no such repository; "
        "lmms-lab-encoder/MME: no such repository); choose a local folder with --data, which should hold test.jsonl or "
        "test-*.parquet"
    )
    assert not any("Infographic" in path for path in handler.asked if "resolve" in path)

    handler.asked.clear()
    lines = read(tmp_path, endpoint, "gqa", "docvqa", "ai2d", offline=True)
    assert handler.asked == []
    assert [line.split(" [None, None] ")[0] for line in lines[:2]] == ["gqa 2", "docvqa 2"]
    for repository in ("lmms-lab/ai2d", "lmms-lab-encoder/ai2d"):
        assert f"{repository}: not in the cache, and the client is offline (HF_HUB_OFFLINE); download it" in lines[2]
    (line,) = read(tmp_path, "http://127.0.0.1:9", "ai2d")  # nobody answers there
    assert "(lmms-lab/ai2d: ConnectError: " in line
