"""The page of the demo says what the result files say, and shows the questions that only Vision Remember answers."""

import dataclasses
import html
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from flax import nnx

from tests.browser import needs_chromium, probed
from vr_jax.data.demo.pages import KINDS
from vr_jax.data.demo.reading import write_reading
from vr_jax.data.demo.tokenizer import reading_tokenizer
from vr_jax.demo.results import read_result, write_page
from vr_jax.demo.systems import SYSTEMS
from vr_jax.errors import UserError
from vr_jax.evaluation import get_benchmark
from vr_jax.evaluation.interface import ItemResult
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model_directory import save_model
from vr_jax.settings import load_config

ITEMS = 10
# The items that each system answers rightly. Vision Remember at 1/9 alone answers 2, 3 and 8.
RIGHT = {
    "vision_remember_9": {0, 1, 2, 3, 8},
    "pooling_9": {0, 5},
    "token_packer_9": {1},
    "vision_remember_16": set(range(8)),
    "pooling_16": {4},
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder as the commands of the demo leave it, with chosen answers and a model that was not trained."""
    root = tmp_path_factory.mktemp("demo")
    write_reading(root / "data", pages=1, held_out=ITEMS, turns=1)
    items = get_benchmark("chartqa").items(root / "data" / "held_out")
    for system in SYSTEMS:
        folder = root / system.name
        (folder / "eval" / "chartqa").mkdir(parents=True)
        results = [
            ItemResult(item.id, item.category, item.question, item.answers, "Q", float(number in RIGHT[system.name]))
            for number, item in enumerate(items)
        ]
        lines = [json.dumps(dataclasses.asdict(one)) + "\n" for one in results]
        (folder / "eval" / "chartqa" / "items.jsonl").write_text("".join(lines))
        (folder / "eval" / "summary.json").write_text(json.dumps({"benchmarks": {"chartqa": summary(results)}}))
        for phase, losses in {"phase1": (4.0, 2.0), "phase2": (2.0, 1.0)}.items():
            (folder / phase).mkdir()
            lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, start=1)]
            (folder / phase / "metrics.jsonl").write_text("".join(lines))
    reading_tokenizer().save_pretrained(root / "tokenizer")
    config = load_config("configs/reading.py:vision_remember_9_phase2").model
    model = VisionLanguageModel(config, rngs=nnx.Rngs(0))
    save_model(root / "vision_remember_9" / "phase2" / "model", model, root / "tokenizer")
    return root


def summary(results):
    """What an evaluation writes of a benchmark, as far as the page reads it."""

    def estimate(members):
        return {"score": 100 * sum(one.score for one in members) / len(members), "items": len(members)}

    categories = {kind: estimate([one for one in results if one.category == kind]) for kind in KINDS}
    return {"title": "ChartQA", "group": None, **estimate(results), "categories": categories}


@pytest.fixture(scope="module")
def page(workdir):
    results = [read_result(system, workdir) for system in SYSTEMS]
    write_page(workdir / "report.html", results, workdir, {"seed": 5}, items=2)
    return workdir / "report.html"


def test_a_result_has_the_scores_the_baselines_and_the_losses_of_the_files(workdir):
    result = read_result(SYSTEMS[0], workdir)
    assert result.columns["all"].score == 50
    assert list(result.columns) == ["all", *KINDS]
    assert result.losses == {"phase1": [(1, 4.0), (2, 2.0)], "phase2": [(1, 2.0), (2, 1.0)]}
    answers = [result.answers[name].answers[0] for name in result.answers]
    assert result.columns["all"].baseline == pytest.approx(100 * max(map(answers.count, answers)) / ITEMS)


def test_a_missing_result_is_named(tmp_path):
    with pytest.raises(UserError, match=r"pooling_9/eval/summary\.json cannot be read: .*; run the demo again"):
        read_result(SYSTEMS[1], tmp_path)


@pytest.mark.slow  # The heat maps of the page take eight seconds to compile.
def test_the_page_says_what_the_files_say(page):
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text())).split())
    assert "Vision Remember at 1/9 50.0 % pooling alone 20.0 %: +30.0 points" in text
    assert "Vision Remember at 1/16 80.0 % pooling alone 10.0 %: +70.0 points" in text
    assert (
        "3 of 10 questions are answered by Vision Remember at 1/9 and by no other system at 1/9; this page shows 2"
        in text
    )
    assert "55.2 43.4 40.4 45.5" in text  # the paper's pooling at 1/9
    cards = re.findall(r'<article class="item right".*?</article>', page.read_text(), re.DOTALL)
    assert len(cards) == 2
    assert all(card.count("data-note=") == 2 for card in cards)  # a heat map for each insertion
    assert all("<bdi>TokenPacker</bdi>" in card and "<bdi>pooling</bdi>" in card for card in cards)


def test_a_system_without_rivals_is_compared_with_none_and_the_commands_can_be_typed(workdir, tmp_path):
    """The name of the folder may hold what a shell would take apart."""
    root = tmp_path / "it's a $demo"
    shutil.copytree(workdir, root)
    write_page(root / "report.html", [read_result(SYSTEMS[0], root)], root, {}, items=0)
    page = (root / "report.html").read_text()
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())
    assert "5 of 10 questions are answered by Vision Remember at 1/9 (no other system at 1/9 was trained)" in text
    assert "TokenPacker" not in text
    chat, efficiency, _ = (html.unescape(one) for one in re.findall(r"<pre><code>(vr-jax .*?)</code>", page))
    checkpoint = f"--checkpoint={root / 'vision_remember_9' / 'phase2' / 'model'}"
    assert shlex.split(efficiency) == ["vr-jax", "efficiency", checkpoint]
    program, action, model, image, question = shlex.split(chat)
    assert (program, action, model) == ("vr-jax", "chat", checkpoint)
    assert Path(image.removeprefix("--image=")).is_file()
    assert question.endswith("?")


PROBE = """
    found.count = byId("count").textContent;
    document.querySelector('input[name="maps"][value="after layer 1"]').click();
    found.maps = all("img.map:not([hidden])").map(one => one.dataset.label);
    for (const card of cards) card.style.contentVisibility = "visible";
    await Promise.all(all("img").map(image => image.decode()));
    found.decoded = all("img").map(image => image.naturalWidth > 0);
    found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
"""


@needs_chromium
@pytest.mark.slow  # The page of the test above.
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page(page, width):
    """The script runs, images and maps are decoded, and only the tables, which scroll by themselves, are wider."""
    found, messages = probed(page, PROBE, width=width)
    assert "CONSOLE" not in messages
    assert found["count"] == "2 of 2 shown"
    assert len(found["decoded"]) == 2 * 3
    assert all(found["decoded"])
    assert found["maps"] == ["after layer 1"] * 2
    assert found["overflow"] == 0
