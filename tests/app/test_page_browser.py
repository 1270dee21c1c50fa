"""The page in headless Chromium: a visitor asks, points at the maps, stops, and uploads what cannot be used.

The browser and the page start once. The fixture `found` does everything, and each test reads what came out.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.app.browser import Browser
from tests.app.made_up import Echo, loader, settings, weights
from tests.browser import needs_chromium
from tests.inference import tiny
from vr_jax.app import Checkpoint, Example, ModelThread, PageOptions, session
from vr_jax.app.figure import figures
from vr_jax.inference import Piece

pytest.importorskip("gradio", reason="the page is part of the extra 'app'")

from vr_jax.app import page

pytestmark = [
    needs_chromium,
    pytest.mark.slow,  # A browser is driven through a whole conversation.
]

HOSTILE = (
    "<img src=http://evil.invalid/x onerror=\"document.title='hit'\"> ![](http://evil.invalid/y) ${1 + 1} {{value}}"
)
EVIL_NAME = "<img src=x onerror=document.title='hit'>.png"
SIZE = (48, 24)  # of the example: two tiles of 3 x 3 tokens, of which a row of each is padding


class Hostile(Echo):
    """Answers with HTML, Markdown and templates; a question with "wait" waits in the middle of its answer."""

    def __init__(self, config):
        super().__init__(config)
        self.go, self.waits = threading.Event(), False

    def pieces(self, prompt, **_):
        yield Piece(HOSTILE[:30], 4)
        if self.waits:
            self.go.wait(60)
        yield Piece(HOSTILE[30:], 9, "stop")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "good.png").write_bytes(tiny.png(*SIZE))
    (folder / "example.png").write_bytes(tiny.png(*SIZE, seed=3))
    (folder / "page.png").write_text("<script>document.title = 'hit'</script>")
    (folder / EVIL_NAME).write_text("no image")
    Image.new("1", (20000, 10000)).save(folder / "huge.png")
    for number in range(100):
        Image.new("RGB", (4, 4)).save(folder / f"many{number}.png")
    return folder


class Visitor:
    """What a visitor does on the page."""

    def __init__(self, browser: Browser):
        self.browser = browser

    def ask(self, text: str, *images: Path) -> None:
        if images:
            self.browser.choose_files("#vr-box input[type=file]", list(images))
            self.wait_for_files()
        self.browser.wait("!!document.querySelector('#vr-box .submit-button')")  # It is away while an answer comes.
        self.browser.run("document.querySelector('#vr-box textarea').focus()")
        self.browser.type(text)
        self.browser.key("Enter")

    def insist(self) -> None:
        """Presses Enter until the question has left the box. Right after Stop the page drops the key, not the text."""

        def taken(text: str) -> bool:
            if text:
                self.browser.key("Enter")
                time.sleep(0.5)
            return not text

        self.browser.wait("document.querySelector('#vr-box textarea').value", until=taken)

    def wait_for_files(self) -> None:
        """Waits until the box shows what was uploaded."""
        self.browser.wait("document.querySelectorAll('#vr-box .thumbnail-item').length > 0")
        self.browser.wait("!document.querySelector('#vr-box .loader')")

    def empty_box(self) -> None:
        self.browser.run(
            "(() => { document.querySelectorAll('#vr-box .delete-button').forEach(one => one.click());"
            " const box = document.querySelector('#vr-box textarea');"
            " box.value = ''; box.dispatchEvent(new Event('input', { bubbles: true })); })()"
        )

    def press(self, text: str) -> None:
        """Presses the button with a text as soon as it is there."""
        button = f"[...document.querySelectorAll('button')].find(one => one.textContent.trim() === {text!r})"
        self.browser.wait(f"(() => {{ const one = {button}; if (one) one.click(); return !!one; }})()")

    def text(self, selector: str) -> str:
        return self.browser.run(f"document.querySelector({selector!r})?.textContent.trim() ?? ''")

    def status(self, part: str) -> str:
        """Waits until the status line says something, and returns it."""
        return self.browser.wait(
            "document.querySelector('#vr-status p')?.textContent ?? ''", until=lambda text: part in text
        )

    def answers(self, count: int) -> list[str]:
        """Waits until the first model has answered so many questions, and returns its answers."""
        script = "[...document.querySelectorAll('#vr-chat-0 [data-testid=bot]')].map(one => one.textContent.trim())"
        return self.browser.wait(
            script, until=lambda found: len(found) >= count and all(one.endswith("{{value}}") for one in found)
        )


@pytest.fixture(scope="module")
def found(files, tmp_path_factory):
    config = tiny.config()
    generator = Hostile(config)
    thread = ModelThread([loader(generator), loader(Echo(config))])
    checkpoints = Checkpoint(f"runs/{HOSTILE[:12]}/model"), Checkpoint("runs/pooling/model", ("fastv",))
    options = PageOptions(checkpoints, settings(2, maps=True), (Example("Which?", str(files / "example.png")),))

    def draw(generator, chat, settings):
        sizes = [SIZE] * len(chat.images)
        return figures(weights(config, sizes, 4, seed=len(sizes)), list(chat.images), config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "draw", draw)
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        blocks = page.Page(thread, options).blocks
        url = page.launch(blocks, "127.0.0.1", None, folder=files)
        with Browser(tmp_path_factory.mktemp("profile")) as browser:
            yield visit(browser, url, files, generator)
        blocks.close(verbose=False)
        thread.close()


def visit(browser: Browser, url: str, files: Path, generator: Hostile) -> dict:
    """Does everything once, and returns what was seen."""
    found, visitor = {}, Visitor(browser)
    browser.open(url)
    browser.wait("!!document.querySelector('#vr-box textarea')")
    found["title"] = browser.run("document.title")

    # An example, and its answers.
    browser.run("document.querySelector('#vr-examples .gallery-item').click()")
    visitor.wait_for_files()
    browser.wait("document.querySelector('#vr-box textarea').value === 'Which?'")
    visitor.ask("")
    found["answers"] = visitor.answers(1)
    browser.wait("document.querySelectorAll('#vr-maps-1 .vr-figure').length === 1")
    found["other"] = visitor.text("#vr-chat-1 [data-testid=bot]")
    found["numbers"] = [visitor.text(f"#vr-numbers-{number}") for number in (0, 1)]
    found["images"] = browser.run("document.querySelectorAll('#vr-chat-0 img').length")
    found["question"] = visitor.text("#vr-chat-0 [data-testid=user] .md")

    # The maps: the whole image, the token under the pointer, a pinned one, the next one, and the plain image.
    found["whole"] = visitor.text("#vr-maps-0 .vr-token")
    x, y, width, height = browser.run(
        "(() => { const stage = document.querySelector('#vr-maps-0 .vr-stage');"
        " stage.scrollIntoView({ block: 'center' });"
        " const box = stage.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; })()"
    )
    found["stage"] = [width, height]
    found["seen"] = {}

    def see(name):
        alpha = browser.run(
            "document.querySelector('#vr-maps-0 canvas').getContext('2d')"
            f".getImageData({int(width) - 4}, {int(height) - 4}, 1, 1).data[3]"
        )
        found["seen"][name] = (visitor.text("#vr-maps-0 .vr-token"), alpha)

    browser.move(x + width / 12, y + height / 8)
    see("first token")
    browser.move(x + width * 0.75, y + height / 8)
    see("another token")
    browser.move(x + width / 2, max(0, y - 30))
    see("left")
    browser.click(x + width / 12, y + height / 8)
    see("pinned")
    browser.move(x + width * 0.75, y + height / 8)
    see("still pinned")
    browser.run("document.querySelector('#vr-maps-0 .vr-stage').focus()")
    browser.key("ArrowRight")
    see("next")
    browser.key("Escape")
    see("whole again")
    browser.run("document.querySelector('#vr-maps-0 [data-insertion=\"\"]').click()")
    see("image")

    # A pasted image.
    browser.run(
        "(async () => { const data = new DataTransfer(), canvas = document.createElement('canvas');"
        " canvas.width = 48; canvas.height = 24;"
        " const blob = await new Promise(done => canvas.toBlob(done, 'image/png'));"
        " data.items.add(new File([blob], 'pasted.png', { type: 'image/png' }));"
        " document.querySelector('#vr-box textarea').dispatchEvent("
        "   new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true })); })()"
    )
    visitor.wait_for_files()
    visitor.ask("And this?")
    visitor.answers(2)
    browser.wait("document.querySelectorAll('#vr-maps-0 .vr-figure').length === 2")
    browser.wait("document.querySelectorAll('#vr-maps-1 .vr-figure').length === 2")
    found["second"] = browser.run(
        "[...document.querySelectorAll('#vr-maps-0 .vr-figure')].map(one => ["
        " JSON.parse(one.dataset.figure).insertions.at(-1).note, one.querySelector('.vr-token').textContent])"
    )
    inked = "one => one.getContext('2d').getImageData(0, 0, one.width, one.height).data.some(value => value)"
    found["inked"] = browser.wait(f"[...document.querySelectorAll('#vr-maps-0 canvas')].every({inked})", seconds=30)

    # What cannot be used.
    found["problems"] = {}
    many = [files / f"many{number}.png" for number in range(100)]
    for part, names in {
        "page.png": [files / "page.png"],
        "onerror": [files / EVIL_NAME],
        "huge.png": [files / "huge.png", files / "good.png"],
        "100 files": many,
    }.items():
        visitor.ask("Is it?", *names)
        found["problems"][part] = visitor.status(part)
        found["kept"] = visitor.browser.run("document.querySelector('#vr-box textarea').value")
        visitor.empty_box()
    found["markup"] = browser.run(
        "document.querySelectorAll('#vr-status img, .vr-chat .md img, .vr-chat script').length"
    )

    # An answer that is stopped, and a new conversation.
    generator.waits = True
    visitor.ask("wait")
    browser.wait("document.querySelectorAll('#vr-chat-0 [data-testid=bot]').length === 3")
    visitor.press("Stop")
    found["stopped"] = visitor.status("Stopped")
    generator.waits = False
    generator.go.set()
    visitor.ask("And now?")
    visitor.insist()
    found["after"] = visitor.answers(3)
    visitor.press("New conversation")
    browser.wait("document.querySelectorAll('.vr-chat [data-testid=bot]').length === 0")
    found["fresh"] = visitor.text("#vr-maps-0 p")

    found["overflow"] = {}
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        for width in (1280, 390):
            browser.resize(width, 844)
            script = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            found["overflow"][scheme, width] = browser.wait(script, until=lambda number: number == 0)
    found["title after"] = browser.run("document.title")
    found["hosts"] = {one.split("/")[2] for one in browser.requests if one.startswith(("http:", "https:", "ws"))}
    found["host"] = url.split("/")[2]
    found["messages"] = browser.messages
    return found


def test_answers_are_text(found):
    assert found["answers"] == [HOSTILE]
    assert found["other"].startswith("3 tiles, ")
    assert found["question"] == "Which?"
    assert found["images"] == 1
    assert found["markup"] == 0
    assert found["title"] == found["title after"] == "vr-jax"


def test_numbers_are_shown_for_each_model(found):
    for line in found["numbers"]:
        assert "tokens, 30 of them vision" in line
        assert "first token after" in line
        assert "tokens/s" in line


def test_maps_follow_the_pointer_and_the_keys(found):
    seen = {name: text for name, (text, _) in found["seen"].items()}
    assert found["whole"].startswith("Whole image: largest weight ")
    assert seen["left"] == seen["whole again"] == found["whole"]
    assert seen["first token"].startswith("Token in row 1, column 1: largest weight ")
    assert seen["another token"].startswith("Token in row 1, column 5: ")
    assert seen["pinned"] == seen["still pinned"] == seen["first token"].replace("column 1:", "column 1 (pinned):")
    assert seen["next"].startswith("Token in row 1, column 2 (pinned): ")
    assert seen["image"].startswith("Choose an insertion")
    width, height = found["stage"]
    assert width / height == pytest.approx(2, rel=0.02)
    opacity = {name: alpha for name, (_, alpha) in found["seen"].items()}
    assert opacity["image"] == 0
    assert opacity["pinned"] == 128, "what lies outside of the token's window is dark"


def test_the_maps_of_a_second_answer_are_drawn_anew(found):
    """Gradio changes the figures of the first answer, of which the visitor chose the plain image, into the new ones."""
    assert len(found["second"]) == 2
    for note, line in found["second"]:
        assert line == f"Whole image: {note}."
    assert found["second"][0][1] != found["whole"]
    assert found["inked"]


def test_what_cannot_be_used_is_one_line(found):
    assert found["problems"]["page.png"].startswith("page.png: The image of ")
    assert "has none of the formats" in found["problems"]["onerror"]
    assert found["problems"]["huge.png"] == "huge.png: The image has too many pixels; make it smaller than 89,478,485."
    assert found["problems"]["100 files"].startswith("100 files were given, but a question may have at most 16 images")
    assert found["kept"] == "Is it?"
    for line in found["problems"].values():
        assert "\n" not in line
        assert "Traceback" not in line


def test_a_stopped_answer_is_not_part_of_the_conversation(found):
    assert found["stopped"] == page.STOPPED
    assert found["after"] == [HOSTILE] * 3
    assert found["fresh"] == page.NO_MAPS


def test_the_page_fits_and_talks_to_its_own_server_alone(found):
    assert set(found["overflow"].values()) == {0}
    assert found["hosts"] == {found["host"]}
    assert found["messages"] == []
