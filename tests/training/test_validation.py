"""What is measured on held-out data: the mean loss against numpy, when and where it is written, the best checkpoint."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import socket
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.tiny import quick
from tests.training.held_out import inputs_with_processor, validated_run
from tests.training.test_processes import finish, start
from tests.training.tiny import NoiseIterator, plain_run
from vr_jax.data.collate import collate
from vr_jax.data.demo.export import write_llava
from vr_jax.data.demo.source import DemoSource
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from vr_jax.data.sources import open_source
from vr_jax.errors import ConfigError, UserError
from vr_jax.evaluation import Evaluator, NothingAsked, held_out_questions
from vr_jax.model.batch import BatchShape
from vr_jax.model_directory import load_model
from vr_jax.settings import TrainConfig, ValidationSettings
from vr_jax.sharding import make_mesh
from vr_jax.training import loop
from vr_jax.training.checkpoint import Checkpoints
from vr_jax.training.program import build_program
from vr_jax.training.state import ModelTree, create_state
from vr_jax.training.stopping import Preempted
from vr_jax.training.trackers import Trackers, read_metrics
from vr_jax.training.validation import ReplyScore, open_validation

SAMPLES = 21


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A file in LLaVA's format with generated images."""
    return write_llava(DemoSource("held_out", SAMPLES, seed=3, turns=2), tmp_path_factory.mktemp("held_out") / "data")


def mean_loss_of_each_sample_alone(model, path, samples=SAMPLES):
    """In float64 by numpy from the hidden states of one sample at a time, without packing or sharding."""
    processor, source = Processor(demo_tokenizer(), model.config), open_source(path, images=path.parent / "images")
    total, count = 0.0, 0
    head = np.asarray(model.head_kernel(), np.float64)
    forward = jax.jit(lambda model, batch: model(batch)[0])
    for record in itertools.islice(source, samples):
        example = processor.example(record)
        shape = BatchShape(rows=1, tokens=len(example.tokens), tiles=1, tile_size=model.config.image.tile_size)
        hidden = np.asarray(forward(model, collate([[example]], shape).batch), np.float64)[0]
        logits = hidden @ head
        logits -= logits.max(axis=1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        targets = np.flatnonzero(example.loss_mask[1:]) + 1  # nothing predicts a sample's first token
        total -= log_probabilities[targets - 1, example.tokens[targets]].sum()
        count += len(targets)
    return total / count


def validation_series(workdir):
    """Every number of the metrics file but the times."""
    timed = {"seconds", "tokens_per_s", "samples_per_s", "data_wait", "validation_seconds"}
    records = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in timed} for record in records]


@pytest.fixture(scope="module")
def whole(held_out, tmp_path_factory):
    """An uninterrupted run of five updates on eight devices."""
    workdir = tmp_path_factory.mktemp("whole")
    loop.train(validated_run(held_out, steps=5), workdir, open_inputs=inputs_with_processor)
    return workdir


