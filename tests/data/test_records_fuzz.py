"""Random records and images: each becomes a sample or a skip that names the field, and valid ones are accepted."""

import base64
import copy
import io
import json
import random
import re
import resource
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.samples import small_config
from vr_jax.data.images import FORMATS
from vr_jax.data.llava_json import LlavaJsonSource
from vr_jax.data.llava_parquet import LlavaParquetSource
from vr_jax.data.processor import Processor
from vr_jax.data.records import ImageFolder, conversation_of
from vr_jax.data.skips import REASONS, SkipRecord
from vr_jax.data.tfds_builder import row_of
from vr_jax.data.types import Example, Skip
from vr_jax.errors import UserError
from vr_jax.model.batch import BatchShape

SECONDS, GROWTH = 5.0, 512 << 20  # bounds of one case, and of the memory of all of them
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F")
JUNK = (
    *(
        None,
        True,
        0,
        -1,
        3.5,
        float("nan"),
        10**30,
        "",
        "x",
        "<image>",
        "a\0b",
        "\ud800",
        "\u2028",
        "x" * 20_000,
        b"",
        b"x",
    ),
    *(
        [],
        [None],
        [[[]]],
        {},
        {"a": {"b": 1}},
        "data:",
        "data:image/png;base64,@@",
        "http://a/b.png",
        "../x",
        "/etc/passwd",
    ),
    *({"type": "image"}, {"type": "video", "video": "a"}, {"bytes": None, "path": None}, [{"role": "user"}], "[" * 500),
)
KEYS = (
    *("id", "image", "images", "conversations", "messages", "system", "video", "image_2", "tools", "width", "source"),
    *(
        "from",
        "value",
        "role",
        "content",
        "type",
        "text",
        "image_url",
        "url",
        "index",
        "bytes",
        "path",
        "base64",
        "weight",
    ),
)


def random_image(rng: random.Random) -> bytes:
    """An encoded image of a random mode, format and shape."""
    while True:
        width, height = rng.choice(
            [(rng.randint(1, 90), rng.randint(1, 90)), (1, rng.randint(1, 3000)), (rng.randint(1, 3000), 1)]
        )
        pixels = np.frombuffer(rng.randbytes(width * height * 4), np.uint8).reshape(height, width, 4)
        mode = rng.choice(MODES)
        if mode == "I;16":
            image = Image.fromarray(pixels[..., :2].copy().view("<u2")[..., 0])
        elif mode in ("I", "F"):
            image = Image.fromarray(
                (pixels[..., 0] / 255).astype(np.float32) if mode == "F" else pixels[..., 0].astype(np.int32)
            )
        else:
            image = (
                Image.fromarray(pixels)
                .convert("RGB" if mode in ("LAB", "HSV", "YCbCr", "CMYK") else "RGBA")
                .convert(mode)
            )
        stream = io.BytesIO()
        try:
            image.save(stream, rng.choice(FORMATS))
        except (OSError, ValueError, KeyError):  # The format does not have this mode.
            continue
        return stream.getvalue()


def form_of(rng: random.Random, data: bytes, folder) -> object:
    """One of the forms in which a record contains or names an image."""
    text = base64.b64encode(data).decode()
    name = f"{rng.randrange(10**9)}.img"
    (folder / name).write_bytes(data)
    forms = [
        name,
        {"path": name},
        {"bytes": data, "path": None},
        data,
        {"bytes": text},
        f"data:image/png;base64,{text}",
    ]
    return rng.choice(forms)


def valid_record(rng: random.Random, folder, pool: list[bytes]) -> tuple[dict, int]:
    """A record that has to be accepted, apart from what its images are, and its number of images."""
    count = rng.choice([0, 1, 1, 1, 2, 3])
    images = [form_of(rng, rng.choice(pool), folder) for _ in range(count)]
    question = rng.choice(["What?", "What does <image> mean?", "Größe 😀\n", " "])
    reply = rng.choice(["A car.", "It is <image>.", "<image>", ""])
    who, what, user, assistant = rng.choice(
        [("from", "value", "human", "gpt"), ("role", "content", "user", "assistant"), ("from", "value", "User", "bot")]
    )
    record: dict = {}
    if what == "content" and rng.random() < 0.6:
        own = rng.random() < 0.5
        parts = [{"type": "image"} | ({"image": one} if own else {}) for one in images]
        content = [*parts, {"type": "text", "text": question}]
        if not own and images:
            record["images"] = images
    else:
        content = "<image>\n" * count + question
        if count:
            record[rng.choice(["image", "images"])] = images[0] if count == 1 and rng.random() < 0.5 else images
    talk = [{who: user, what: content}, {who: assistant, what: reply}]
    if rng.random() < 0.3:
        talk += [{who: user, what: "And?"}, {who: assistant, what: "So."}]
    if rng.random() < 0.2:
        talk.insert(0, {who: "system", what: "Be brief."})
    elif rng.random() < 0.2:
        record["system"] = "Be brief."
    record[rng.choice(["conversations", "messages"])] = talk
    if rng.random() < 0.7:
        record["id"] = rng.choice(["a", 7, "sample/1"])
    extra = {
        "source": "coco",
        "width": 3,
        "image_id": "x",
        "video": None,
        "metadata": {"boxes": [[1, 2]]},
        "has_image": True,
    }
    return record | {key: extra[key] for key in rng.sample(sorted(extra), rng.randrange(3))}, count


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths of all values inside a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, one in items for inner in places(one, (*path, key)))]


