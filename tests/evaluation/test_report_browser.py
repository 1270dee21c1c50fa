"""The report page in headless Chromium: one start, everything done to it by a script, each test reads what came out."""

import pytest

from tests.browser import needs_chromium, probed
from tests.evaluation.report_pages import items, summary
from vr_jax.evaluation.report import write_report

pytestmark = needs_chromium

PROBE = """
  const name = card => card.querySelector(".id").textContent;
  const visible = () => cards.filter(card => card.getClientRects().length).map(name);
  const press = (name, value) => document.querySelector(`input[name="${name}"][value="${value}"]`).click();
  const pick = (select, text) => {
    const option = [...select.options].find(one => one.text.startsWith(text));
    select.value = option.value;
    select.dispatchEvent(new Event("change"));
  };
  const write = text => { search.value = text; search.dispatchEvent(new Event("input")); };
  const names = () => [...category.options].map(option => option.text);
  const box = element => {
    const { x, y, width, height } = element.getBoundingClientRect();
    return [x, y, width, height].map(Math.round);
  };
  const key = key => document.activeElement.dispatchEvent(
    new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    found.all = visible(); found.count = byId("count").textContent;
    found.categories = names(); found.groups = [...category.querySelectorAll("optgroup")].map(one => one.label);
    pick(category, "human_test"); found.human = visible();
    pick(benchmark, "ChartQA"); found.ofChartqa = names(); found.chartqa = visible();
    pick(category, "human_test"); press("state", "wrong"); found.humanWrong = visible();
    press("state", "partial"); found.none = visible(); found.nothing = !byId("nothing").hidden;
    byId("reset").click(); found.reset = visible();
    pick(benchmark, "Own"); pick(category, 'say "x"'); found.quoted = visible(); byId("reset").click();
    for (const state of ["right", "partial", "unscored"]) { press("state", state); found[state] = visible(); }
    byId("reset").click();
    write("CRIMSON which"); found.search = visible(); write("crimson bars"); found.searchNone = visible();
    byId("reset").click();

    press("maps", "after layer 4");
    found.allMaps = all("img.map:not([hidden])").map(one => one.dataset.label);
    cards[0].querySelector('.segments input[value="after layer 1"]').click();
    found.oneMap = all(".map:not([hidden])", cards[0]).map(one => one.dataset.label);
    found.note = cards[0].querySelector(".heatnote").textContent;
    found.boxes = [box(cards[0].querySelector("img:not(.map)")), box(cards[0].querySelector(".map:not([hidden])"))];
    found.problems = all(".broken").map(one => one.textContent);

    // Also those of cards that are not on the screen.
    for (const card of cards) card.style.contentVisibility = "visible";
    await Promise.all(all("img").map(image => image.decode()));
    found.decoded = all("img").map(image => image.naturalWidth > 0);

    const zoom = cards[0].querySelector(".zoom");
    zoom.focus(); zoom.click();
    found.open = large.open; found.largeMaps = all("#stage .map:not([hidden])").map(one => one.dataset.label);
    document.querySelector('input[name="largemap"][value="after layer 4"]').click();
    found.switched = all("#stage .map:not([hidden])").map(one => one.dataset.label);
    found.largeBoxes = [box(stage.querySelector("img:not(.map)")), box(stage.querySelector(".map:not([hidden])"))];
    found.caption = byId("caption").textContent;
    byId("next").click(); found.next = byId("caption").textContent.split("\\n")[0];
    key("ArrowLeft");
    found.previous = byId("caption").textContent.split("\\n")[0];
    key("Escape");
    await new Promise(done => setTimeout(done, 50));
    found.closed = !large.open; found.focus = document.activeElement === zoom;
    found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    found.titleAfter = document.title;
"""


@pytest.fixture(scope="module")
def probed_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    write_report(folder / "report.html", title="A & B", summary=summary(), items=items(), losses=[(1, 2.0), (2, 1.0)])
    return probed(folder / "report.html", PROBE)


@pytest.fixture(scope="module")
def found(probed_page):
    return probed_page[0]


def test_loads_without_console_messages(probed_page, found):
    assert found["title"] == "A & B"
    assert "CONSOLE" not in probed_page[1]


def test_filters(found):
    everything = ["c-0", "c-1", "c-2", "m-0", "m-1", "m-2", "o-0"]
    assert found["all"] == found["reset"] == everything
    assert found["count"] == "7 of 7 shown"
    assert found["chartqa"] == ["c-0", "c-1", "c-2"]
    assert found["humanWrong"] == ["c-1"]
    assert (found["none"], found["nothing"]) == ([], True)
    assert (found["right"], found["partial"], found["unscored"]) == (["c-0", "o-0"], ["c-2"], ["m-1"])
    assert found["quoted"] == ["o-0"]
    assert found["search"] == ["c-1"]
    assert found["searchNone"] == []


def test_categories_depend_on_the_benchmark(found):
    assert found["groups"] == ["ChartQA (3)", "MMMU (3)", "Own <b> (1)"]
    assert len(found["categories"]) == 1 + 2 + 3 + 1
    assert found["human"] == ["c-0", "c-1"], "of the benchmark under whose name it stands"
    assert found["ofChartqa"] == ["all", "human_test (2)", "augmented_test (1)"]


def test_images_and_maps_show(found):
    assert len(found["decoded"]) == 3 + 8 + 4
    assert all(found["decoded"])
    assert found["problems"] == [
        "The image cannot be shown: broken_image: The image of 4 bytes has none of the formats PNG, JPEG, WEBP, GIF, "
        "BMP, TIFF, PPM, AVIF."
    ]
    assert found["allMaps"] == ["after layer 4"] * 2
    assert found["oneMap"] == ["after layer 1"]
    assert found["note"] == "up to 3 times"
    assert found["boxes"][0] == found["boxes"][1]
    assert found["boxes"][0][2] > 200


def test_large_view(found):
    assert found["open"]
    assert found["largeMaps"] == ["after layer 1"]
    assert found["switched"] == ["after layer 4"]
    assert found["largeBoxes"][0] == found["largeBoxes"][1]
    width, height = found["largeBoxes"][0][2:]
    assert width > 600
    assert width / height == pytest.approx(320 / 240, rel=0.01)
    assert found["caption"] == "How many <b>bars</b>?\nexpected 3  \u00b7  answered 3"
    assert (found["next"], found["previous"]) == ("Which?", "How many <b>bars</b>?")
    assert found["closed"]
    assert found["focus"]


def test_hostile_texts_do_nothing(found):
    assert found["title"] == found["titleAfter"] == "A & B"
    assert found["overflow"] == 0