@pytest.mark.parametrize("devices", quick([1, 8], 8))
@pytest.mark.parametrize("batches", [0, 2])
def test_the_mean_loss_is_that_of_each_sample_alone(whole, held_out, devices, batches):
    """The last batch is not full, and a batch of 8 rows on 8 devices has rows without a sample."""
    model = load_model(whole / "model")
    one = {"source": {"path": str(held_out), "images": str(held_out.parent / "images")}, "batches": batches}
    config = validated_run(held_out, **{"batch.accumulation": 8 // devices}).replace({"validation": {"held_out": one}})
    mesh = make_mesh(devices=jax.devices()[:devices])
    program = build_program(config, mesh, config.steps)
    validation = open_validation(config, program, inputs_with_processor(config, mesh, None), whole, config.steps)
    with jax.set_mesh(mesh):
        state = create_state(program.tree, program.optimizer, program.abstract, model)
        values = validation.measure(["held_out"], state, 4, Trackers(None, resume_step=0, active=False))
    rows = batches * devices or SAMPLES  # rows of a micro-batch times batches
    expected = mean_loss_of_each_sample_alone(load_model(whole / "model"), held_out, rows)
    assert values["validation/held_out/loss"] == pytest.approx(expected, abs=1e-5)


def test_it_is_measured_every_so_many_updates_and_after_the_last(whole, held_out):
    records = list(read_metrics(whole / "metrics.jsonl"))
    measured = [record["step"] for record in records if "validation/held_out/loss" in record]
    assert measured == [2, 4, 5]
    expected = mean_loss_of_each_sample_alone(load_model(whole / "model"), held_out)
    assert records[-1]["validation/held_out/loss"] == pytest.approx(expected, abs=1e-5)
    assert all(
        record["seconds"] > 0 and "validation_seconds" in record for record in records if record["step"] in (2, 4, 5)
    )


@pytest.mark.slow  # Three processes train: about a minute.
def test_three_processes_measure_the_same(held_out, tmp_path):
    """Each reads a third of the samples, and has a third of the rows of a batch."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = (
        f"--held_out={held_out}",
        "--processes=3",
        f"--coordinator={address}",
        "--set=batch.rows=6",
        "--set=steps=2",
    )
    results = [finish(one) for one in [start(tmp_path, f"--process={i}", *shared, devices=1) for i in range(3)]]
    assert [code for code, _ in results] == [0, 0, 0], results
    records = list(read_metrics(tmp_path / "metrics.jsonl"))
    expected = mean_loss_of_each_sample_alone(load_model(tmp_path / "model"), held_out)
    assert records[-1]["validation/held_out/loss"] == pytest.approx(expected, abs=1e-5)


class StoppingIterator(NoiseIterator):
    """Asks the run to stop, as a cluster does, while batch 2 is made."""

    def __next__(self):
        batch = super().__next__()
        if self.number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch


def test_a_run_that_is_stopped_before_a_validation_makes_up_for_it(whole, held_out, tmp_path):
    config = validated_run(held_out, steps=5)

    def stopping(config, mesh, workdir):
        return dataclasses.replace(
            inputs_with_processor(config, mesh, workdir), iterator=StoppingIterator(config.batch.rows)
        )

    with pytest.raises(Preempted, match="saved step 2 of 5"):
        loop.train(config, tmp_path, open_inputs=stopping)
    assert [record["step"] for record in validation_series(tmp_path)] == [1], "what stops a run does not wait"
    ended = tmp_path.with_name(f"{tmp_path.name}_ended")
    shutil.copytree(tmp_path, ended)
    loop.train(config, tmp_path, open_inputs=inputs_with_processor)
    assert validation_series(tmp_path) == validation_series(whole)
    # One that then ends at this very update has no other update at which it could make up for it.
    loop.train(config.replace({"steps": 2}), ended, open_inputs=inputs_with_processor)
    assert validation_series(ended) == validation_series(whole)[:2]
    assert (ended / "model").is_dir()


class FailingIterator(NoiseIterator):
    """Fails in the place of batch 4, before the checkpoint of update 4."""

    def __next__(self):
        if self.number == 3:
            raise UserError("no batch 4")
        return super().__next__()


@pytest.mark.slow  # Three starts of a run.
def test_a_run_that_ends_after_it_made_up_for_a_validation_writes_it_once(held_out, tmp_path):
    """It continues from the same checkpoint again, whose step has been written meanwhile."""
    config = validated_run(held_out, steps=5)

    def inputs_of(iterator):
        return lambda *given: dataclasses.replace(inputs_with_processor(*given), iterator=iterator(config.batch.rows))

    with pytest.raises(Preempted):
        loop.train(config, tmp_path, open_inputs=inputs_of(StoppingIterator))
    with pytest.raises(UserError, match="no batch 4"):
        loop.train(config, tmp_path, open_inputs=inputs_of(FailingIterator))
    assert [record["step"] for record in validation_series(tmp_path)][:2] == [1, 2]
    loop.train(config, tmp_path, open_inputs=inputs_with_processor)
    assert [record["step"] for record in validation_series(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("repeated", [False, True])
def test_unusable_samples_at_the_beginning_are_judged_among_all(whole, held_out, tmp_path, repeated):
    """Three of the samples that are tried out have no image. Whether they are too many, the whole tells."""
    records = json.loads(held_out.read_text())
    broken = [record | {"image": "absent.png"} for record in records[:3]] + records[3:]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(broken * 10 if repeated else broken + records * 9))
    one = {"source": {"path": str(path), "images": str(held_out.parent / "images")}}
    config = validated_run(held_out, **{"data.max_skipped": 0.02}).replace({"validation": {"held_out": one}})
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    program = build_program(config, mesh, config.steps)
    validation = open_validation(config, program, inputs_with_processor(config, mesh, None), whole, config.steps)
    with jax.set_mesh(mesh):
        state = create_state(program.tree, program.optimizer, program.abstract, load_model(whole / "model"))
        validation.try_out(state)
        with pytest.raises(UserError, match="30 of 210 samples") if repeated else contextlib.nullcontext():
            validation.measure(["held_out"], state, 4, Trackers(None, resume_step=0, active=False))


@pytest.mark.parametrize("lr", quick([3e-3, 3.0], 3.0))
def test_the_best_checkpoint_is_that_of_the_validation(held_out, tmp_path, lr, caplog):
    """With the high learning rate the loss rises, so that an earlier checkpoint is best."""
    caplog.set_level("INFO")
    best = {"checkpoint.best": "validation/held_out/loss", "checkpoint.keep_last": 1, "optimizer.schedule": "constant"}
    config = validated_run(held_out, **best, **{"optimizer.lr": lr, "steps": 6})
    loop.train(config, tmp_path, open_inputs=inputs_with_processor)
    losses = {
        one["step"]: one["validation/held_out/loss"] for one in validation_series(tmp_path) if one["step"] % 2 == 0
    }
    lowest = min(losses, key=losses.get)
    with Checkpoints(tmp_path, keep_last=1, best=config.checkpoint.best) as checkpoints:
        assert checkpoints.best() == (lowest, losses[lowest])
        assert checkpoints.steps() == sorted({lowest, 6})
    told = f"the best checkpoint is that of step {lowest}, with validation/held_out/loss {losses[lowest]:.4f}"
    assert (told in caplog.text) == (lowest < 6), "the last one is exported, and nothing needs to be told"
    loop.export_best(config.replace({"tokenizer": "demo"}), tmp_path)
    found = mean_loss_of_each_sample_alone(load_model(tmp_path / "model_best"), held_out)
    assert found == pytest.approx(losses[lowest], abs=1e-5)
    with pytest.raises(UserError, match=r"no checkpoint in .* has the number config\.checkpoint\.best"):
        loop.export_best(
            config.replace(
                {
                    "checkpoint.best": "validation/other/loss",
                    "validation": {"other": {"source": {"path": str(held_out)}, "every": 2}},
                }
            ),
            tmp_path,
        )


def test_of_scores_the_highest_is_best(tmp_path):
    def state():
        return {"step": jax.numpy.zeros(())}

    with Checkpoints(tmp_path, keep_last=1, best="validation/demo/demo") as checkpoints:
        for step, score in ((1, 30.0), (2, 50.0), (3, None), (4, 40.0)):
            metrics = {"loss": 1.0 / step} | ({} if score is None else {"validation/demo/demo": score})
            checkpoints.save(step, state(), data={}, config={}, skip_statistics={}, metrics=metrics)
        checkpoints.finish()
        assert checkpoints.best() == (2, 50.0)
        assert checkpoints.steps() == [2, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint.best": "validation/other/loss"}, "expected one of loss, validation/held_out/loss"),
        ({"checkpoint.best": "validation/held_out/loss", "checkpoint.every": 3}, "make the second a multiple"),
        ({"validation.held_out.every": 0}, "config.validation.held_out.every = 0: expected an integer >= 1"),
        ({"validation": {"a/b": {}}}, "config.validation: 'a/b': expected a name of letters, digits"),
        ({"validation.held_out.batch_size": 3}, "has no effect with config.validation.held_out.metric = 'loss'"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        validated_run("held_out.json").replace(changes)


def test_the_command_line_adds_a_validation():
    config = plain_run().override(["validation.mine.source.path=held_out.json", "validation.mine.every=7"])
    assert (config.validation["mine"].source.path, config.validation["mine"].every) == ("held_out.json", 7)
    assert TrainConfig.from_config_dict(config.to_dict()) == config
    whole = plain_run().override(["validation={'mine': {'source': {'path': 'held_out.json'}, 'every': 7}}"])
    assert whole == config


def test_held_out_data_that_cannot_be_used_end_the_run_before_it_trains(held_out, tmp_path):
    (tmp_path / "images").mkdir()
    missing = validated_run(tmp_path / "missing.json")
    with pytest.raises(UserError, match=r"config\.validation\.held_out: .*missing\.json"):
        loop.train(missing, tmp_path / "run", open_inputs=inputs_with_processor)
    records = json.loads(held_out.read_text())
    for record in records:
        record["image"] = "absent.png"
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(records))
    with pytest.raises(UserError, match=r"21 of 21 samples could not be used") as error:
        loop.train(validated_run(broken), tmp_path / "run", open_inputs=inputs_with_processor)
    assert "config.validation.held_out" in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def write_questions(folder):
    """Two questions of one's own about one image."""
    source = DemoSource("held_out", 2, seed=5)
    (folder / "images").mkdir()
    lines = []
    for index in range(2):
        sample = source.sample(index)
        (folder / "images" / f"{index}.png").write_bytes(sample.png)
        question = sample.questions[0]
        lines.append({"image": f"images/{index}.png", "question": question.text, "answer": question.answer})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("rank", quick([0, 2], 0))
def test_replies_are_those_of_the_exported_model(tmp_path, rank):
    """The parameters answer as they lie in the training state, sharded over eight devices, the frozen ones apart.

    With LoRA they answer through the adapters, which the exported model has merged."""
    questions = write_questions(tmp_path)
    common = {"every": 3, "batches": 1, "batch_size": 8, "max_new_tokens": 4}
    validation = {
        "generated": {"metric": "demo", **common},
        "own": {"metric": "contains", "source": {"path": str(questions)}, **common},
    }
    config = validated_run(questions, steps=3).replace({"validation": validation})
    if rank:
        config = config.replace({"lora.rank": rank, "lora.targets": ("decoder.*",), "trainable": ("projector.*",)})
    else:
        config = config.replace({"trainable": ("decoder.*",)})
    workdir = tmp_path / "run"
    loop.train(config, workdir, open_inputs=inputs_with_processor)
    last = list(read_metrics(workdir / "metrics.jsonl"))[-1]
    assert 0 <= last["validation/generated/demo"] <= 100
    assert 0 <= last["validation/own/contains"] <= 100
    model = load_model(workdir / "model")
    evaluator = Evaluator(Processor(demo_tokenizer(), config.model))
    for name, metric, path in (("generated", "demo", ""), ("own", "contains", str(questions))):
        benchmark, items = held_out_questions(name, metric, path, limit=8)
        expected = evaluator.evaluate(model, benchmark, items, batch_size=8, max_new_tokens=4)
        lines = (workdir / "validation" / name / "3" / "items.jsonl").read_text().splitlines()
        found = {one["id"]: one["prediction"] for one in map(json.loads, lines)}
        assert found == {one.id: one.prediction for one in expected.results}
        assert len(set(found.values())) >= 1
        assert last[f"validation/{name}/{metric}"] == pytest.approx(expected.summary["score"])


class UnaskableEvaluator:
    """Stands for an evaluator to which none of the questions can be put."""

    def evaluate(self, model, benchmark, items, **options):
        raise NothingAsked(f"none of {len(items)} items can be asked")


@pytest.mark.parametrize("others", [0, 1])
def test_first_questions_that_cannot_be_asked_say_nothing_about_the_others(others, tmp_path, caplog):
    benchmark, items = held_out_questions("generated", "demo", "", limit=8 + others)
    settings = ValidationSettings(metric="demo", batch_size=8)
    tree = ModelTree(validated_run(tmp_path).model)
    score = ReplyScore(UnaskableEvaluator(), benchmark, items, settings, tree, tmp_path)
    state = SimpleNamespace(frozen={}, params=tree.shapes)
    with contextlib.nullcontext() if others else pytest.raises(NothingAsked, match="none of 8"):
        score.try_out(state)
    assert ("none of 8 items" in caplog.text) == bool(others)
    with pytest.raises(NothingAsked):
        score(state, 2)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        ({"metric": "chartQA"}, "metric = 'chartQA': did you mean 'chartqa'"),
        ({"metric": "exact"}, "set source.path to their file"),
        ({"metric": "demo", "source": {"images": "folder"}}, r"source.images = 'folder' has no effect with metric"),
    ],
)
def test_questions_that_cannot_be_asked_end_the_run_before_it_trains(one, message, tmp_path):
    config = validated_run(tmp_path).replace({"validation": {"mine": one}})
    with pytest.raises(UserError, match=rf"config\.validation\.mine: .*{message}"):
        loop.train(config, tmp_path / "run", open_inputs=inputs_with_processor)
