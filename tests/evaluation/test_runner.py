"""The runner: batches, bad items, interruptions, devices and processes, all with the same answers."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections import Counter

import jax
import pytest

from tests.compilations import compilations
from tests.evaluation import words
from tests.golden.discovery import REPOSITORY
from tests.inference import tiny
from vr_jax.data.processor import Processor
from vr_jax.data.types import Conversation
from vr_jax.errors import UserError
from vr_jax.evaluation import batching
from vr_jax.evaluation.report_items import report_items, sample
from vr_jax.evaluation.run_directory import load_results
from vr_jax.evaluation.runner import evaluate_items
from vr_jax.inference import Buckets, Generator, user_turn
from vr_jax.sharding import make_mesh, param_shardings

BENCHMARK = words.Words()
ITEMS = words.items()


@pytest.fixture(scope="module")
def generator():
    return Generator(tiny.model(tiny.config()), tiny.TOKENIZER, tiny.BUCKETS)


@pytest.fixture(scope="module")
def processor():
    return Processor(tiny.TOKENIZER, tiny.config())


def run(generator, processor, output, items=ITEMS, **options):
    options = {"batch_size": 4, "progress": False, "settings": {"checkpoint": {"sha256": "1"}}} | options
    return evaluate_items(generator, processor, BENCHMARK, items, output, **options)


@pytest.fixture(scope="module")
def items(generator, processor, tmp_path_factory):
    """The items, of which "good-1" and "good-4" have the model's own replies as answers."""
    first = run(generator, processor, tmp_path_factory.mktemp("first"))
    replies = {result.id: result.prediction for result in first.results}
    return [
        dataclasses.replace(item, answers=("x", replies[item.id])) if item.id in ("good-1", "good-4") else item
        for item in ITEMS
    ]


