"""Systems are named, get the layout of the measurement, and are refused with a reason if they cannot be measured."""

import pytest

from tests.convert import qwen2_5_vl_folder
from tests.efficiency import tiny_systems
from tests.inference import tiny
from tests.model.families import family_config
from tests.tiny import tiny_decoder
from vr_jax.data.processor import Processor
from vr_jax.efficiency import Source, read_systems
from vr_jax.efficiency.systems import image_size, prompt
from vr_jax.errors import ConfigError, UserError
from vr_jax.model.config import ImageConfig, anyres4, anyres9, single_tile


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


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("qwen2_5_vl", "give the size of the image to measure with --image=config --image_size=WIDTHxHEIGHT"),
        ("minicpm_v", "measure this model with --image=config, the layout of its own config"),
    ],
)
def test_a_model_without_square_tiles_names_the_flag(name, remedy):
    with pytest.raises(ConfigError) as error:
        read_systems([Source("config", f"configs/table6/{name}.py")], "anyres4")
    assert str(error.value).endswith(f" reads no square tiles; {remedy}")
    assert "aspect_ratio" not in str(error.value)


def test_a_source_is_given_once_and_exists(config_file):
    source = Source("config", str(config_file))
    for sources, message in (
        ([], "There is nothing to measure"),
        ([source, source], "is given twice"),
        ([Source("checkpoint", str(config_file))], "is not a model directory"),
    ):
        with pytest.raises(UserError, match=message):
            read_systems(sources, "anyres4")


def test_a_model_that_keeps_the_sizes_of_images_is_measured_with_a_stated_size():
    """The text has the stated length, in which the markers around the image count."""
    tokenizer = qwen2_5_vl_folder.tokenizer()
    decoder = tiny_decoder(hidden_size=32, rope_sections=(1, 2, 1), vocab_size=len(tokenizer))
    image = ImageConfig(tile_size=16, aspect_ratio="native", unpad=False, min_pixels=64, max_pixels=6400)
    config = family_config("qwen2_5_vl", decoder=decoder, image=image, template="qwen2_vl")
    processor = Processor(tokenizer, config)
    with pytest.raises(UserError, match=r"keeps the sizes of images; give the size .* --image=config --image_size=W"):
        prompt(processor, 70)
    with pytest.raises(UserError, match=r"--image_size=900x2: .*at most 200 times"):
        prompt(processor, 70, (900, 2))
    found = prompt(processor, 70, (50, 30))
    assert (found.vision_cell >= 0).sum() == 6 * 4
    assert (found.vision_cell < 0).sum() == 70
    assert len(found.tile_pixels) == 3 * 2


def test_too_few_text_tokens_are_refused():
    processor = Processor(tiny.TOKENIZER, tiny.config())
    with pytest.raises(UserError, match="text_tokens = 3: the chat template and one digit need"):
        prompt(processor, 3)
