"""Systems are named, get the layout of the measurement, and are refused with a reason if they cannot be measured."""

import pytest

from tests.efficiency import tiny_systems
from tests.inference import tiny
from vr_jax.data.processor import Processor
from vr_jax.efficiency import Source, read_systems
from vr_jax.efficiency.systems import image_size, prompt
from vr_jax.errors import ConfigError, UserError
from vr_jax.model.config import anyres4, anyres9, single_tile


def test_names_are_as_short_as_they_are_unique(config_file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(config_file.read_text())

    def names(*texts):
        return [system.name for system in read_systems([Source("config", str(text)) for text in texts], "anyres4")]

    assert names(config_file, f"{config_file}:fastv") == ["tiny", "fastv"]
    assert names(f"{config_file}:fastv", f"{other}:fastv") == ["tiny:fastv", "other:fastv"]
    table = "configs/tables/paper.py"
    assert names(f"{table}:table4/fastv", f"{table}:table5a/baseline") == ["table4/fastv", "table5a/baseline"]


def test_rows_of_the_paper_and_their_layouts():
    def only(text, image):
        return read_systems([Source("config", text)], image)[0].config

    assert image_size(anyres4()) == (768, 768)
    assert image_size(anyres9()) == (1152, 1152)
    assert image_size(single_tile(96)) == (96, 96)
    assert only("configs/llava_vr_qwen2_0_5b.py:phase1", "anyres4").image == anyres4()
    assert only("configs/llava_vr_qwen2_0_5b.py:phase1", "config").image == single_tile()
    assert only("configs/tables/paper.py:table5c/after_1/0.5b/phase2", "config").image == anyres4()
    pruned = only("configs/tables/paper.py:table4/vispruner", "anyres4")
    assert (pruned.pruning.name, pruned.image.unpad) == ("vispruner", False)


def test_a_layout_that_does_not_fit_the_model_is_refused(tmp_path):
    """The settings of a pruner are checked together with the layout."""
    path = tiny_systems.write(tmp_path)
    path.write_text(path.read_text().replace('"layer": 1', '"layer": 9'))
    with pytest.raises(ConfigError, match=r":fastv with --image=anyres4: .*layer = 9"):
        read_systems([Source("config", f"{path}:fastv")], "anyres4")


def test_a_source_is_given_once_and_exists(config_file):
    source = Source("config", str(config_file))
    for sources, message in (
        ([], "There is nothing to measure"),
        ([source, source], "is given twice"),
        ([Source("checkpoint", str(config_file))], "is not a model directory"),
    ):
        with pytest.raises(UserError, match=message):
            read_systems(sources, "anyres4")


def test_too_few_text_tokens_are_refused():
    processor = Processor(tiny.TOKENIZER, tiny.config())
    with pytest.raises(UserError, match="text_tokens = 3: the chat template and one digit need"):
        prompt(processor, 3)
