"""Failures of disks, memory, libraries and other processes are one line; faults of the program stay tracebacks."""

from __future__ import annotations

import ast
import errno
import functools
import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from vr_jax import failures
from vr_jax.errors import UserError
from vr_jax.failures import as_user_error, close_after, explain, first_error_kept, free_bytes
from vr_jax.storage import file_errors

ROOT = Path(__file__).parents[1]


def raised(number: int, name: str | None = "/disk/run/a.json") -> OSError:
    """The error of the operating system with a number."""
    return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        ("ENOSPC", "free some space"),
        ("EDQUOT", "free some space"),
        ("EACCES", "choose a folder that this user may write to"),
        ("EPERM", "choose a folder that this user may write to"),
        ("EROFS", "choose a folder that this user may write to"),
        ("ESTALE", "the disk does not answer; check its mount"),
        ("ENODEV", "the disk does not answer; check its mount"),
        ("EIO", "the disk does not answer; check its mount"),
        ("ENOTCONN", "the disk does not answer; check its mount"),
        ("ETIMEDOUT", "the disk does not answer; check its mount"),
        ("ENOENT", "check the path, and whether its disk is still mounted"),
        ("ENOTDIR", "a file stands where a folder is expected"),
        ("EISDIR", "a folder stands where a file is expected"),
        ("ENAMETOOLONG", "choose a shorter name"),
        ("EMFILE", "raise the limit of open files, e.g. ulimit -n"),
        ("ENFILE", "end other programs"),
        ("EFBIG", "raise the limit (ulimit -f)"),
        ("ELOOP", "symbolic links point at each other"),
        ("ENOTEMPTY", "another program writes to this folder"),
        ("EXDEV", ""),
    ],
)
def test_what_the_system_refuses_names_the_file_the_reason_and_what_to_do(number, advice):
    error = as_user_error(raised(getattr(errno, number)))
    assert isinstance(error, UserError)
    message = str(error)
    assert message.startswith(f"/disk/run/a.json: {os.strerror(getattr(errno, number))}")
    assert advice in message
    assert "\n" not in message


def test_a_full_disk_tells_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(failures.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_500_000}))
    message = explain(raised(errno.ENOSPC), needed=3_200_000_000)
    assert "3.20 GB needed, 1.50 MB free" in message
    assert free_bytes(tmp_path / "absent" / "below") == 1_500_000


@pytest.mark.parametrize(
    "error",
    [
        ValueError(
            "UNKNOWN: Error writing local file \"/d/x\": ... [os_error_code='28'] [source locations='...']\nmore"
        ),
        Exception("No space left on device (os error 28)"),  # of the tokenizers library, which has no class for it
        RuntimeError("[Errno 28] No space left on device"),
        RuntimeError("write() failed: No space left on device; writing /d/x; at byte 102400"),  # of array_record
        ExceptionGroup("of a thread", [OSError(errno.ENOSPC, "No space left on device")]),
    ],
)
def test_libraries_that_quote_the_system_are_understood(error):
    assert "No space left on device" in str(as_user_error(error))
    assert "\n" not in str(as_user_error(error))


def test_the_cause_of_a_wrapped_error_is_found():
    error = RuntimeError("a worker has failed")
    error.__cause__ = raised(errno.EROFS)
    assert "Read-only file system" in str(as_user_error(error))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 3.1 TiB"), "this machine's memory does not suffice; lower what is held"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBufferAssignment: ..."),
            "the devices' memory does not suffice; lower what is held at a time (batch.rows",
        ),
        (
            jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [10.0.0.1]:9"),
            "another process of the run has ended or does not answer; its own log says why",
        ),
        (ValueError("UNKNOWN: Gloo AllGather failed: ... Connection closed by peer"), "another process of the run"),
        (RuntimeError("Unable to initialize backend 'cuda': no driver"), "the devices cannot be used; check JAX_PLATF"),
        (
            RuntimeError("Worker process was terminated unexpectedly with exit code -9. Rerun with ..."),
            "a process that reads the data was ended from outside, most often because this machine's memory is full",
        ),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "pip install 'vr-jax[torch]'"),
        (ModuleNotFoundError("No module named 'apache_beam.x'", name="apache_beam.x"), "pip install 'vr-jax[beam]'"),
        (ModuleNotFoundError("No module named 'sentencepiece'", name="sentencepiece"), "pip install sentencepiece"),
        (ImportError("SiglipTokenizer requires the SentencePiece library\nbut"), "a library is missing: SiglipTok"),
    ],
)
def test_memory_processes_and_libraries(error, message):
    found = str(as_user_error(error))
    assert message in found
    assert "\n" not in found


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a fault"),
        KeyError("name"),
        ImportError("cannot import name 'x' from 'vr_jax.data'", name="vr_jax.data"),
        ModuleNotFoundError("No module named 'vr_jax.dta'", name="vr_jax.dta"),
        ImportError("cannot import name 'jit' from 'jax'", name="jax"),
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"),
    ],
)
def test_faults_of_the_program_are_left_alone(error):
    assert as_user_error(error) is None