@pytest.fixture(scope="module")
def finished(generator, processor, items, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    return output, run(generator, processor, output, items)


def test_answers_are_those_of_each_item_alone(generator, processor, finished, items):
    _, evaluation = finished
    assert [result.id for result in evaluation.results] == [item.id for item in items]
    for item, result in zip(items, evaluation.results, strict=True):
        if item.id in words.BAD:
            continue
        conversation = Conversation(item.id, (user_turn(item.question, len(item.images)),), item.images)
        reply = generator.generate([processor.prompt(conversation)], max_new_tokens=4, rows=4)[0]
        assert result.prediction == reply.text.strip()
        assert result.finish == reply.finish
        assert result.error is None
        assert result.score == (result.prediction in item.answers)


def test_each_bucket_is_compiled_once(generator, processor, finished, items, tmp_path):
    """Other batches of the same shapes compile nothing, also with other images and texts."""
    assert len({key[2] for key in generator.compilations if key[0] == "prefill"}) > 1, "several buckets"
    assert set(generator.compilations.values()) == {1}
    with compilations() as compiled:
        evaluation = run(generator, processor, tmp_path, items[::-1])
    assert [result.id for result in evaluation.results] == [item.id for item in items[::-1]]
    assert compiled == []


def test_bad_items_count_as_wrong_and_are_named(finished):
    _, evaluation = finished
    bad = {result.id: result for result in evaluation.results if result.error is not None}
    assert {name: result.error.split(":")[0] for name, result in bad.items()} == words.BAD
    assert all(result.score == 0 and result.prediction is None for result in bad.values())
    unscored = evaluation.summary["unscored"]
    assert unscored["count"] == 5
    assert unscored["by_reason"] == Counter(words.BAD.values())
    assert set(unscored["items"]) == set(words.BAD)


def test_a_metric_that_fails_costs_one_item(generator, processor, items, tmp_path):
    class Fails(words.Words):
        def score(self, prediction, item):
            if item.id == "good-3":
                raise OverflowError("too much")
            return super().score(prediction, item)

    few = items[:6]
    evaluation = evaluate_items(generator, processor, Fails(), few, tmp_path, batch_size=4, progress=False)
    by_id = {result.id: result for result in evaluation.results}
    assert by_id["good-3"].error == "scoring_failed: OverflowError: too much"
    assert by_id["good-3"].score == 0
    assert by_id["good-3"].prediction is not None, "the reply is kept"
    assert evaluation.summary["unscored"]["by_reason"] == {"broken_image": 1, "scoring_failed": 1, "missing_image": 1}
    assert by_id["good-1"].score == 1


def test_summary_and_files(finished, items):
    output, evaluation = finished
    assert json.loads((output / "summary.json").read_text()) == evaluation.summary
    lines = [json.loads(line) for line in (output / "items.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == sorted(item.id for item in items)
    assert {"id", "question", "answers", "prediction", "score", "category"} <= set(lines[0])
    summary = evaluation.summary
    right = sum(result.score for result in evaluation.results)
    assert right >= 2
    assert summary["metrics"]["accuracy"] == pytest.approx(right / len(items))
    assert summary["score"] == pytest.approx(100 * right / len(items))
    assert summary["items"] == len(items)
    assert {name: one["items"] for name, one in summary["categories"].items()} == {"odd": 9, "even": 5}
    for name, one in summary["categories"].items():
        assert one["score"] == pytest.approx(100 * summary["metrics"][name])
        assert one["interval"][0] <= one["score"] <= one["interval"][1]
    assert summary["interval"][0] < summary["score"] < summary["interval"][1]
    assert summary["throughput"]["items"] == words.GOOD, "those that reached the model"
    assert summary["throughput"]["items_per_second"] > 0
    assert summary["settings"]["model"] == tiny.config().to_dict()


def test_report_items_show_what_was_asked_and_answered(generator, processor, finished, items):
    _, evaluation = finished
    shown = report_items(evaluation, generator, processor, len(items), batch_size=4)
    for item, result, entry in zip(items, evaluation.results, shown, strict=True):
        assert (entry.benchmark, entry.id, entry.question, entry.references) == (
            *("words", item.id, item.question),
            item.answers,
        )
        assert (entry.prediction, entry.error, entry.images) == (result.prediction, result.error, item.images)
        assert entry.cut_off == (result.finish == "length")
        # One heat map for each insertion, where there is an image that could be read.
        assert len(entry.maps) == (1 if item.images and item.id not in words.BAD else 0)


def test_a_report_samples_evenly():
    assert sample(10, 0) == []
    assert sample(3, 10) == [0, 1, 2]
    assert sample(101, 5) == [0, 25, 50, 75, 100]


class Killed(Exception):
    pass


def test_an_interrupted_run_continues(generator, processor, items, finished, tmp_path):
    seen = []

    def kill_after_two_batches(results):
        seen.extend(result.id for result in results)
        if len(seen) >= 8:
            raise Killed

    with pytest.raises(Killed):
        run(generator, processor, tmp_path, items, on_batch=kill_after_two_batches)
    assert [result.id for result in load_results(tmp_path)] == seen
    assert not (tmp_path / "summary.json").exists()
    file = tmp_path / "items.jsonl"
    file.write_bytes(file.read_bytes()[:-9])  # as if killed while writing

    again = []
    evaluation = run(generator, processor, tmp_path, items, on_batch=again.extend)
    assert evaluation.results == finished[1].results
    answered = {name for name in seen[:-1] if name not in words.BAD}
    assert answered & {result.id for result in again} == set()
    assert answered | {result.id for result in again} == {item.id for item in items}
    ids = [json.loads(line)["id"] for line in file.read_text().splitlines()]
    assert sorted(ids) == sorted(item.id for item in items)
    assert evaluation.summary["metrics"] == finished[1].summary["metrics"]
    assert evaluation.summary["throughput"]["items_of_an_earlier_session"] == len(answered)


def test_a_finished_run_is_not_repeated_but_repaired(generator, processor, items, tmp_path):
    few = items[:4]
    broken = run(generator, processor, tmp_path, few)
    assert [result.error is None for result in broken.results] == [False, True, True, True]
    again = []
    repeated = run(generator, processor, tmp_path, few, on_batch=again.extend)
    assert [result.id for result in again] == ["broken"]
    assert repeated.summary["throughput"] == broken.summary["throughput"] | {"measured_earlier": True}
    repaired = [dataclasses.replace(few[0], images=(tiny.png(30, 15),)), *few[1:]]
    evaluation = run(generator, processor, tmp_path, repaired)
    assert evaluation.results[0].error is None
    assert evaluation.results[1:] == broken.results[1:]


def test_another_run_is_refused(generator, processor, items, tmp_path):
    def open_run(**changes):
        def stop(_):
            raise Killed

        run(generator, processor, tmp_path, changes.pop("items", items), on_batch=stop, **changes)

    with pytest.raises(Killed):
        open_run()
    with pytest.raises(UserError, match="checkpoint: the content differs"):
        open_run(settings={"checkpoint": {"sha256": "2"}})
    with pytest.raises(UserError, match="max_new_tokens: 4 there, 5 now"):
        open_run(max_new_tokens=5)
    with pytest.raises(UserError, match=r"items\.count: 14 there, 13 now"):
        open_run(items=items[1:])
    with pytest.raises(UserError, match="items: the content differs"):
        open_run(items=[dataclasses.replace(items[0], answers=("y",)), *items[1:]])
    with pytest.raises(Killed):
        open_run(settings={"checkpoint": {"sha256": "2"}}, overwrite=True)


@pytest.mark.slow  # It compiles again for a mesh; training/test_step.py does so.
def test_eight_devices_give_the_same(generator, processor, items, finished, tmp_path):
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        model = jax.device_put(generator.model, param_shardings(generator.model, mesh))
        sharded = Generator(model, tiny.TOKENIZER, tiny.BUCKETS)
        evaluation = run(sharded, processor, tmp_path, items, batch_size=3)
    assert {rows for _, rows, *_ in sharded.compilations} == {4}, "the batch fills the mesh"
    assert evaluation.results == finished[1].results


def test_items_that_make_no_run(generator, processor, items, tmp_path):
    with pytest.raises(UserError, match="words: there are no items to answer"):
        run(generator, processor, tmp_path / "a", [])
    with pytest.raises(UserError, match=r"some ids belong to several items: \['good-0'\]"):
        run(generator, processor, tmp_path / "b", [items[1], items[1]])
    with pytest.raises(UserError, match=r"none of 1 items can be asked .*broken: broken_image"):
        run(generator, processor, tmp_path / "c", items[:1])
    with pytest.raises(UserError, match="batch_size = 0"):
        run(generator, processor, tmp_path / "d", items, batch_size=0)


def test_sizes_are_those_of_the_prompts(processor):
    for item in ITEMS:
        size = batching.prompt_size(processor, BENCHMARK, item)
        if item.id in ("placeholders", "no-image", "half-a-character"):
            assert size == (0, 0)
        elif item.id != "broken":
            prompt = batching.prompt_of(processor, BENCHMARK, item)
            assert size == (len(prompt.tokens), len(prompt.tile_pixels))


def test_batches_hold_one_bucket_as_far_as_possible():
    buckets = Buckets(tokens=(10, 20, 30), tiles=(1, 2))
    sizes = {0: (5, 1), 1: (25, 2), 2: (12, 1), 3: (9, 1), 4: (26, 2), 5: (99, 9), 6: (1, 2), 7: (13, 1)}
    assert batching.batches(sizes, buckets, 2) == [[1, 4], [6, 2], [7, 0], [3, 5]]
    assert batching.batches({}, buckets, 2) == []


WORKER = """
import json, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
import jax
port, rank, checkpoint, output = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
assert jax.device_count() == 4
from pathlib import Path
from tests.evaluation import words
from tests.inference import tiny
from vr_jax.errors import UserError
from vr_jax.evaluation.runner import evaluate_items
from vr_jax.inference import Buckets
from vr_jax.inference import Generator
from vr_jax.inference import load_for_inference
from vr_jax.sharding import make_mesh

mesh = make_mesh(1, 4, 1)
with jax.set_mesh(mesh):
    loaded = load_for_inference(Path(checkpoint), mesh)
    generator = Generator(loaded.model, loaded.tokenizer, Buckets(tokens=(112,), tiles=(4,)))
    arguments = (generator, loaded.processor, words.Words(), words.items(), Path(output))
    settings = {"checkpoint": {"sha256": "1"}}
    found = evaluate_items(*arguments, batch_size=4, progress=False, settings=settings)
    Path(output + f".{rank}.json").write_text(json.dumps([result.to_dict() for result in found.results]))
    try:
        evaluate_items(*arguments, batch_size=4, progress=False, settings={"checkpoint": {"sha256": "2"}})
    except UserError as error:
        assert "checkpoint.sha256" in str(error)
    else:
        raise SystemExit("the second run was not refused")
"""


@pytest.mark.slow  # Two processes compile; test_distributed.py has two short ones.
def test_two_processes_give_the_same(finished, tmp_path):
    """Each prepares its share of every batch; the first writes; both know all results; a refusal stops both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    checkpoint = tiny.save(tmp_path / "model")
    command = [sys.executable, "-c", WORKER, str(port)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(checkpoint), str(tmp_path / "run")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=500)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(error[-3000:] for error in errors)
    expected = {r.id: (r.prediction, r.error) for r in finished[1].results}
    for rank in range(2):
        found = json.loads((tmp_path / f"run.{rank}.json").read_text())
        assert {r["id"]: (r["prediction"], r["error"]) for r in found} == expected
    assert len(load_results(tmp_path / "run")) == len(ITEMS)
