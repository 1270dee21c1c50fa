import json
from pathlib import Path

import pytest

from tests.data.samples import png
from vr_jax.cli import main as program
from vr_jax.data.sources import open_source
from vr_jax.data.types import Conversation, Skip
from vr_jax.errors import UserError


def main(arguments):
    return program.main(["prepare", *arguments])


TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Größe 😀\n"}]
RECORDS = [
    {"id": "one", "image": "0.png", "conversations": TALK},
    {"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]},
    {"id": "two", "image": ["0.png", "1.png"], "conversations": TALK},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(png(seed=k))
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    return tmp_path


def with_bytes(conversation: Conversation) -> Conversation:
    images = tuple(image.read_bytes() for image in conversation.images)
    return Conversation(conversation.id, conversation.turns, images)


def test_round_trip(folder, capsys):
    assert main(["--from", str(folder / "data.json"), "--to", str(folder / "set")]) == 0
    written = folder / "set" / "llava_conversations" / "1.0.0"
    assert f"wrote 3 of 3 records to {written}" in capsys.readouterr().out
    original = open_source(folder / "data.json")
    for path in (folder / "set", written):
        found = open_source(path)
        assert [found[k] for k in range(len(found))] == [with_bytes(original[k]) for k in range(3)]
    with pytest.raises(UserError, match=r"there is no split 'test'; the set has train"):
        open_source(written, split="test")

    assert main(["--from", str(folder / "data.json"), "--to", str(folder / "set")]) == 2
    assert "there is a prepared set already" in capsys.readouterr().err

    (record_file,) = written.glob("*.array_record*")
    content = record_file.read_bytes()
    record_file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"1.0.0: the split 'train' is damaged"):
        open_source(written)
    record_file.unlink()
    with pytest.raises(UserError, match=r"array_record-00000-of-00001: no such file"):
        open_source(written)
    (written / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"1.0.0: the prepared set cannot be read"):
        open_source(written)


def test_many_files_keep_order_and_an_empty_one_is_no_harm(folder):
    records = [RECORDS[0] | {"id": f"r{k}"} for k in range(9)]
    for k in (3, 4, 5):  # the whole second file
        records[k] = records[k] | {"image": "gone.png"}
    (folder / "data.json").write_text(json.dumps(records))
    arguments = ["--from", str(folder / "data.json"), "--to", str(folder / "set"), "--records-per-shard", "3"]
    assert main([*arguments, "--max-skipped", "0.4"]) == 0
    assert len(list(folder.glob("set/**/*.array_record*"))) == 3
    source = open_source(folder / "set")
    assert [source[k].id for k in range(len(source))] == ["r0", "r1", "r2", "r6", "r7", "r8"]


def test_damaged_chunks_become_skips(folder):
    main(["--from", str(folder / "data.json"), "--to", str(folder / "set"), "--split", "test"])
    (record_file,) = folder.glob("set/**/*.array_record*")
    data = bytearray(record_file.read_bytes())
    at = data.find(b"\x89PNG")  # inside a record's chunk
    data[at : at + 20] = b"\xff" * 20
    record_file.write_bytes(bytes(data))
    source = open_source(folder / "set", split="test")
    found = [source[k] for k in range(3)]
    assert any(isinstance(one, Skip) and one.reason == "malformed_record" for one in found)


def test_unusable_records_are_left_out_and_listed(folder, capsys):
    (folder / "broken.png").write_bytes(b"no image")
    records = [*RECORDS, {"id": "bad", "image": "broken.png", "conversations": TALK}, {"id": "gone", "image": "x.png"}]
    (folder / "data.json").write_text(json.dumps(records))
    arguments = ["--from", str(folder / "data.json"), "--to", str(folder / "set")]
    assert main(arguments) == 4
    error = capsys.readouterr().err
    assert "2 records of 5 that cannot be used" in error
    assert "bad: " in error
    assert "gone: " in error
    assert not list(folder.glob("set/**/*.array_record*"))
    assert not list(folder.glob("set/**/dataset_info.json"))
    assert main([*arguments, "--max-skipped", "0.5"]) == 0
    assert "wrote 3 of 5 records" in capsys.readouterr().out
    assert len(open_source(folder / "set")) == 3


CHECKED = ["--check", "--config=configs/demo.py"]


def test_a_check_reports_everything_and_writes_no_set(folder, capsys, monkeypatch):
    """Records for the demo's model, whose rows have 256 tokens and 4 tiles."""
    talk = [{"from": "human", "value": "<image>\nWhat <b>is</b> it?"}, {"from": "gpt", "value": "a bar"}]
    records = [{"id": f"r{k}", "image": f"{k % 2}.png", "conversations": talk} for k in range(6)]
    records.append({"id": "long", "conversations": [talk[0] | {"value": "word " * 300}, talk[1]]})
    records.append({"id": "gone", "image": "x.png", "conversations": talk})
    records.append(
        {"id": "five", "image": ["0.png"] * 5, "conversations": [talk[0] | {"value": "<image>" * 5}, talk[1]]}
    )
    (folder / "data.json").write_text(json.dumps(records))
    data = f"--config.data.path={folder / 'data.json'}"
    page = folder / "page.html"
    assert main([*CHECKED, data, f"--page={page}"]) == 4
    out = capsys.readouterr().out
    assert "9 records: 6 can be used, 3 cannot (33.33%, above the limit of 1.00%, max_skipped)" in out
    for line in (
        "missing_image (1); set data.images to the folder",
        "too_long (1); raise batch.tokens",
        "too_many_tiles (1); raise batch.tiles",
        "  five: The sample has 5 tiles, but a row has room for 4.",
    ):
        assert line in out
    tokens = next(line.split() for line in out.splitlines() if line.startswith("tokens"))
    assert int(tokens[1]) < 60
    assert int(tokens[-1]) > 300, "the lengths of samples that do not fit are reported"
    assert "holds 3.0 samples" in out, "six samples of one tile fill two rows of four tiles"
    html = page.read_text()
    assert "<mark>a bar" in html
    assert "What &lt;b&gt;is&lt;/b&gt; it?" in html
    assert html.count("<article>") == 6
    assert html.count("data:image/webp") == 6
    assert not list(folder.glob("**/*.array_record*"))
    assert main([*CHECKED, data, f"--page={page}", "--max_skipped=0.4"]) == 0
    assert main([*CHECKED, data, f"--page={page}", "--config.data.max_skipped=0.4"]) == 0


def test_a_check_without_a_config_reads_records_and_images(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "cut.png").write_bytes(png()[:200])
    (folder / "data.json").write_text(json.dumps([*RECORDS, {"id": "cut", "image": "cut.png", "conversations": TALK}]))
    assert main(["--check", "--from", "data.json"]) == 4
    out = capsys.readouterr().out
    assert "4 records: 3 can be used, 1 cannot" in out
    assert "broken_image (1); fetch or convert these images anew" in out
    assert "tokens" not in out.replace("its tokens", "")
    page = (folder / "check.html").read_text(encoding="utf-8")
    assert "<mark>assistant: Größe 😀" in page
    # The rows of the table keep their width, and the other lines do not: the percentiles and the images.
    assert page.count('<span class="wide">') == 2
    assert '<span class="wide">images ' in page


def test_other_data_than_the_configs_are_checked_with_its_tokens(folder, capsys):
    arguments = [*CHECKED, f"--from={folder / 'data.json'}", f"--page={folder / 'page.html'}"]
    assert main(arguments) == 4
    out = capsys.readouterr().out
    assert "3 records: 2 can be used, 1 cannot" in out
    assert "image_count (1); write one <image> for each image" in out


BAD_TEXTS = {"half a character": "\ud83d", "NUL": "a\0", "a number": 3, "null": None, "too deep": [[["a"]]]}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_text_that_cannot_be_used_is_skipped_alike_everywhere(folder, name, capsys):
    """JSON, and what is prepared from it, skip the record for the same reason; the other records are written."""
    bad = {"id": "bad", "conversations": [{"from": "human", "value": BAD_TEXTS[name]}, {"from": "gpt", "value": "A"}]}
    (folder / "data.json").write_text(json.dumps([*RECORDS, bad]))
    found = open_source(folder / "data.json")[3]
    assert found.reason == "malformed_record"
    assert "conversations[0]" in found.detail
    assert main(["--from", str(folder / "data.json"), "--to", str(folder / "set"), "--max-skipped", "0.5"]) == 0
    assert "wrote 3 of 4 records" in capsys.readouterr().out


def test_a_text_that_reads_as_a_placeholder_stays_text(folder):
    talk = [{"from": "human", "value": "<image>\nWhat is <image>?"}, {"from": "gpt", "value": "A tag, <image>."}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "<image>"}, {"type": "image", "path": "0.png"}]}]
    records = [{"id": "a", "image": "0.png", "conversations": talk}, {"id": "b", "messages": [*parts, talk[1]]}]
    (folder / "data.json").write_text(json.dumps(records))
    assert main(["--from", str(folder / "data.json"), "--to", str(folder / "set")]) == 0
    original, found = open_source(folder / "data.json"), open_source(folder / "set")
    assert [found[k] for k in range(2)] == [with_bytes(original[k]) for k in range(2)]
    assert [turn.images for turn in found[0].turns] == [1, 0]
    assert found[1].turns[0].parts[0] == "<image>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--from is missing"),
        (["--check"], "--from is missing"),
        (["--from=a.json"], "--to is missing"),
        (["--check", "--from=a.json", "--to=b"], "--to = 'b' has no effect with --check = True: no set is written"),
        (["--check", "--from=a.json", "--beam"], "--beam = True has no effect with --check = True: no set is written"),
        (
            ["--from=a.json", "--to=b", "--page=c.html"],
            "--page = 'c.html' has no effect with --check = False: only a check reads them",
        ),
        (
            ["--from=a.json", "--to=b", "--config=configs/demo.py"],
            "--config = 'configs/demo.py' has no effect with --check = False: only a check reads them",
        ),
        (
            ["--check", "--from=a.json", "--config.seed=1"],
            "--config.FIELD = ('seed=1',) has no effect with --config = None: it sets a field",
        ),
        (["--check", "--config=configs/llava_vr_qwen2_0_5b.py:phase1"], "config.data.path is not set"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "absent.json"], "absent.json: no such file"),
        (["--from", "absent.json", "--format", "llava_parquet"], "absent.json: no such file"),
    ],
)
def test_errors_are_one_line(folder, capsys, arguments, message):
    assert main([*arguments, "--to", str(folder / "set")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_beam_writes_the_same_records(folder, capsys):
    pytest.importorskip("apache_beam", reason="the beam extra is not installed")
    (folder / "x.png").write_bytes(b"no image")
    records = [*RECORDS, {"id": "bad", "image": "x.png", "conversations": TALK}]
    (folder / "data.json").write_text(json.dumps(records))
    arguments = ["--from", str(folder / "data.json"), "--beam", "--to"]
    assert main([*arguments, str(folder / "strict")]) == 4
    assert "1 records of 4 that cannot be used" in capsys.readouterr().err
    assert not list(folder.glob("strict/**/dataset_info.json"))
    assert main([*arguments, str(folder / "set"), "--max-skipped", "0.5", "--records-per-shard", "2"]) == 0
    assert len(list(folder.glob("set/**/*.array_record*"))) == 2
    found = open_source(folder / "set")
    original = open_source(folder / "data.json")
    assert [found[k] for k in range(3)] == [with_bytes(original[k]) for k in range(3)]
    assert len(found) == 3


def test_beam_is_asked_for_by_name(folder, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--from", str(folder / "data.json"), "--beam", "--to", str(folder / "set")]) == 2
    assert "pip install 'vr-jax[beam]'" in capsys.readouterr().err


def test_the_split_is_that_of_the_data(folder):
    """A name that could not be read again is refused before anything is read."""
    for name, record in zip(("train", "validation"), RECORDS[:2], strict=True):
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{name}.json").write_text(json.dumps([record]))
        (folder / "data" / "0.png").write_bytes(png(seed=0))
    assert main(["--from", str(folder / "data"), "--to", str(folder / "set"), "--split=validation"]) == 0
    found = open_source(folder / "set", split="validation")
    assert [found[k].id for k in range(len(found))] == [RECORDS[1]["id"]]


@pytest.mark.parametrize("split", ["a/b", "train[:50%]", "all", "a b"])
def test_a_split_that_could_not_be_read_again_is_refused(folder, capsys, split):
    assert main(["--from", str(folder / "data.json"), "--to", str(folder / "set"), f"--split={split}"]) == 2
    error = capsys.readouterr().err
    assert f"--split = {split!r}: expected letters, digits" in error
    assert error.count("\n") == 1
    assert not (folder / "set").exists()


def test_a_check_refuses_settings_that_it_does_not_read(folder, capsys):
    flags = ["--check", "--config=configs/demo.py", "--config.optimizer.lr=5"]
    assert main([*flags, "--from", str(folder / "data.json")]) == 2
    assert "config.optimizer.lr has no effect on this command" in capsys.readouterr().err