def test_the_extras_are_those_of_the_package():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(failures.EXTRAS.values()) <= set(declared)


def test_the_first_error_is_kept_and_the_one_of_an_end_without_it_counts(caplog):
    def close():
        raise OSError("closing")

    with pytest.raises(KeyError, match="first"), first_error_kept(close):
        raise KeyError("first")
    with pytest.raises(OSError, match="closing"), first_error_kept(close):
        pass
    close_after(ValueError(), close)
    with pytest.raises(OSError, match="closing"):
        close_after(None, close)


@functools.cache
def modules() -> list[tuple[str, list[ast.AST]]]:
    """The nodes of the syntax tree of every module of the package, by its path."""
    package = ROOT / "vr_jax"
    return [
        (path.relative_to(package).as_posix(), list(ast.walk(ast.parse(path.read_text()))))
        for path in sorted(package.rglob("*.py"))
    ]


# Where a handler catches every error: how many there are, and why. Each of BaseException raises again what it caught.
CATCH_ALL = {
    "cli/main.py": (1, "failures come from any line; a fault of the program is raised again"),
    "distributed.py": (2, "the others learn of any error"),
    "processes/watch.py": (1, "the process ends at this moment, whatever the release of its folder raises"),
    "failures.py": (2, "the first error is the one to report; the first of two is raised again"),
    "storage/bucket_lease.py": (1, "S3's client has a class for each refusal; what is none is raised again"),
    "storage/files.py": (2, "libraries have classes of their own for a full disk; a half file is taken away"),
    "storage/growing.py": (1, "a half piece is taken away"),
    "storage/store.py": (1, "each client has classes of its own for a store that fails; others are raised again"),
    "storage/folders.py": (1, "a half folder is taken away"),
    "storage/lease_file.py": (1, "a half lease is taken away"),
    "settings/config_files.py": (1, "the code of a config file may raise anything, and is the user's"),
    "data/tfds_builder.py": (1, "empty folders are taken away"),
    "evaluation/run_directory.py": (1, "the folder is given back"),
    "app/models.py": (1, "it is raised again where the answer is awaited, in another thread"),
    "app/session.py": (1, "the page shows any error as one line, and goes on"),
    "training/trackers/group.py": (
        1,
        "a tracker's library may raise anything; it is switched off, and the training goes on",
    ),
    "demo/commands.py": (2, "the other commands are stopped, and it is raised again"),
    "demo/worker.py": (1, "any error of a command is printed with its traceback, and is a failure of the command"),
}


def catches_all(node: ast.AST) -> bool:
    if isinstance(node, ast.ExceptHandler):
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        return any(kind is None or getattr(kind, "id", "") in ("Exception", "BaseException") for kind in kinds)
    if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "suppress":
        return any(getattr(argument, "id", "") in ("Exception", "BaseException") for argument in node.args)
    return False


def test_nothing_catches_every_error_but_for_a_reason():
    found = {name: sum(map(catches_all, nodes)) for name, nodes in modules()}
    expected = {name: count for name, (count, _) in CATCH_ALL.items()}
    assert {name: count for name, count in found.items() if count} == expected


