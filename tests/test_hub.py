"""Names on the Hugging Face hub wherever a folder is taken, with a stand-in for the download."""

from __future__ import annotations

import importlib
import json
import os

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from tests.data.samples import as_list, png, record
from tests.data.test_llava_parquet import write_parquet
from vr_jax import hub
from vr_jax.cli.main import main
from vr_jax.data.sources import open_source
from vr_jax.errors import UserError
from vr_jax.evaluation.evaluate import checkpoint_folder, output_folder
from vr_jax.hub import is_hub_name, local_folder
from vr_jax.settings import EvaluationSettings, load_config
from vr_jax.training import init_directories
from vr_jax.training.inputs import open_training_source, tokenizer_directory

# The HTTP client of huggingface_hub is httpx or httpx2, depending on its version.
httpx = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.split(".")[0])
TRAIN = ["train", "--config=configs/demo.py", "--config.batch.rows=24", "--workdir=out"]  # 8 devices share 24 rows


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The calls of the download; a repository `<owner>/<name>` is the folder hub/<name>."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def download(repo, **options):
        calls.append((repo, options))
        if not (tmp_path / "hub" / repo.split("/")[1]).is_dir():
            response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
            raise RepositoryNotFoundError("404", response=response)
        return str(tmp_path / "hub" / repo.split("/")[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub._fetched.cache_clear()  # noqa: SLF001 - other tests use the same names.
    return calls


def test_what_is_taken_for_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs")
    assert all(map(is_hub_name, ["Qwen/Qwen2-0.5B", "lmms-lab/LLaVA-NeXT-Data", "a/b"]))
    others = [
        "runs/model",
        "model",
        "./a/b",
        "/a/b",
        "~/a",
        "a/b/c",
        "../a",
        "data/x.json",
        "data/x.PARQUET",
        "gs://a/b",
    ]
    assert not any(map(is_hub_name, others)), "a local folder has precedence, also where only its parent exists"
    (tmp_path / "Qwen" / "Qwen2-0.5B").mkdir(parents=True)
    assert not is_hub_name("Qwen/Qwen2-0.5B")
    assert local_folder("Qwen/Qwen2-0.5B") == hub.as_path("Qwen/Qwen2-0.5B")


def test_a_model_is_downloaded_once_without_its_other_formats(asked, tmp_path):
    (tmp_path / "hub" / "llava").mkdir(parents=True)
    (tmp_path / "hub" / "llava" / "model.safetensors").touch()
    assert local_folder("org/llava") == local_folder("org/llava") == hub.as_path(tmp_path / "hub" / "llava")
    ((repo, options),) = asked
    assert (repo, options["repo_type"], options["allow_patterns"]) == ("org/llava", "model", None)
    assert {"*.bin", "*.gguf", "*.onnx"} <= set(options["ignore_patterns"])


def test_pickled_weights_are_downloaded_where_there_are_no_others(asked, tmp_path):
    (tmp_path / "hub" / "projector").mkdir(parents=True)
    local_folder("org/projector")
    assert ["*.bin" in options["ignore_patterns"] for _, options in asked] == [True, False]


def test_settings_take_names_on_the_hub(asked, tmp_path):
    model = tmp_path / "hub" / "qwen2"
    model.mkdir(parents=True)
    (model / "model.safetensors").touch()
    (model / "tokenizer.json").touch()
    config = load_config("configs/llava_vr_qwen2_0_5b.py:phase1", ["init_from=org/qwen2"])
    assert list(map(os.fspath, init_directories(config))) == [str(model)]
    config = config.override(["init_from=None", "tokenizer=org/qwen2"])
    assert os.fspath(tokenizer_directory(config, tmp_path)) == str(model)
    evaluation = EvaluationSettings(checkpoint="org/qwen2")
    assert checkpoint_folder(evaluation) == model
    with pytest.raises(UserError, match="org/qwen2 is fetched from the Hugging Face hub: set --output"):
        output_folder(evaluation)


def test_a_data_set_is_downloaded(asked, tmp_path):
    folder = tmp_path / "hub" / "talks" / "data"
    folder.mkdir(parents=True)
    for split, k in (("train", 0), ("test", 1)):
        rows = [record(k, image={"bytes": png(), "path": None})]
        write_parquet(folder / f"{split}-00000-of-00001.parquet", rows)
    assert [one.id for one in as_list(open_source("org/talks"))] == ["r0"]
    data = load_config("configs/demo.py", ["data.path=org/talks", "data.split=test"]).data
    assert [one.id for one in as_list(open_training_source(data))] == ["r1"]
    ((_, options),) = asked
    assert (options["repo_type"], options["allow_patterns"]) == ("dataset", ["*.parquet", "*.json", "*.jsonl"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "import", "--from=org/absent", "--to=out"],
        ["convert", "import", "--encoder=org/absent", "--decoder=org/absent", "--to=out"],
        ["chat", "--checkpoint=org/absent", "Hi"],
        ["generate", "--checkpoint=org/absent", "--input=q.jsonl", "--output=a.jsonl"],
        ["eval", "--checkpoint=org/absent", "--benchmark=chartqa", "--output=out"],
        ["probe", "--checkpoint=org/absent", "--data=data", "--output=out"],
        ["efficiency", "--checkpoint=org/absent"],
        ["prepare", "--from=org/absent", "--to=out"],
        [*TRAIN, "--config.data.path=org/absent"],
        [*TRAIN, "--config.tokenizer=org/absent"],
    ],
)
def test_every_command_asks_the_hub_and_says_in_one_line_that_nothing_is_there(asked, tmp_path, capsys, arguments):
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": 1, "question": "Why?"}) + "\n")
    (tmp_path / "data").mkdir()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "there is no such folder" in line]
    assert len(lines) == 1
    assert "org/absent: there is no such folder, and as the name of a " in lines[0]
    assert lines[0].endswith("on the Hugging Face hub it cannot be fetched: no such repository")
    assert [repo for repo, _ in asked] == ["org/absent"]


def failure(kind, cause=None):
    response = httpx.Response(403, request=httpx.Request("GET", "https://hub"))
    error = kind("long\nmessage", response=response) if issubclass(kind, HfHubHTTPError) else kind("long\nmessage")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            failure(GatedRepoError),
            "the repository is gated; ask for access on its page, and log in with `hf auth login`",
        ),
        (failure(HfHubHTTPError), "HfHubHTTPError: long message"),
        (
            failure(LocalEntryNotFoundError, OfflineModeIsEnabled("x")),
            "the client is offline .HF_HUB_OFFLINE.; download",
        ),
        (failure(LocalEntryNotFoundError, httpx.ConnectError("no route")), "ConnectError: no route"),
        (httpx.ReadTimeout("timed out"), "ReadTimeout: timed out"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_every_failure_of_a_download_is_one_line(monkeypatch, tmp_path, error, message):
    def download(repo, **options):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=message) as caught:
        local_folder("some/model")
    assert "\n" not in str(caught.value)
