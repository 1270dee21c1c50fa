"""What a text means that names a file or a folder, and that every flag and field that holds one is declared so."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from pathlib import Path

import pytest

from tests.training.tiny import tiny_run
from vr_jax.cli.flags import Flags, Group
from vr_jax.cli.main import COMMANDS, main
from vr_jax.errors import ConfigError, UserError
from vr_jax.fields import Config, field_types, path_mark, path_values
from vr_jax.path_text import PathMark, check_path_text, is_bucket
from vr_jax.settings import TrainConfig
from vr_jax.storage import store


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("runs/a", "runs/a"),
        ("~/runs", "/home/ann/runs"),
        ("~", "/home/ann"),
        ("a~b", "a~b"),
        ("file:///tmp/a%20b", "/tmp/a b"),
        ("file://localhost/tmp/a", "/tmp/a"),
        ("gs://bucket/run", "gs://bucket/run"),
        ("S3://bucket/run", "s3://bucket/run"),
        ("runs/[a]*?{b}", "runs/[a]*?{b}"),
        ("C:/x", "C:/x"),
    ],
)
def test_home_folders_are_expanded_and_buckets_stay(text, meaning, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert check_path_text(text, "--workdir") == meaning


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--workdir is empty; give the path of a file or a folder, or leave it out"),
        ("  ", "--workdir is empty"),
        ("~nobody_of_that_name/a", "--workdir = ~nobody_of_that_name/a: the home folder ~nobody_of_that_name is not"),
        ("https://host/a.json", "an address of the kind https:// cannot be read"),
        ("file://host/a", "expected file:///PATH"),
        ("gs://", "the name of the bucket is missing"),
        ("gs:/bucket/run", "a path of a bucket begins with gs://"),
        ("s3:bucket", "a path of a bucket begins with s3://"),
        ("a\0b", "cannot hold the character NUL"),
    ],
)
def test_what_is_no_path_is_refused_by_the_name_of_its_flag(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        check_path_text(text, "--workdir")
    assert str(error.value).startswith("--workdir ")


def test_lists_and_unset_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    several = PathMark(several=True)
    assert check_path_text("~/a,~/b", "init_from", several) == "/home/ann/a,/home/ann/b"
    assert check_path_text("~/a, gs://b/c", "init_from", several) == "/home/ann/a, gs://b/c"
    assert check_path_text("", "images", PathMark(optional=True)) == ""
    with pytest.raises(ConfigError):
        check_path_text(" ", "images", PathMark(optional=True))
    for commas in (",", " , ,"):
        with pytest.raises(ConfigError, match=r"^config.data.path = .* names nothing; give paths with commas between"):
            check_path_text(commas, "config.data.path", several)
    assert is_bucket("s3://a")
    assert not is_bucket("gs:/a")


def flag_tables():
    """The flag table of every command and action."""
    for name in COMMANDS:
        found = importlib.import_module(f"vr_jax.cli.{name}").COMMAND
        parts = [*found.actions.values(), found.default] if isinstance(found, Group) else [found]
        yield from ((name, part.flags) for part in parts if part is not None)


def config_classes(table: type[Config]):
    """A config class and those of its sections."""
    yield table
    for hint in field_types(table).values():
        for one in (hint, *getattr(hint, "__args__", ())):
            if isinstance(one, type) and issubclass(one, Config):
                yield from config_classes(one)


def is_declared(hint) -> bool:
    """Whether an annotation, or a part of it, is that of a path."""
    return path_mark(hint) is not None or any(map(is_declared, getattr(hint, "__args__", ())))


# Words of a flag's help or of a field's description that say that its value is a path.
_SAYS_PATH = re.compile(
    r"^(an? |the )?((image|config|jsonl|siglip|qwen2|model) )?(file|folder|director|image of)", re.IGNORECASE
)
_PATH_WORD = re.compile(r"\b(DIR|FILE|PATH|FOLDER|RESULTS|MODEL)\b")


def described_fields(table: type[Config]) -> dict[str, str]:
    """What the docstring of a config says about each of its fields."""
    return dict(re.findall(r"^ {8}(\w+): (.+)$", table.__doc__ or "", re.MULTILINE))


@pytest.mark.parametrize(("name", "table"), flag_tables(), ids=lambda value: getattr(value, "__name__", value))
def test_every_flag_that_names_a_path_is_declared_as_one(name, table: type[Flags]):
    for field, hint in field_types(table).items():
        info = table.__dataclass_fields__[field].metadata["flag"]
        says = _PATH_WORD.search(info.metavar) or _SAYS_PATH.search(info.help)
        if says and (name, field) != ("efficiency", "score"):  # NAME=FILE, whose file is checked when it is split
            assert is_declared(hint), f"vr-jax {name}: --{field} names a path; declare it as PathText"


def test_every_field_of_the_settings_that_names_a_path_is_declared_as_one():
    for table in config_classes(TrainConfig):
        for field, text in described_fields(table).items():
            if _SAYS_PATH.search(text) or field in ("path", "images", "init_from", "tokenizer", "checkpoint_dir"):
                hint = field_types(table).get(field)
                assert hint in (bool, int) or is_declared(hint) or issubclass(hint, Config), f"{table.__name__}.{field}"


def test_the_paths_of_the_settings_are_known_by_name():
    settings = tiny_run(init_from="~/a, gs://b/c", tokenizer="demo").replace(
        {"data.path": "/d", "eval.data": "/e", "probe.output": "/o"}
    )
    found = list(path_values(settings))
    home = str(Path.home())
    assert ("config.init_from", f"{home}/a") in found
    assert ("config.init_from", "gs://b/c") in found
    assert {name for name, _ in found} == {
        *("config.init_from", "config.tokenizer", "config.data.path", "config.eval.data", "config.probe.output"),
    }


def needed(table: type[Flags]) -> list[str]:
    """Arguments for the flags of a command that have no default."""
    words = []
    for one in dataclasses.fields(table):
        field, info = one.name, one.metadata["flag"]
        if one.default is dataclasses.MISSING:
            words += ["a"] if info.positional else [f"--{(info.names or (field,))[0]}=a"]
    return words


def path_flags():
    """Every flag that is declared as a path, with a command line that gives it the value VALUE."""
    for name in COMMANDS:
        found = importlib.import_module(f"vr_jax.cli.{name}").COMMAND
        parts = {(action,): one for action, one in found.actions.items()} if isinstance(found, Group) else {(): found}
        if isinstance(found, Group) and found.default is not None:
            parts[()] = found.default
        for words, command in parts.items():
            for field, hint in field_types(command.flags).items():
                if is_declared(hint):
                    info = command.flags.__dataclass_fields__[field].metadata["flag"]
                    flag = "VALUE" if info.positional else f"--{(info.names or (field,))[-1]}=VALUE"
                    others = [one for one in needed(command.flags) if not info.positional or one != "a"]
                    yield pytest.param([name, *words, *others, flag], id="-".join([name, *words, field]))


@pytest.mark.parametrize("arguments", path_flags())
@pytest.mark.parametrize("value", ["gs://bucket/a", "s3://bucket/a"])
def test_no_command_takes_a_bucket_for_a_folder(arguments, value, tmp_path, monkeypatch, capsys):
    """Without the library for its store, each command ends with one line, and nothing is written to the disk."""

    def absent(path):
        raise UserError(f"{path}: no such library")

    monkeypatch.setattr(store, "filesystem", absent)
    monkeypatch.chdir(tmp_path)
    assert main([argument.replace("VALUE", value) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert len([line for line in error.splitlines() if line.startswith("vr-jax")]) == 1, error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", path_flags())
@pytest.mark.parametrize("value", ["", "gs:/bucket/a", "~nobody_of_that_name/a"])
def test_no_command_takes_an_empty_path_or_a_spoiled_address(arguments, value, tmp_path, monkeypatch, capsys):
    """One line, and nothing is written: no folder named gs: and none named ~."""
    monkeypatch.chdir(tmp_path)
    assert main([argument.replace("VALUE", value) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "empty" in error if not value else value in error
    assert os.listdir(tmp_path) == []
