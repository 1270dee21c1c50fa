"""Damaged folders, drawn at random from a fixed seed: each is imported, or refused in one line that names the file."""

from __future__ import annotations

import json
import random
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert.onevision_folder import write_folder
from tests.convert.test_black_box import SHAPES
from vr_jax.convert import config_fields
from vr_jax.convert.importing import plan_import
from vr_jax.convert.preprocessing import IMAGE_PROCESSOR_TABLE
from vr_jax.convert.weights import Checkpoint
from vr_jax.errors import UserError
from vr_jax.model_directory import GENERATION_TABLE

JUNK = [None, True, False, -1, 0, 1, 3, 2**31, 2**70, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "384",
        "(1x1),...,(9999x9999)", [], [0], [[24]], ["a", None], {}, {"a": {"b": 1}}, [2**70] * 3, "\ud800"]  # fmt: skip
FILES = ("config.json", "preprocessor_config.json", "generation_config.json", "tokenizer.json")
# Fields without meaning, which may hold anything.
HARMLESS = {
    "config.json": sorted(config_fields.ONEVISION_FIELDS.without_meaning),
    "preprocessor_config.json": sorted(IMAGE_PROCESSOR_TABLE.without_meaning),
    "generation_config.json": sorted(GENERATION_TABLE.without_meaning),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete folder of a tiny model."""
    shape = next(iter(SHAPES.values()))
    return write_folder(
        tmp_path_factory.mktemp("whole") / "hf",
        vision=shape["vision"] | shape["pixels"],
        text=shape["text"] | shape["rest"],
        grids=shape["grids"],
        processor=shape["processor"],
        generation=shape["generation"],
    )


def places(value, path=()):
    """The paths of all values in a JSON object."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        if len(path) < 3:
            yield from places(part, (*path, key))


def damage(text: str, rng: random.Random) -> str:
    """The text of a JSON file with one value replaced or removed, or cut off, or with a byte changed."""
    kind = rng.randrange(10)
    if kind == 0:
        return text[: rng.randrange(len(text))]
    if kind == 1:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice('{}[]",:0x') + text[at + 1 :]
    values = json.loads(text)
    path = rng.choice(sorted(places(values), key=str)[:400])
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    if kind == 2:
        del parent[path[-1]]
    else:
        parent[path[-1]] = rng.choice(JUNK)
    return json.dumps(values)


def harmless(name: str, text: str, rng: random.Random) -> str:
    """The text with anything in a field that has no meaning here."""
    return json.dumps(json.loads(text) | {rng.choice(HARMLESS[name]): rng.choice(JUNK)})


def refusal(act) -> str | None:
    """The message of the UserError that a function raises, or None; any other error passes."""
    try:
        act()
    except UserError as error:
        return str(error)
    return None


def check_damaged_json(whole, tmp_path, seed: int) -> None:
    rng = random.Random(seed)
    folder = tmp_path / str(seed)
    shutil.copytree(whole, folder)
    valid = seed % 3 == 0
    name = rng.choice(FILES[:3] if valid else FILES)
    text = (folder / name).read_text()
    (folder / name).write_text(harmless(name, text, rng) if valid else damage(text, rng), errors="surrogatepass")
    if valid:
        plan_import(folder, report=lambda line: None)
        return
    message = refusal(lambda: plan_import(folder, report=lambda line: None))
    assert message is None or str(folder) in message
    shutil.rmtree(folder)


@pytest.mark.parametrize("seed", range(9))
def test_a_few_damaged_json_files(whole, tmp_path, seed):
    check_damaged_json(whole, tmp_path, seed)


@pytest.mark.slow  # Each of the 600 cases builds the shapes of a model.
def test_many_damaged_json_files(whole, tmp_path):
    for seed in range(9, 609):
        check_damaged_json(whole, tmp_path, seed)


def weights_file() -> tuple[dict, bytes]:
    """The header and the data of a valid safetensors file."""
    header = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "__metadata__": {"format": "pt"},
    }
    return header, bytes(range(32))


def check_damaged_weights(folder, seed: int) -> None:
    rng = random.Random(seed)
    header, data = weights_file()
    valid, kind = seed % 3 == 0, rng.randrange(6)
    text = json.dumps(header)
    if not valid and kind < 3:
        text = damage(text, rng)
    content = text.encode("utf-8", "surrogatepass") + (b" " * rng.randrange(9) if valid else b"")
    length = len(content)
    if not valid and kind == 3:
        length = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
    whole = struct.pack("<Q", length) + content + data
    if not valid and kind == 4:
        whole = whole[: rng.randrange(len(whole))]
    if not valid and kind == 5:
        at = rng.randrange(len(whole))
        whole = whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :]
    (folder / "model.safetensors").write_bytes(whole)
    found: list[int] = []

    def read() -> None:
        checkpoint = Checkpoint(folder)
        names = {name: None for name, one in checkpoint.tensors.items() if one.dtype in ("F32", "BF16")}
        found.extend(array.nbytes for _, array in checkpoint.read(names))

    message = refusal(read)
    if valid:
        assert (message, found) == (None, [24, 8])
    elif message is not None:
        assert str(folder / "model.safetensors") in message
        assert "\n" not in message


@pytest.mark.parametrize("count", [300, pytest.param(9700, marks=pytest.mark.slow)])
def test_damaged_safetensors(count, tmp_path):
    for seed in range(count):
        check_damaged_weights(tmp_path, seed + 10_000 * (count > 300))


def test_a_weight_file_that_is_a_folder_or_cannot_be_read(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UserError, match="holds no weights"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rmdir()
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).tensors["x"].shape == (1,)
