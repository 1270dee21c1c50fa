"""The page without a browser: what it shows of answers and mistakes, and that it is closed to other hosts."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request

import pytest
from PIL import Image

from tests.app.made_up import Echo, loader, settings
from tests.inference import tiny
from vr_jax.app import Checkpoint, Example, ModelThread, PageOptions
from vr_jax.errors import UserError

pytest.importorskip("gradio", reason="the page is part of the extra 'app'")

from vr_jax.app import page

HOSTILE = "<img src=http://evil.invalid/x onerror=alert(1)> ${1 + 1} {{value}} *a* &amp;"
CONTROLS = (8, 0.0, 1.0, 0, False, False, False)  # as the page starts, without heat maps


@pytest.fixture(autouse=True)
def uploads(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))


@pytest.fixture
def make():
    """Builds a page of stand-ins."""
    with contextlib.ExitStack() as stack:

        def make(*titles, before=lambda number: None):
            thread = ModelThread([loader(Echo(tiny.config(), before)) for _ in titles])
            stack.callback(thread.close)
            checkpoints = tuple(Checkpoint(title, note) for title, note in zip(titles, ((), ("fastv",)), strict=False))
            return page.Page(thread, PageOptions(checkpoints, settings(len(titles))))

        yield make


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(tiny.png(48, 24))
    return str(path)


def ask(one, text, files=(), talk=None, controls=CONTROLS, pruners=None):
    """Asks, and returns the last value of every component, and the conversation."""
    shown = {}
    pruners = ["none"] * len(one.chats) if pruners is None else pruners
    for change in one.ask({"text": text, "files": list(files)}, talk, *controls, *pruners):
        shown |= change
    return shown, shown.get(one.talk, talk)


def test_an_answer_with_its_numbers(make, image):
    one = make("a", "b")
    shown, talk = ask(one, "Which?", [image])
    for chat, numbers in zip(one.chats, one.numbers, strict=True):
        roles = [(message["role"], message["content"]) for message in shown[chat]]
        assert roles[:2] == [("user", {"path": image}), ("user", "Which?")]
        assert roles[2] == ("assistant", "3 tiles, 51 tokens, t = 0.0")
        assert "prompt 51 tokens, 30 of them vision" in shown[numbers]
    assert shown[one.status] == ""
    again, _ = ask(one, "And?", talk=talk)
    assert [len(again[chat]) for chat in one.chats] == [5, 5]


def test_questions_answers_and_names_are_text_and_no_html(make, tmp_path):
    one = make(HOSTILE)
    shown, _ = ask(one, HOSTILE)
    question = shown[one.chats[0]][0]["content"]
    assert "<" not in question
    assert question.startswith("&lt;img src=http://evil.invalid/x")
    assert "&amp;amp;" in question
    bad = tmp_path / "<img src=x onerror=alert(1)>.png"
    bad.write_text("no image")
    shown, _ = ask(one, "Which?", [bad])
    assert shown[one.status].startswith('<p role="alert">&lt;img src=x onerror=alert(1)&gt;.png: The image of 8 bytes')
    config = json.dumps(one.blocks.get_config_file(), default=str)
    assert "<img src=http" not in config.replace('"label": "<img', ""), "only as a label, which is text"


def test_mistakes_are_one_line_and_leave_the_question_in_the_box(make, image, tmp_path):
    one = make("a")
    Image.new("1", (20000, 10000)).save(tmp_path / "huge.png")
    for text, files, message, kept in (
        ("  ", [image], page.EMPTY, [image]),
        ("Which?", [image, tmp_path / "huge.png"], "huge.png: The image has too many pixels", [image]),
        ("a" * (page.MAX_TEXT + 1), [image], page.TOO_LONG, [image]),
        ("Which?", [image] * 100, "100 files were given, but a question may have at most 16 images", []),
    ):
        shown, talk = ask(one, text, files)
        assert message in shown[one.status]
        assert "\n" not in shown[one.status]
        assert "Traceback" not in shown[one.status]
        box = shown[one.box]
        assert box["value"] == {"text": text, "files": kept}
        assert talk is None
    shown, _ = ask(one, "Which?", [image])
    assert shown[one.status] == ""


def test_a_question_that_no_model_can_be_asked_stays_in_the_box(make, image):
    def refuse(number):
        raise UserError("the prompt is too long")

    one = make("a", "b", before=refuse)
    shown, talk = ask(one, "Which?", [image])
    assert shown[one.status] == '<p role="alert">a: the prompt is too long; b: the prompt is too long</p>'
    assert shown[one.box]["value"] == {"text": "Which?", "files": [image]}
    assert talk.messages == [[], []]
    assert [shown[chat] for chat in one.chats] == [[], []]


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ((0, *CONTROLS[1:]), "max_new_tokens = 0"),
        ((8, -1.0, *CONTROLS[2:]), "temperature = -1.0"),
        ((8, 0.0, 2.0, *CONTROLS[3:]), "top_p = 2.0"),
        ((8, 0.0, 1.0, -1, *CONTROLS[4:]), "seed = -1"),
    ],
)
def test_settings_out_of_range_are_one_line(make, controls, message):
    one = make("a")
    shown, _ = ask(one, "Hi", controls=controls)
    assert message in shown[one.status]


def test_the_switches_reach_the_models(make):
    loads = []
    thread = ModelThread([loader(Echo(tiny.config()), loads), loader(Echo(tiny.config()), loads)])
    checkpoints = (Checkpoint("a"), Checkpoint("b", ("fastv",)))
    one = page.Page(thread, PageOptions(checkpoints, settings(2)))
    ask(one, "Hi", controls=(8, 0.0, 1.0, 0, True, False, False), pruners=["none", "fastv"])
    thread.close()
    assert [(variant.pruning, variant.dtype) for variant in loads] == [(None, "bfloat16"), ("fastv", "bfloat16")]


def test_a_stopped_answer_leaves_the_conversation(make, image):
    one = make("a")
    _, talk = ask(one, "Hi")
    run = one.ask({"text": "More?", "files": []}, talk, *CONTROLS, "none")
    next(run)
    next(run)
    run.close()
    assert len(talk.messages[0]) == 2
    assert page.STOPPED in one.stopped()[one.status]
    assert one.forget()[one.talk] is None


@pytest.fixture
def served(make, tmp_path, monkeypatch):
    """A page that is served although the environment asks gradio for a public one."""
    for name in ("GRADIO_SHARE", "GRADIO_MCP_SERVER", "GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
        monkeypatch.setenv(name, "True")
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    blocks = make("a").blocks
    (tmp_path / "examples").mkdir()
    url = page.launch(blocks, "127.0.0.1", None, folder=tmp_path / "examples")
    yield blocks, url
    blocks.close(verbose=False)


def test_the_page_is_closed_to_others(served, tmp_path):
    blocks, url = served
    assert url.startswith("http://127.0.0.1:")
    assert blocks.server_name == "127.0.0.1"
    assert not blocks.share
    assert blocks.share_url is None
    assert not blocks.analytics_enabled
    assert blocks.mcp_server_obj is None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(path):
        with opener.open(f"{url}{path}", timeout=20) as answer:
            return answer.read().decode()

    start = get("")
    for host in ("googleapis", "gstatic", "cdn.", "jsdelivr", "unpkg", "huggingface.co", "api.gradio.app"):
        assert host not in start, host
    named = json.loads(get("gradio_api/info"))
    assert named["named_endpoints"] == {}
    (tmp_path / "secret.txt").write_text("secret")
    with pytest.raises(urllib.error.HTTPError):
        get(f"gradio_api/file={tmp_path}/secret.txt")


def test_an_upload_is_no_page_of_this_site(served):
    """A browser that opens an uploaded file saves it; a script in it would act as the visitor."""
    _, url = served
    for name in ("a.html", "a.svg", "a.xml", "a.js"):
        body = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n<svg/>\r\n--x--\r\n'
        sent = urllib.request.Request(
            f"{url}gradio_api/upload", body.encode(), {"Content-Type": "multipart/form-data; boundary=x"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(sent, timeout=20) as answer:
            [path] = json.loads(answer.read())
        with opener.open(f"{url}gradio_api/file={path}", timeout=20) as answer:
            assert answer.headers["Content-Disposition"].startswith("attachment"), name


def test_a_folder_with_the_uploads_is_not_served(make, tmp_path):
    with pytest.raises(ValueError, match="holds the uploads"):
        page.launch(make("a").blocks, "127.0.0.1", None, folder=tmp_path)


def test_a_port_that_is_taken_is_one_line(served, make, tmp_path):
    _, url = served
    port = int(url.rsplit(":", 1)[1].strip("/"))
    with pytest.raises(
        UserError, match=rf"no page can be served at 127\.0\.0\.1:{port} .*choose another --port"
    ) as caught:
        page.launch(make("b").blocks, "127.0.0.1", port, folder=tmp_path / "examples")
    assert "\n" not in str(caught.value)


def test_an_example_is_offered(make, image):
    thread = ModelThread([loader(Echo(tiny.config()))])
    options = PageOptions((Checkpoint("a"),), settings(), (Example("Which?", image),))
    config = json.dumps(page.Page(thread, options).blocks.get_config_file(), default=str)
    thread.close()
    assert "Which?" in config
