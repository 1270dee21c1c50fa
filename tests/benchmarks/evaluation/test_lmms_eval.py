"""The throughput benchmark makes the same items every time, and reports medians."""

import io
import re

import pytest
from PIL import Image

from benchmarks.evaluation import lmms_eval
from benchmarks.evaluation.lmms_eval import CONFIG, SIZE, Pass, items, report
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from vr_jax.evaluation import batching
from vr_jax.evaluation.benchmarks import get_benchmark
from vr_jax.settings import load_config


def test_items_are_shaped_like_chartqa():
    config = load_config(f"{CONFIG}:phase2").model
    processor, benchmark, asked = Processor(demo_tokenizer(), config), get_benchmark("chartqa"), items(8)
    assert len({item.images for item in asked}) == len(asked)
    for item in asked:
        assert 20 <= len(item.question) <= 40
        assert Image.open(io.BytesIO(item.images[0])).size == SIZE
        assert batching.prompt_size(processor, benchmark, item)[1] == 5
    assert items(8) == asked, "the same items every time"


def test_report_has_medians_of_the_passes():
    passes = {
        1: [Pass(10.0, 9.0), Pass(20.0, 18.0), Pass(40.0, 36.0)],
        16: [Pass(2.0, 1.8), Pass(5.0, 4.0), Pass(8.0, 7.2)],
    }
    one, many, ratio = report(passes, 40).splitlines()
    assert one.split(";")[0] == "  batch  1: 2.00 items/s (1.00 .. 4.00)"
    assert "outside the compiled programs 10.0 % (10.0 .. 20.0)" in many
    assert "x 5.00 (4.00 .. 5.00)" in ratio


@pytest.mark.slow
def test_script(capsys):
    """It is slow because it compiles the generation of a model with Qwen2's vocabulary for two batch sizes."""
    lmms_eval.main(["--rounds=1", "--items=2"])
    printed = capsys.readouterr().out
    assert "evaluation of 2 ChartQA-shaped items, 16 new tokens each" in printed
    rates = [float(rate) for rate in re.findall(r"batch +(?:1|16): ([\d.]+) items/s", printed)]
    assert len(rates) == 2
    assert min(rates) > 0
    assert "batch 16 against one at a time: x " in printed
