"""The parser of the commands' flags: values, spellings, and one line for every mistake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from vr_jax.cli.flags import Command, Flags, UsageError, flag, help_text, parse
from vr_jax.errors import UserError
from vr_jax.fields import Range


@dataclass(frozen=True, kw_only=True)
class Table(Flags):
    """A flag of every kind."""

    folder: str = flag(help="The folder. It must exist.", metavar="DIR")
    name: str | None = flag(None, "The name.", positional=True)
    batch_size: Annotated[int, Range(1)] = flag(16, "Items in a batch.")
    rate: Annotated[float, Range(0, 1, open_low=True)] | None = flag(None, "The rate.")
    dtype: Literal["float32", "bfloat16"] | None = flag(None, "The type.")
    image: tuple[str, ...] = flag((), "An image.")
    source: tuple[tuple[str, str], ...] = flag((), "A model.", name=("config", "checkpoint"))
    overwrite: bool = flag(False, "Replace the results.")
    progress: bool = flag(True, "Show progress.")
    process_id: Annotated[int, Range(0)] | None = flag(None, "The process.", environment="VR_JAX_TEST_PROCESS")
    overrides: tuple[str, ...] = flag((), "Sets a field.", overrides=True)


def test_defaults():
    table = parse(Table, ["--folder=a"])
    assert table == Table(folder="a")
    assert (table.batch_size, table.rate, table.overwrite, table.progress) == (16, None, False, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch_size=8"],
        ["--batch-size=8"],
        ["--batch_size", "8"],
        ["--batch-size", "8"],
        ["--batch_size=4", "--batch_size=8"],
    ],
)
def test_spellings(arguments):
    assert parse(Table, ["--folder=a", *arguments]).batch_size == 8


def test_values_of_every_kind():
    arguments = ["--folder=a=b", "who", "--rate", "0.5", "--dtype=float32", "--image=x", "--image", "y", "--overwrite"]
    table = parse(Table, [*arguments, "--no_progress", "--checkpoint=c", "--config=f:v", "--checkpoint=d"])
    assert (table.folder, table.name, table.rate, table.dtype) == ("a=b", "who", 0.5, "float32")
    assert table.image == ("x", "y")
    assert table.source == (("checkpoint", "c"), ("config", "f:v"), ("checkpoint", "d"))
    assert (table.overwrite, table.progress) == (True, False)
    assert parse(Table, ["--folder=a", "--progress=false", "--overwrite=True"]).overwrite


def test_what_follows_two_dashes_is_no_flag():
    assert parse(Table, ["--folder=a", "--", "--what?"]).name == "--what?"
    assert parse(Table, ["--folder=a", "-1"]).name == "-1"


def test_overrides_keep_their_order_and_their_text():
    arguments = ["--config.mesh.fsdp=2", "--folder=a", "--config.optimizer.lr", "1e-4", "--config.trainable=('a=b',)"]
    assert parse(Table, arguments).overrides == ("mesh.fsdp=2", "optimizer.lr=1e-4", "trainable=('a=b',)")


def test_a_default_from_the_environment(monkeypatch):
    monkeypatch.setenv("VR_JAX_TEST_PROCESS", "3")
    assert parse(Table, ["--folder=a"]).process_id == 3
    assert parse(Table, ["--folder=a", "--process_id=4"]).process_id == 4
    monkeypatch.setenv("VR_JAX_TEST_PROCESS", "x")
    with pytest.raises(UserError, match=r"\$VR_JAX_TEST_PROCESS=x: expected an integer >= 0"):
        parse(Table, ["--folder=a"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--folder is missing: give --folder=DIR. The folder."),
        (["--foldr=a"], "unknown flag --foldr; did you mean --folder? known: --folder, --batch_size, --rate"),
        (["--no_folder"], "unknown flag --no_folder; did you mean --folder?"),
        (["--folder"], "--folder needs a value: --folder=VALUE"),
        (["--folder", "--overwrite"], "--folder needs a value"),
        (["--folder=a", "b", "c"], "unexpected argument 'c'; flags start with --"),
        (["--folder=a", "--batch_size=0"], "--batch_size=0: expected an integer >= 1"),
        (["--folder=a", "--batch_size=1.5"], "--batch_size=1.5: expected an integer >= 1"),
        (["--folder=a", "--rate=nan"], "--rate=nan: expected a finite number > 0 and <= 1"),
        (["--folder=a", "--rate=0"], "--rate=0: expected a finite number > 0 and <= 1"),
        (["--folder=a", "--dtype=int8"], "--dtype=int8: expected one of 'float32', 'bfloat16'"),
        (["--folder=a", "--overwrite=maybe"], "--overwrite=maybe: expected true or false"),
        (["--folder=a", "--config.seed"], "--config.seed needs a value"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        parse(Table, arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_a_table_without_overrides_refuses_them():
    @dataclass(frozen=True, kw_only=True)
    class Plain(Flags):
        """One flag."""

        folder: str | None = flag(None, "The folder.")

    with pytest.raises(UsageError, match=r"unknown flag --config\.seed"):
        parse(Plain, ["--config.seed=1"])


def test_a_field_without_the_prefix_of_the_config_names_it():
    with pytest.raises(UsageError, match=r"unknown flag --optimizer\.lr; .* is set by --config\.optimizer\.lr=VALUE"):
        parse(Table, ["--optimizer.lr=1"])


def test_the_help_tells_every_flag():
    text = help_text("vr-jax try", Command("Try it.", Table, lambda flags: 0, details="More.\n\nStill more."))
    assert text.startswith("Try it.\n\nusage: vr-jax try --folder=DIR [NAME] [flags]\n\nMore.\n\nStill more.\n")
    for part in (
        "--folder=DIR",
        "(required)",
        "--batch_size=INTEGER",
        "(>= 1; default 16)",
        "(> 0 and <= 1)",
        "--dtype=float32|bfloat16",
        "--config=TEXT, --checkpoint=TEXT",
        "(may be repeated)",
        "--overwrite",
        "--no_progress",
        "--config.FIELD=VALUE",
        "environment: VR_JAX_TEST_PROCESS",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100