def malformed(rng: random.Random, record: object) -> object:
    """Changes one to three values of a record: replaced, removed, repeated, under another key, cut off."""
    for _ in range(rng.randint(1, 3)):
        *path, key = rng.choice(places(record)[1:] or [("id",)]) if isinstance(record, dict) and record else ("id",)
        if not isinstance(record, dict):
            return copy.deepcopy(rng.choice(JUNK))
        owner = record
        for step in path:
            owner = owner[step]
        action = rng.randrange(6)
        value = owner[key] if isinstance(owner, list) or key in owner else None
        if action == 0 and isinstance(owner, dict):
            owner.pop(key, None)
        elif action == 1 and isinstance(owner, dict):
            owner[rng.choice(KEYS)] = value
        elif action == 2 and isinstance(owner, list):
            owner.insert(key, value)
        elif action == 3 and isinstance(value, str | bytes) and value:
            owner[key] = value[: rng.randrange(len(value))]
        elif action == 4 and isinstance(owner, dict):
            owner[rng.choice(KEYS)] = copy.deepcopy(rng.choice(JUNK))
        else:
            owner[key] = copy.deepcopy(rng.choice(JUNK))
    return copy.deepcopy(rng.choice(JUNK)) if rng.random() < 0.02 else record


def prepared(processor: Processor, record: object, folder: ImageFolder) -> Example | Skip:
    found = conversation_of(record, "record", folder)
    if isinstance(found, Skip):
        return found
    row = row_of(found)
    try:
        return processor.example(found) if not isinstance(row, Skip) else row
    except SkipRecord as error:
        return error.as_skip(found.id)


@pytest.mark.parametrize(
    "cases",
    [
        200,
        pytest.param(10_000, marks=pytest.mark.slow(reason="ten thousand records take minutes")),
    ],
)
def test_every_record_becomes_a_sample_or_a_skip(tokenizer, tmp_path, cases):
    """A third of the records is valid and must be accepted; the others are damaged, in their fields or their images."""
    rng = random.Random(0)
    limits = BatchShape(rows=1, tokens=4096, tiles=64, tile_size=32)
    processor = Processor(tokenizer, small_config()).limited_to(limits)
    folder = ImageFolder(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reasons = set()
    pool = [random_image(rng) for _ in range(30 + cases // 20)]
    for number in range(cases):
        record, count = valid_record(rng, tmp_path, pool)
        if number % 3:
            record = malformed(rng, record)
        begin = time.process_time()
        found = prepared(processor, record, folder)
        assert time.process_time() - begin < SECONDS, number
        if isinstance(found, Skip):
            assert found.reason in REASONS
            assert found.detail.strip()
            assert found.detail.isprintable()
            reasons.add(found.reason)
        if number % 3 == 0:
            refused = isinstance(found, Skip) and found.reason != "image_mode"
            assert not refused, (number, found)
            assert isinstance(found, Skip) or found.tile_image.max(initial=0) == count
    assert len(reasons) >= 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH >> 10


def without_bytes(value: object) -> object:
    """A record that JSON can hold."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {str(key): without_bytes(one) for key, one in value.items()}
    return [without_bytes(one) for one in value] if isinstance(value, list) else value


def test_damaged_files_of_records_give_one_line_or_records(tmp_path):
    """JSON, JSONL and parquet files with random damage open or are refused in one line."""
    rng = random.Random(1)
    pool = [random_image(rng) for _ in range(4)]
    records = [without_bytes(malformed(rng, valid_record(rng, tmp_path, pool)[0])) for _ in range(12)]
    talk = [[{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]] * 12
    table = pa.table({"image": pool * 3, "conversations": talk})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3, compression="none")
    files = {
        "a.json": (json.dumps(records).encode(), LlavaJsonSource),
        "a.jsonl": ("\n".join(json.dumps({"r": one}) for one in records).encode(), LlavaJsonSource),
        "b.parquet": ((tmp_path / "a.parquet").read_bytes(), lambda path: LlavaParquetSource([path])),
    }
    messages = []
    for name, (data, source_of) in files.items():
        path = tmp_path / name
        for _ in range(15):
            damaged = bytearray(data)
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.randrange(8)] = rng.randbytes(rng.randrange(8))
            path.write_bytes(bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])]))
            try:
                source = source_of(path)
            except UserError as error:
                messages.append(str(error))
            else:
                found = [source[index] for index in range(len(source))]
                assert all(isinstance(one, Skip) or one.turns for one in found)
    assert len(messages) > 5
    for message in messages:
        assert re.search(r"/[ab]\.(json|jsonl|parquet)", message)
        assert message.count("\n") == 0