# Modules outside the storage package that change files by themselves, and why.
WRITES = {
    "compilation.py": "the cache of compiled programs; a folder that cannot be made is a line in the log",
    "convert/processor_export.py": "inside a folder of complete_directory",
    "convert/weights.py": "inside a folder of complete_directory, which reports errors and removes a half folder",
    "data/demo/export.py": "inside a folder of complete_directory",
    "inference/batch_answers.py": "the file of an atomic_write",
    "model_directory/layout.py": "inside a folder of complete_directory",
    "probe/stand_in.py": "inside a folder of complete_directory",
    "cli/main.py": "the null device, for output that nobody can read",
    "evaluation/run_directory.py": "the results that --overwrite gives up, in a folder that it holds",
    "cli/demo.py": "within file_errors, in a folder that it holds",
    "cli/app.py": "images in a temporary folder",
    "data/demo/reading.py": "inside a folder of complete_directory",
    "demo/worker.py": "the log that a command's output is added to",
    "processes/supervisor.py": "one number in the temporary folder of the supervisor",
    "storage": "it is the place for this",
}
FUNCTIONS = {
    "os": {
        "rename",
        "replace",
        "remove",
        "unlink",
        "mkdir",
        "makedirs",
        "rmdir",
        "open",
        "truncate",
        "link",
        "symlink",
    },
    "shutil": {"rmtree", "move", "copy", "copy2", "copyfile", "copytree", "copymode"},
}
METHODS = {"write_text", "write_bytes", "unlink", "rmdir", "rmtree", "rename", "mkdir", "touch", "symlink_to"}


def changes_files(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    function = node.func
    if isinstance(function, ast.Name):
        return function.id == "open"
    if not isinstance(function, ast.Attribute):
        return False
    owner = getattr(function.value, "id", "")
    if owner in FUNCTIONS:
        return function.attr in FUNCTIONS[owner]
    if function.attr == "open" and node.args:
        mode = node.args[0]
        return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and bool(set("wax+") & set(mode.value))
    return function.attr in METHODS


def test_files_are_changed_through_the_storage_package_only():
    found = {
        "storage" if name.startswith("storage/") else name
        for name, nodes in modules()
        if any(map(changes_files, nodes))
    }
    assert found == set(WRITES)


def test_an_error_of_a_thread_of_a_library_is_found_behind_its_future():
    def fail():
        raise raised(errno.ENOSPC)

    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match="No space") as error:
        pool.submit(fail).result()
    assert "No space left" in str(as_user_error(error.value))


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "vr_jax", *arguments],
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        check=False,
        **options,
    )


def test_a_full_disk_behind_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = run("--help", stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith("vr-jax: No space left on device")
    assert done.stderr.count("\n") == 1


def test_nobody_reads_the_output():
    reading, writing = os.pipe()
    os.close(reading)
    done = run("--help", stdout=writing)
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == "vr-jax: nobody reads the output any more, so the command ends\n"


@pytest.mark.parametrize(
    ("text", "path", "reason"),
    [
        (
            'UNAVAILABLE: Error opening "zarr" driver: Error reading "o/.zarray" in OCDBT database at gs://b/r/: '
            "Error reading gs://b/r/manifest.ocdbt: HTTP response code: 503 [source locations='x.cc:1']",
            "gs://b/r/manifest.ocdbt",
            "HTTP response code: 503;",
        ),
        (
            'OUT_OF_RANGE: Error writing "a/0" in OCDBT database at gs://b/c/: Error reading Byte range [0, 9) of '
            "gs://b/c/d: Requested byte range [0, 9) is not valid for value of size 4 [tensorstore_spec='{}']",
            "gs://b/c/d",
            "Requested byte range [0, 9) is not valid for value of size 4;",
        ),
    ],
)
def test_a_store_that_tensorstore_cannot_reach_is_one_line(text, path, reason):
    found = str(failures.as_user_error(ValueError(text)))
    assert found.startswith(f"{path} cannot be read or written: after several attempts the store answers: {reason}")
    with pytest.raises(UserError, match="start the same command again"), file_errors("x cannot be written"):
        raise ValueError(text)
